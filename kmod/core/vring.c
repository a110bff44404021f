// SPDX-License-Identifier: GPL-2.0-only
/* The requests for one ring. */
#include <linux/virtio_config.h>
#include "device.h"
#include "memory.h"
#include "ring.h"

static long set_num(struct vhm_queue *queue, u64 uaddr)
{
	struct vhost_vring_state state;

	if (queue->backend)
		return -EBUSY;
	if (port_copy_in(&state, uaddr, sizeof(state)))
		return -EFAULT;
	if (!state.num || state.num > VHM_NUM_MAX || state.num & (state.num - 1))
		return -EINVAL;
	queue->num = state.num;
	vhm_ring_forget(queue);
	return 0;
}

static long set_base(struct vhm_queue *queue, u64 uaddr)
{
	struct vhost_vring_state state;

	if (queue->backend)
		return -EBUSY;
	if (port_copy_in(&state, uaddr, sizeof(state)))
		return -EFAULT;
	if (state.num > 0xffff)
		return -EINVAL;
	queue->last_avail = state.num;
	queue->avail_seen = state.num;
	queue->in_order_head = state.num;
	return 0;
}

static long get_base(struct vhm_queue *queue, u64 uaddr)
{
	struct vhost_vring_state state = { queue->index, queue->last_avail };

	return port_copy_out(uaddr, &state, sizeof(state));
}

static long set_addr(struct vhm_queue *queue, u64 uaddr)
{
	struct vhm_place old = queue->place;
	struct vhost_vring_addr addr;

	if (port_copy_in(&addr, uaddr, sizeof(addr)))
		return -EFAULT;
	if (addr.flags & ~(1U << VHOST_VRING_F_LOG))
		return -EOPNOTSUPP;
	if (addr.avail_user_addr % 2 || addr.used_user_addr % 4 || addr.log_guest_addr % 4)
		return -EINVAL;
	queue->place = (struct vhm_place) {
		.part[VHM_DESC] = addr.desc_user_addr,
		.part[VHM_AVAIL] = addr.avail_user_addr,
		.part[VHM_USED] = addr.used_user_addr,
		.used_log = addr.log_guest_addr,
		.log_used = addr.flags & 1U << VHOST_VRING_F_LOG,
	};
	if (queue->backend && !queue->dev->iotlb &&
	    (!vhm_ring_ok(queue) || !vhm_used_log_ok(queue, queue->log_base))) {
		queue->place = old;
		return -EINVAL;
	}
	vhm_ring_forget(queue);
	return 0;
}

/* True in @flush if the worker may still run for the kick that went. */
static long set_kick(struct vhm_queue *queue, u64 uaddr, bool *flush)
{
	struct vhost_vring_file file;
	struct port_kick *kick = NULL;
	struct port_kick *old = queue->kick;
	long result = 0;

	if (port_copy_in(&file, uaddr, sizeof(file)))
		return -EFAULT;
	if (file.fd != VHOST_FILE_UNBIND)
		result = port_kick_get(file.fd, &kick);
	if (result)
		return result;
	if (kick && old && port_kick_same(kick, old)) {
		port_kick_put(kick);
		return 0;
	}
	port_poll_stop(&queue->kick_poll);
	queue->kick = kick;
	port_kick_put(old);
	*flush = old;
	return kick ? port_poll_kick(&queue->kick_poll, kick) : 0;
}

static long set_event(struct port_event **place, u64 uaddr)
{
	struct vhost_vring_file file;
	struct port_event *event;
	int error;

	if (port_copy_in(&file, uaddr, sizeof(file)))
		return -EFAULT;
	error = vhm_event_get(file.fd, &event);
	if (error)
		return error;
	port_event_put(*place);
	*place = event;
	return 0;
}

static long set_busyloop(struct vhm_queue *queue, u64 uaddr)
{
	struct vhost_vring_state state;

	if (port_copy_in(&state, uaddr, sizeof(state)))
		return -EFAULT;
	queue->busyloop = state.num;
	return 0;
}

static long get_busyloop(struct vhm_queue *queue, u64 uaddr)
{
	struct vhost_vring_state state = { queue->index, queue->busyloop };

	return port_copy_out(uaddr, &state, sizeof(state));
}

static long answer(struct vhm_queue *queue, unsigned int request, u64 uaddr, bool *flush)
{
	switch (request) {
	case VHOST_SET_VRING_NUM:
		return set_num(queue, uaddr);
	case VHOST_SET_VRING_BASE:
		return set_base(queue, uaddr);
	case VHOST_GET_VRING_BASE:
		return get_base(queue, uaddr);
	case VHOST_SET_VRING_ADDR:
		return set_addr(queue, uaddr);
	case VHOST_SET_VRING_KICK:
		return set_kick(queue, uaddr, flush);
	case VHOST_SET_VRING_CALL:
		return set_event(&queue->call, uaddr);
	case VHOST_SET_VRING_ERR:
		return set_event(&queue->err, uaddr);
	case VHOST_SET_VRING_BUSYLOOP_TIMEOUT:
		return set_busyloop(queue, uaddr);
	case VHOST_GET_VRING_BUSYLOOP_TIMEOUT:
		return get_busyloop(queue, uaddr);
	default:
		return -ENOTTY;
	}
}

long vhm_vring_ioctl(struct vhm_dev *dev, unsigned int request, u64 uaddr)
{
	struct vhm_queue *queue;
	bool flush = false;
	long result;
	u32 index;

	if (port_copy_in(&index, uaddr, sizeof(index)))
		return -EFAULT;
	if (index >= VHM_QUEUES)
		return -ENOBUFS;
	/* The mask holds where a mispredicted branch does not. */
	queue = &dev->queue[index & (VHM_QUEUES - 1)];
	port_lock(&queue->lock);
	result = answer(queue, request, uaddr, &flush);
	port_unlock(&queue->lock);
	if (flush)
		port_worker_flush(&dev->worker);
	return result;
}
