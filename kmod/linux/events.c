// SPDX-License-Identifier: GPL-2.0-only
/* Eventfds, and files that wake the worker as they wake poll(2). */
#include <linux/err.h>
#include <linux/eventfd.h>
#include <linux/file.h>
#include <linux/ptr_ring.h>
#include "mirror.h"

/* From the wait queue of what is watched, under its lock and in any context. */
static int became_ready(wait_queue_entry_t *entry, unsigned int mode, int flags, void *key)
{
	struct port_poll *poll = container_of(entry, struct port_poll, entry);

	if (key_to_poll(key) & poll->events) {
		poll->wakes++;
		port_work_queue(poll->work);
	}
	return 0;
}

static void add_to_queue(struct file *file, wait_queue_head_t *head, poll_table *table)
{
	struct port_poll *poll = container_of(table, struct port_poll, table);

	/* Eventfds and sockets have one queue; who had two would be heard on the first. */
	if (poll->watching)
		return;
	poll->head = head;
	poll->watching = true;
	add_wait_queue(head, &poll->entry);
}

void port_poll_init(struct port_poll *poll, struct port_work *work)
{
	memset(poll, 0, sizeof(*poll));
	poll->work = work;
	init_waitqueue_func_entry(&poll->entry, became_ready);
	init_poll_funcptr(&poll->table, add_to_queue);
}

int mirror_watch(struct port_poll *poll, struct file *file, struct ptr_ring *ring, __poll_t events)
{
	__poll_t ready;

	port_poll_stop(poll);
	poll->file = file;
	poll->ring = ring;
	poll->events = events;
	ready = vfs_poll(file, &poll->table);
	if (ready & EPOLLERR) {
		port_poll_stop(poll);
		return -EINVAL;
	}
	if (ready & events)
		port_work_queue(poll->work);
	return 0;
}

int port_poll_kick(struct port_poll *poll, struct port_kick *kick)
{
	return mirror_watch(poll, (struct file *)kick, NULL, EPOLLIN);
}

void port_poll_pause(struct port_poll *poll)
{
	if (!poll->watching)
		return;
	poll->watching = false;
	remove_wait_queue(poll->head, &poll->entry);
}

/* Frames wait in the ring, and asking it is much cheaper than asking the file. */
static bool is_ready(const struct port_poll *poll)
{
	if (poll->ring)
		return !ptr_ring_empty(poll->ring);
	return vfs_poll(poll->file, NULL) & poll->events;
}

void port_poll_resume(struct port_poll *poll)
{
	if (!poll->head || poll->watching)
		return;
	poll->watching = true;
	add_wait_queue(poll->head, &poll->entry);
	/* Who made it ready before saw nobody wait. */
	smp_mb();
	if (is_ready(poll))
		port_work_queue(poll->work);
}

void port_poll_stop(struct port_poll *poll)
{
	port_poll_pause(poll);
	poll->head = NULL;
}

int port_event_get(int fd, struct port_event **event)
{
	struct eventfd_ctx *context = eventfd_ctx_fdget(fd);

	if (IS_ERR(context))
		return PTR_ERR(context);
	*event = (struct port_event *)context;
	return 0;
}

void port_event_put(struct port_event *event)
{
	if (event)
		eventfd_ctx_put((struct eventfd_ctx *)event);
}

void port_event_signal(struct port_event *event)
{
	vhm_eventfd_signal((struct eventfd_ctx *)event);
}

int port_kick_get(int fd, struct port_kick **kick)
{
	struct file *file = eventfd_fget(fd);

	if (IS_ERR(file))
		return PTR_ERR(file);
	*kick = (struct port_kick *)file;
	return 0;
}

void port_kick_put(struct port_kick *kick)
{
	if (kick)
		fput((struct file *)kick);
}

bool port_kick_same(const struct port_kick *a, const struct port_kick *b)
{
	return a == b;
}
