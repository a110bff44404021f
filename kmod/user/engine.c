// SPDX-License-Identifier: GPL-2.0-only
/* The device and the descriptor that tells of its messages. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "engine.h"
#include "user.h"

struct engine {
	struct vhm_dev dev;
	pid_t process;		/* atomic: whose locks these are */
	int pipe[2];		/* one byte in it while a message waits */
	bool told;		/* atomic: the byte is in it */
};

/* As the in-tree module's parameters are unless they are set. */
static const struct vhm_limits limits = {
	.mem_regions = 64,
	.iotlb_entries = 2048,
	.fork_from_owner = true,
};

static void init_locks(struct vhm_dev *dev)
{
	unsigned int i;

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

	engine->told = true;
	if (pipe2(own, O_CLOEXEC | O_NONBLOCK))
		return;
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
		init_locks(&engine->dev);
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

void port_message_ready(struct vhm_dev *dev)
{
	struct engine *engine = container_of(dev, struct engine, dev);

	/* A pipe that is full says what we wanted to say. */
	if (!__atomic_exchange_n(&engine->told, true, __ATOMIC_ACQ_REL) &&
	    write(engine->pipe[1], "", 1) < 0)
		return;
}

/* Messages were read or dropped: the byte goes with the last of them. */
static void tell(struct engine *engine)
{
	char byte;

	if (!__atomic_load_n(&engine->told, __ATOMIC_ACQUIRE) || vhm_dev_readable(&engine->dev))
		return;
	if (__atomic_exchange_n(&engine->told, false, __ATOMIC_ACQ_REL) &&
	    read(engine->pipe[0], &byte, 1) < 0)
		return;
	/* One may have come between the look and the read. */
	if (vhm_dev_readable(&engine->dev))
		port_message_ready(&engine->dev);
}

long engine_ioctl(struct engine *engine, unsigned int request, uint64_t address)
{
	long result = vhm_dev_ioctl(enter(engine), request, address);

	tell(engine);
	return result;
}

long engine_read(struct engine *engine, uint64_t address, size_t length)
{
	long result = vhm_dev_read(enter(engine), address, length);

	tell(engine);
	return result;
}

long engine_write(struct engine *engine, uint64_t address, size_t length)
{
	return vhm_dev_write(enter(engine), address, length);
}

int engine_fileno(const struct engine *engine)
{
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
