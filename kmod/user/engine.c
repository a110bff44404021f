// SPDX-License-Identifier: GPL-2.0-only
/* The device and the descriptor that tells of its messages. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/vhost.h>
#include <stdlib.h>
#include <unistd.h>

#include "engine.h"
#include "user.h"

struct engine {
	struct vhm_dev dev;
	pid_t process;		/* atomic: whose locks these are */
	pthread_mutex_t telling;
	int pipe[2];		/* one byte in it while a message waits */
	bool told;		/* under telling: the byte is in it */
};

/* As the in-tree module's parameters are unless they are set. */
static const struct vhm_limits limits = {
	.mem_regions = 64,
	.iotlb_entries = 2048,
	.fork_from_owner = true,
};

static void init_locks(struct engine *engine)
{
	struct vhm_dev *dev = &engine->dev;
	unsigned int i;

	pthread_mutex_init(&engine->telling, NULL);
	port_lock_init(&dev->lock);
	port_lock_init(&dev->message_lock);
	for (i = 0; i < VHM_QUEUES; i++)
		port_lock_init(&dev->queue[i].lock);
}

/* The pipe is the parent's too; the child gets one of its own in its place. */
static void replace_pipe(struct engine *engine)
{
	int own[2];
	unsigned int i;

	if (pipe2(own, O_CLOEXEC | O_NONBLOCK)) {
		close(engine->pipe[0]);
		close(engine->pipe[1]);
		engine->pipe[0] = -1;
		engine->pipe[1] = -1;
		return;
	}
	for (i = 0; i < 2; i++) {
		dup3(own[i], engine->pipe[i], O_CLOEXEC);
		close(own[i]);
	}
	engine->told = false;
	if (vhm_dev_readable(&engine->dev))
		port_message_ready(&engine->dev);
}

/* In the child of a fork() nobody will ever give back what other threads had locked. */
static struct vhm_dev *enter(struct engine *engine)
{
	pid_t process = getpid();

	if (__atomic_exchange_n(&engine->process, process, __ATOMIC_ACQ_REL) != process) {
		init_locks(engine);
		replace_pipe(engine);
	}
	return &engine->dev;
}

int engine_open(struct engine **engine)
{
	struct engine *new;
	int error = guard_install();

	if (error)
		return error;
	new = calloc(1, sizeof(*new));
	if (!new)
		return -ENOMEM;
	if (pipe2(new->pipe, O_CLOEXEC | O_NONBLOCK)) {
		error = -errno;
		free(new);
		return error;
	}
	new->process = getpid();
	pthread_mutex_init(&new->telling, NULL);
	vhm_dev_init(&new->dev, &limits);
	*engine = new;
	return 0;
}

void engine_close(struct engine *engine)
{
	vhm_dev_release(enter(engine));
	close(engine->pipe[0]);
	close(engine->pipe[1]);
	free(engine);
}

/* The look and what follows from it are one step, or the byte would tell of the past. */
void port_message_ready(struct vhm_dev *dev)
{
	struct engine *engine = container_of(dev, struct engine, dev);
	bool readable;
	char byte = 0;

	pthread_mutex_lock(&engine->telling);
	readable = vhm_dev_readable(dev);
	if (readable && !engine->told)
		engine->told = write(engine->pipe[1], &byte, 1) == 1;
	else if (!readable && engine->told)
		engine->told = read(engine->pipe[0], &byte, 1) != 1;
	pthread_mutex_unlock(&engine->telling);
}

/* To the core the file that a ring has already is nothing new; a settled ring reads it again. */
static void read_again(struct vhm_dev *dev, u64 address)
{
	struct vhost_vring_file file;
	struct vhm_queue *queue;

	if (port_copy_in(&file, address, sizeof(file)) || file.index >= VHM_QUEUES ||
	    file.fd == VHOST_FILE_UNBIND)
		return;
	queue = &dev->queue[file.index];
	port_lock(&queue->lock);
	if (queue->backend && backend_unsettle(queue->backend))
		port_work_queue(&queue->work);
	port_unlock(&queue->lock);
}

long engine_ioctl(struct engine *engine, unsigned int request, uint64_t address)
{
	struct vhm_dev *dev = enter(engine);
	long result = vhm_dev_ioctl(dev, request, address);

	if (request == VHOST_NET_SET_BACKEND && !result)
		read_again(dev, address);
	return result;
}

/* The device's lock is held. */
static int settle(struct vhm_queue *queue)
{
	const struct port_backend *parked = queue->dev->worker.parked;
	int left = 0;

	if (!port_worker_is_mine(&queue->dev->worker))
		return -EPERM;
	port_lock(&queue->lock);
	if (queue->backend) {
		backend_settle(queue->backend);
		left = backend_left(queue->backend);
	} else if (parked && parked->queue == queue) {
		left = backend_left(parked);
	}
	port_unlock(&queue->lock);
	return left;
}

int engine_settle(struct engine *engine, unsigned int index)
{
	struct vhm_dev *dev = enter(engine);
	int left;

	if (index >= VHM_QUEUES)
		return -ENOBUFS;
	port_lock(&dev->lock);
	left = settle(&dev->queue[index]);
	port_unlock(&dev->lock);
	return left;
}

long engine_read(struct engine *engine, uint64_t address, size_t length)
{
	return vhm_dev_read(enter(engine), address, length);
}

long engine_write(struct engine *engine, uint64_t address, size_t length)
{
	return vhm_dev_write(enter(engine), address, length);
}

int engine_fileno(struct engine *engine)
{
	enter(engine);
	return engine->pipe[0];
}

int engine_worker(const struct engine *engine)
{
	return port_worker_is_mine(&engine->dev.worker) ?
		       __atomic_load_n(&engine->dev.worker.tid, __ATOMIC_ACQUIRE) : 0;
}

int engine_stats(struct engine *engine, unsigned int queue, struct vhm_stats *stats)
{
	struct vhm_dev *dev = enter(engine);

	if (queue >= VHM_QUEUES)
		return -ENOBUFS;
	port_lock(&dev->queue[queue].lock);
	*stats = dev->queue[queue].stats;
	port_unlock(&dev->queue[queue].lock);
	return 0;
}
