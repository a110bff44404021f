/* SPDX-License-Identifier: GPL-2.0-only */
/* What the requests of a device share. */
#ifndef VHM_DEVICE_H
#define VHM_DEVICE_H

#include <linux/vhost.h>
#include "vhm.h"

/* Newer than the oldest headers that this is built with. */
#ifndef VHOST_FILE_UNBIND
#define VHOST_FILE_UNBIND -1
#endif

/* The event that a request names, NULL if it says that there is to be none. */
static inline int vhm_event_get(int fd, struct port_event **event)
{
	*event = NULL;
	return fd == VHOST_FILE_UNBIND ? 0 : port_event_get(fd, event);
}

/* The requests for the device as a whole; -ENOTTY for those that are not. */
long vhm_features_ioctl(struct vhm_dev *dev, unsigned int request, u64 uaddr);

/* Those for one ring, once the caller is known to be the owner. */
long vhm_vring_ioctl(struct vhm_dev *dev, unsigned int request, u64 uaddr);

long vhm_set_backend(struct vhm_dev *dev, u64 uaddr);

/* Stop the ring and let its backend go. */
void vhm_stop(struct vhm_dev *dev, struct vhm_queue *queue);

/* Whether memory and log of a queue can be what they were said to be. */
bool vhm_queue_log_ok(struct vhm_queue *queue, u64 log_base);
bool vhm_used_log_ok(const struct vhm_queue *queue, u64 log_base);

/* Every ring's lock, for what the worker reads. */
void vhm_lock_queues(struct vhm_dev *dev);
void vhm_unlock_queues(struct vhm_dev *dev);

#endif
