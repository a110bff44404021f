/* SPDX-License-Identifier: GPL-2.0-only */
/* Messages between the device and the VMM that serves its translations. */
#ifndef VHM_IOTLB_H
#define VHM_IOTLB_H

#include "vhm.h"

/* Ask for a translation of @iova; what cannot be asked is lost, as the request is retried. */
void vhm_iotlb_miss(struct vhm_queue *queue, u64 iova, u32 access);

/* Drop every message, read or not. */
void vhm_iotlb_clear(struct vhm_dev *dev);

#endif
