// SPDX-License-Identifier: GPL-2.0-only
/* Rings begin and end to run: NET_SET_BACKEND. */
#include <linux/virtio_config.h>
#include "device.h"
#include "iotlb.h"
#include "memory.h"
#include "ring.h"

bool vhm_used_log_ok(const struct vhm_queue *queue, u64 log_base)
{
	return queue->dev->iotlb || !queue->place.log_used ||
	       vhm_log_range_ok(log_base, queue->place.used_log, vhm_part_size(queue, VHM_USED));
}

bool vhm_queue_log_ok(struct vhm_queue *queue, u64 log_base)
{
	return vhm_table_ok(queue->dev->memory, log_base, vhm_has(queue, VHOST_F_LOG_ALL)) &&
	       vhm_used_log_ok(queue, log_base);
}

static bool queue_ok(struct vhm_queue *queue)
{
	return vhm_queue_log_ok(queue, queue->log_base) &&
	       (queue->dev->iotlb || vhm_ring_ok(queue));
}

static int start(struct vhm_queue *queue, struct port_backend *backend)
{
	int error;

	queue->backend = backend;
	if (!backend)
		return 0;
	error = vhm_ring_start(queue);
	if (error)
		return error;
	return port_poll_backend(&queue->backend_poll, backend, queue->index == VHM_TX);
}

/* Change what the ring is attached to; @backend is what is left over. */
static int attach(struct vhm_queue *queue, struct port_backend **backend)
{
	struct port_backend *old = queue->backend;
	int error;

	if (old && *backend && port_backend_same(old, *backend))
		return 0;
	port_poll_stop(&queue->backend_poll);
	error = start(queue, *backend);
	if (!error) {
		*backend = old;
		return 0;
	}
	queue->backend = old;
	if (old)
		port_poll_backend(&queue->backend_poll, old, queue->index == VHM_TX);
	return error;
}

void vhm_stop(struct vhm_dev *dev, struct vhm_queue *queue)
{
	struct port_backend *backend = NULL;

	port_lock(&queue->lock);
	attach(queue, &backend);
	port_unlock(&queue->lock);
	port_worker_flush(&dev->worker);
	port_backend_put(backend);
}

static long set_backend(struct vhm_dev *dev, const struct vhost_vring_file *file)
{
	struct vhm_queue *queue = &dev->queue[file->index & (VHM_QUEUES - 1)];
	struct port_backend *backend = NULL;
	int error = 0;

	if (file->fd == VHOST_FILE_UNBIND)
		vhm_iotlb_clear(dev);
	port_lock(&queue->lock);
	if (!queue_ok(queue))
		error = -EFAULT;
	else if (file->fd != VHOST_FILE_UNBIND)
		error = port_backend_get(file->fd, queue->index == VHM_TX, &backend);
	if (!error)
		error = attach(queue, &backend);
	port_unlock(&queue->lock);
	if (!backend)
		return error;
	if (!error)
		port_worker_flush(&dev->worker);
	port_backend_put(backend);
	return error;
}

long vhm_set_backend(struct vhm_dev *dev, u64 uaddr)
{
	struct vhost_vring_file file;
	long result;

	if (port_copy_in(&file, uaddr, sizeof(file)))
		return -EFAULT;
	port_lock(&dev->lock);
	if (!port_worker_is_mine(&dev->worker))
		result = -EPERM;
	else if (file.index >= VHM_QUEUES)
		result = -ENOBUFS;
	else
		result = set_backend(dev, &file);
	port_unlock(&dev->lock);
	return result;
}
