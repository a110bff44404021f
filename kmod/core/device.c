// SPDX-License-Identifier: GPL-2.0-only
/* A device's life: owner, memory table, log, and who answers which request. */
#include <linux/virtio_config.h>
#include "device.h"
#include "iotlb.h"
#include "memory.h"
#include "net.h"
#include "ring.h"

/* Newer than the oldest headers that this is built with. */
#ifndef VHOST_SET_FORK_FROM_OWNER
#define VHOST_SET_FORK_FROM_OWNER _IOW(VHOST_VIRTIO, 0x84, __u8)
#define VHOST_GET_FORK_FROM_OWNER _IOR(VHOST_VIRTIO, 0x85, __u8)
#endif

void vhm_lock_queues(struct vhm_dev *dev)
{
	unsigned int i;

	for (i = 0; i < VHM_QUEUES; i++)
		port_lock(&dev->queue[i].lock);
}

void vhm_unlock_queues(struct vhm_dev *dev)
{
	unsigned int i;

	for (i = VHM_QUEUES; i--;)
		port_unlock(&dev->queue[i].lock);
}

static void free_buffers(struct vhm_queue *queue)
{
	port_free(queue->iov);
	port_free(queue->table_iov);
	port_free(queue->log);
	port_free(queue->heads);
	port_free(queue->head_buffers);
	queue->iov = NULL;
	queue->table_iov = NULL;
	queue->log = NULL;
	queue->heads = NULL;
	queue->head_buffers = NULL;
}

static int alloc_buffers(struct vhm_queue *queue)
{
	queue->iov = port_alloc(VHM_SEGMENTS * sizeof(*queue->iov));
	queue->table_iov = port_alloc(VHM_TABLE_PARTS * sizeof(*queue->table_iov));
	queue->log = port_alloc(VHM_HEADS * sizeof(*queue->log));
	queue->heads = port_alloc(VHM_HEADS * sizeof(*queue->heads));
	queue->head_buffers = port_alloc(VHM_HEADS * sizeof(*queue->head_buffers));
	if (queue->iov && queue->table_iov && queue->log && queue->heads && queue->head_buffers)
		return 0;
	free_buffers(queue);
	return -ENOMEM;
}

/* Everything that a request can set, as it was before the first one. */
static void reset_queue(struct vhm_queue *queue)
{
	port_kick_put(queue->kick);
	port_event_put(queue->call);
	port_event_put(queue->err);
	free_buffers(queue);
	queue->kick = NULL;
	queue->call = NULL;
	queue->err = NULL;
	queue->num = 1;
	memset(&queue->place, 0, sizeof(queue->place));
	memset(queue->direct, 0, sizeof(queue->direct));
	queue->log_base = 0;
	queue->busyloop = 0;
	queue->features = 0;
	queue->features_high = 0;
	queue->header_own = 0;
	queue->header_backend = 0;
	queue->avail_seen = 0;
	queue->last_avail = 0;
	queue->last_used = 0;
	queue->in_order_head = 0;
	queue->used_flags = 0;
	queue->signalled_valid = false;
	queue->done = 0;
}

static void reset(struct vhm_dev *dev)
{
	unsigned int i;

	for (i = 0; i < VHM_QUEUES; i++) {
		vhm_stop(dev, &dev->queue[i]);
		port_poll_stop(&dev->queue[i].kick_poll);
	}
	port_worker_stop(&dev->worker);
	for (i = 0; i < VHM_QUEUES; i++)
		reset_queue(&dev->queue[i]);
	port_event_put(dev->log_event);
	dev->log_event = NULL;
	vhm_table_free(dev->memory);
	vhm_table_free(dev->iotlb);
	dev->memory = NULL;
	dev->iotlb = NULL;
	dev->as_task = dev->limits->fork_from_owner;
	dev->backend_features = 0;
	vhm_iotlb_clear(dev);
}

void vhm_dev_init(struct vhm_dev *dev, const struct vhm_limits *limits)
{
	unsigned int i;

	memset(dev, 0, sizeof(*dev));
	dev->limits = limits;
	dev->as_task = limits->fork_from_owner;
	dev->unread_end = &dev->unread;
	port_lock_init(&dev->lock);
	port_lock_init(&dev->message_lock);
	for (i = 0; i < VHM_QUEUES; i++) {
		struct vhm_queue *queue = &dev->queue[i];

		queue->dev = dev;
		queue->index = i;
		queue->num = 1;
		port_lock_init(&queue->lock);
		port_work_init(&queue->work, &dev->worker, queue);
		port_poll_init(&queue->kick_poll, &queue->work);
		port_poll_init(&queue->backend_poll, &queue->work);
	}
}

void vhm_dev_release(struct vhm_dev *dev)
{
	reset(dev);
}

static long set_owner(struct vhm_dev *dev)
{
	unsigned int i;
	int error = 0;

	if (port_worker_owned(&dev->worker))
		return -EBUSY;
	for (i = 0; i < VHM_QUEUES && !error; i++)
		error = alloc_buffers(&dev->queue[i]);
	if (!error)
		error = port_worker_start(&dev->worker, dev->as_task);
	for (i = 0; i < VHM_QUEUES && error; i++)
		free_buffers(&dev->queue[i]);
	return error;
}

static long reset_owner(struct vhm_dev *dev)
{
	struct vhm_table *empty;

	if (!port_worker_is_mine(&dev->worker))
		return -EPERM;
	empty = vhm_table_new();
	if (!empty)
		return -ENOMEM;
	reset(dev);
	dev->memory = empty;
	return 0;
}

static int fill_table(struct vhm_table *table, u64 uaddr, u32 count)
{
	struct vhost_memory_region *regions;
	int error = 0;
	u32 i;

	regions = port_alloc((count + 1) * sizeof(*regions));
	if (!regions)
		return -ENOMEM;
	if (port_copy_in(regions, uaddr, count * sizeof(*regions)))
		error = -EFAULT;
	for (i = 0; i < count && !error; i++)
		error = vhm_table_add(table, regions[i].guest_phys_addr,
				      regions[i].guest_phys_addr + regions[i].memory_size - 1,
				      regions[i].userspace_addr, VHOST_ACCESS_RW, 0);
	port_free(regions);
	return error;
}

static long swap_table(struct vhm_dev *dev, struct vhm_table **table)
{
	struct vhm_table *old = dev->memory;
	long result = 0;
	unsigned int i;

	vhm_lock_queues(dev);
	for (i = 0; i < VHM_QUEUES; i++) {
		struct vhm_queue *queue = &dev->queue[i];

		if (queue->backend && !vhm_table_ok(*table, queue->log_base,
						    vhm_has(queue, VHOST_F_LOG_ALL)))
			result = -EFAULT;
	}
	if (!result) {
		dev->memory = *table;
		*table = old;
	}
	vhm_unlock_queues(dev);
	return result;
}

static long set_mem_table(struct vhm_dev *dev, u64 uaddr)
{
	struct vhost_memory header;
	struct vhm_table *table;
	long result;

	if (port_copy_in(&header, uaddr, sizeof(header)))
		return -EFAULT;
	if (header.padding)
		return -EOPNOTSUPP;
	if (header.nregions > dev->limits->mem_regions)
		return -E2BIG;
	if (dev->limits->iotlb_entries <= 0)
		return -EINVAL;
	table = vhm_table_new();
	if (!table)
		return -ENOMEM;
	result = fill_table(table, uaddr + sizeof(header), header.nregions);
	if (!result)
		result = swap_table(dev, &table);
	vhm_table_free(table);
	return result;
}

static long set_log_base(struct vhm_dev *dev, u64 uaddr)
{
	long result = 0;
	unsigned int i;
	u64 base;

	if (port_copy_in(&base, uaddr, sizeof(base)))
		return -EFAULT;
	/* Each ring for itself, as the reference does: one may refuse what the other takes. */
	for (i = 0; i < VHM_QUEUES; i++) {
		struct vhm_queue *queue = &dev->queue[i];

		port_lock(&queue->lock);
		if (queue->backend && !vhm_queue_log_ok(queue, base))
			result = -EFAULT;
		else
			queue->log_base = base;
		port_unlock(&queue->lock);
	}
	return result;
}

static long set_log_fd(struct vhm_dev *dev, u64 uaddr)
{
	struct port_event *event;
	struct port_event *old;
	int error;
	int fd;

	if (port_copy_in(&fd, uaddr, sizeof(fd)))
		return -EFAULT;
	error = vhm_event_get(fd, &event);
	if (error)
		return error;
	vhm_lock_queues(dev);
	old = dev->log_event;
	dev->log_event = event;
	vhm_unlock_queues(dev);
	port_event_put(old);
	return 0;
}

static long set_fork(struct vhm_dev *dev, u64 uaddr)
{
	u8 value;

	if (port_worker_owned(&dev->worker))
		return -EBUSY;
	if (port_copy_in(&value, uaddr, sizeof(value)))
		return -EFAULT;
	if (value > 1)
		return -EINVAL;
	dev->as_task = value;
	return 0;
}

static long get_fork(struct vhm_dev *dev, u64 uaddr)
{
	u8 value = dev->as_task;

	return port_copy_out(uaddr, &value, sizeof(value));
}

/* -ENOTTY for what may still be a request for a ring. */
static long owner_ioctl(struct vhm_dev *dev, unsigned int request, u64 uaddr)
{
	if (request == VHOST_SET_FORK_FROM_OWNER && port_worker_choice())
		return set_fork(dev, uaddr);
	if (request == VHOST_GET_FORK_FROM_OWNER && port_worker_choice())
		return get_fork(dev, uaddr);
	if (!port_worker_is_mine(&dev->worker))
		return -EPERM;
	switch (request) {
	case VHOST_SET_MEM_TABLE:
		return set_mem_table(dev, uaddr);
	case VHOST_SET_LOG_BASE:
		return set_log_base(dev, uaddr);
	case VHOST_SET_LOG_FD:
		return set_log_fd(dev, uaddr);
	default:
		return -ENOTTY;
	}
}

long vhm_dev_ioctl(struct vhm_dev *dev, unsigned int request, u64 uaddr)
{
	long result;

	if (request == VHOST_NET_SET_BACKEND)
		return vhm_set_backend(dev, uaddr);
	result = vhm_features_ioctl(dev, request, uaddr);
	if (result != -ENOTTY)
		return result;
	port_lock(&dev->lock);
	if (request == VHOST_SET_OWNER) {
		result = set_owner(dev);
	} else if (request == VHOST_RESET_OWNER) {
		result = reset_owner(dev);
	} else {
		result = owner_ioctl(dev, request, uaddr);
		if (result == -ENOTTY)
			result = vhm_vring_ioctl(dev, request, uaddr);
		else
			port_worker_flush(&dev->worker);
	}
	port_unlock(&dev->lock);
	return result;
}

void vhm_queue_run(struct vhm_queue *queue)
{
	port_lock(&queue->lock);
	if (queue->backend && vhm_ring_locate(queue)) {
		queue->stats.runs++;
		port_trace_run(queue);
		port_poll_pause(&queue->backend_poll);
		vhm_ring_quiet(queue);
		if (queue->index == VHM_TX)
			vhm_transmit(queue);
		else
			vhm_receive(queue);
	}
	port_unlock(&queue->lock);
}
