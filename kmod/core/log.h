/* SPDX-License-Identifier: GPL-2.0-only */
/* The dirty log: a bit for each 4096 bytes of guest memory that the device wrote. */
#ifndef VHM_LOG_H
#define VHM_LOG_H

#include "vhm.h"

/* @length bytes of the used ring from @offset on were written. */
void vhm_log_ring(struct vhm_queue *queue, u64 offset, u64 length);

/* As many of @length bytes of a frame as the chain's @logs or its @count pieces hold. */
void vhm_log_frame(struct vhm_queue *queue, unsigned int logs, unsigned int count, u64 length);

/* Wake whoever waits for the log. */
void vhm_log_signal(struct vhm_queue *queue);

#endif
