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

/* Feature bits 0 to 63 and 64 to 127 that the device offers. */
extern const u64 vhm_features[2];

/* Acknowledge: 0, -EOPNOTSUPP for what is not offered, -EFAULT. */
long vhm_set_features(struct vhm_dev *dev, u64 low, u64 high);

/* The requests for the device as a whole; -ENOTTY for those that are not. */
long vhm_features_ioctl(struct vhm_dev *dev, unsigned int request, u64 uaddr);

/* Those for one ring, once the caller is known to be the owner. */
long vhm_vring_ioctl(struct vhm_dev *dev, unsigned int request, u64 uaddr);

long vhm_set_backend(struct vhm_dev *dev, u64 uaddr);

/* Stop the ring and let its backend go. */
void vhm_stop(struct vhm_dev *dev, struct vhm_queue *queue);

/* Whether memory, log and ring of a queue can be what they were said to be. */
bool vhm_queue_ok(struct vhm_queue *queue);
bool vhm_queue_log_ok(struct vhm_queue *queue, u64 log_base);
bool vhm_used_log_ok(const struct vhm_queue *queue, u64 log_base);

/* Every ring's lock, for what the worker reads. */
void vhm_lock_queues(struct vhm_dev *dev);
void vhm_unlock_queues(struct vhm_dev *dev);

#endif
