// SPDX-License-Identifier: GPL-2.0-only
/*
 * IOTLB messages.
 *
 * A miss is unread until read(2) takes it, and pending from then on until an
 * update covers it: only that wakes the ring that waits. How many a ring
 * may have is bounded, because each kick of one that cannot go on makes one; a ring with
 * so many has enough that will wake it.
 */
#include <linux/vhost_types.h>
#include "device.h"
#include "iotlb.h"
#include "memory.h"

#define VHM_MESSAGES_MAX	2048	/* of each ring */
#define VHM_MESSAGE_HEAD	8	/* type, hole or address space */

struct vhm_message {
	struct vhm_message *next;
	struct vhm_queue *queue;
	union {
		struct vhost_msg v1;
		struct vhost_msg_v2 v2;
		u8 bytes[VHM_MESSAGE];
	};
};

static struct vhost_iotlb_msg *body(struct vhm_message *message)
{
	return (struct vhost_iotlb_msg *)(message->bytes + VHM_MESSAGE_HEAD);
}

void vhm_iotlb_miss(struct vhm_queue *queue, u64 iova, u32 access)
{
	struct vhm_dev *dev = queue->dev;
	struct vhm_message *message;

	port_lock(&dev->message_lock);
	message = queue->messages < VHM_MESSAGES_MAX ? port_alloc(sizeof(*message)) : NULL;
	if (message) {
		message->queue = queue;
		if (dev->backend_features & 1ULL << VHOST_BACKEND_F_IOTLB_MSG_V2)
			message->v2.type = VHOST_IOTLB_MSG_V2;
		else
			message->v1.type = VHOST_IOTLB_MSG;
		body(message)->iova = iova;
		body(message)->perm = access;
		body(message)->type = VHOST_IOTLB_MISS;
		*dev->unread_end = message;
		dev->unread_end = &message->next;
		queue->messages++;
		queue->stats.misses++;
	}
	port_unlock(&dev->message_lock);
	if (message)
		port_message_ready(dev);
}

static void free_list(struct vhm_message *message)
{
	while (message) {
		struct vhm_message *next = message->next;

		port_free(message);
		message = next;
	}
}

void vhm_iotlb_clear(struct vhm_dev *dev)
{
	unsigned int i;

	port_lock(&dev->message_lock);
	free_list(dev->unread);
	free_list(dev->pending);
	dev->unread = NULL;
	dev->unread_end = &dev->unread;
	dev->pending = NULL;
	dev->clears++;
	for (i = 0; i < VHM_QUEUES; i++)
		dev->queue[i].messages = 0;
	port_unlock(&dev->message_lock);
	port_message_ready(dev);
}

bool vhm_dev_readable(struct vhm_dev *dev)
{
	bool readable;

	port_lock(&dev->message_lock);
	readable = dev->unread;
	port_unlock(&dev->message_lock);
	return readable;
}

bool vhm_dev_translates(struct vhm_dev *dev)
{
	bool translates;

	port_lock(&dev->lock);
	translates = dev->iotlb;
	port_unlock(&dev->lock);
	return translates;
}

long vhm_dev_read(struct vhm_dev *dev, u64 uaddr, size_t length)
{
	struct vhm_message *message;
	unsigned int clears;
	bool whole;

	if (length < VHM_MESSAGE)
		return 0;
	port_lock(&dev->message_lock);
	message = dev->unread;
	if (message)
		dev->unread = message->next;
	if (!dev->unread)
		dev->unread_end = &dev->unread;
	clears = dev->clears;
	port_unlock(&dev->message_lock);
	if (!message)
		return -EAGAIN;
	/* Without the lock: the reader's memory may keep us waiting, but not the worker. */
	whole = !port_copy_out(uaddr, message->bytes, VHM_MESSAGE);
	port_lock(&dev->message_lock);
	if (clears != dev->clears)
		message->queue->messages++;	/* the count began anew meanwhile */
	if (whole) {
		message->next = dev->pending;
		dev->pending = message;
	} else {
		message->queue->messages--;
		port_free(message);
	}
	port_unlock(&dev->message_lock);
	port_message_ready(dev);
	return whole ? VHM_MESSAGE : -EFAULT;
}

/* Wake the rings that wait for what [first, last] maps now. */
static void wake_pending(struct vhm_dev *dev, u64 first, u64 last)
{
	struct vhm_message **link = &dev->pending;
	struct vhm_message *message;

	port_lock(&dev->message_lock);
	while ((message = *link)) {
		u64 iova = body(message)->iova;

		if (iova < first || iova > last) {
			link = &message->next;
			continue;
		}
		port_work_queue(&message->queue->work);
		*link = message->next;
		message->queue->messages--;
		port_free(message);
	}
	port_unlock(&dev->message_lock);
}

static int update(struct vhm_dev *dev, const struct vhost_iotlb_msg *msg)
{
	u64 last = msg->iova + msg->size - 1;
	int error;

	if ((msg->perm & VHOST_ACCESS_RW) && !port_range_ok(msg->uaddr, msg->size))
		return -EFAULT;
	error = vhm_table_add(dev->iotlb, msg->iova, last, msg->uaddr, msg->perm,
			      dev->limits->iotlb_entries);
	if (error)
		return error;
	wake_pending(dev, msg->iova, last);
	return 0;
}

static int apply(struct vhm_dev *dev, const struct vhost_iotlb_msg *msg)
{
	unsigned int i;
	int error = -EFAULT;

	port_lock(&dev->lock);
	vhm_lock_queues(dev);
	if (dev->iotlb && msg->type == VHOST_IOTLB_UPDATE) {
		error = update(dev, msg);
	} else if (dev->iotlb && msg->type == VHOST_IOTLB_INVALIDATE) {
		vhm_table_remove(dev->iotlb, msg->iova, msg->iova + msg->size - 1);
		error = 0;
	}
	for (i = 0; i < VHM_QUEUES; i++)
		vhm_ring_forget(&dev->queue[i]);
	vhm_unlock_queues(dev);
	port_unlock(&dev->lock);
	return error ? -EFAULT : 0;
}

long vhm_dev_write(struct vhm_dev *dev, u64 uaddr, size_t length)
{
	struct vhm_message message;
	struct vhost_iotlb_msg *msg = body(&message);
	int error;

	if (length < VHM_MESSAGE_HEAD + sizeof(*msg))
		return -EINVAL;
	if (port_copy_in(message.bytes, uaddr, VHM_MESSAGE_HEAD + sizeof(*msg)))
		return -EINVAL;
	if (message.v2.type != VHOST_IOTLB_MSG && message.v2.type != VHOST_IOTLB_MSG_V2)
		return -EINVAL;
	if (msg->type == VHOST_IOTLB_UPDATE && !msg->size)
		return -EINVAL;
	error = apply(dev, msg);
	return error ?: VHM_MESSAGE;
}
