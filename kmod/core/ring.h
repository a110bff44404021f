/* SPDX-License-Identifier: GPL-2.0-only */
/* The split virtqueue as the device sees it (virtio 1.2, section 2.7). */
#ifndef VHM_RING_H
#define VHM_RING_H

#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include "vhm.h"

static inline bool vhm_has(const struct vhm_queue *queue, unsigned int bit)
{
	return queue->features & 1ULL << bit;
}

static inline u16 vhm_from_ring16(const struct vhm_queue *queue, u16 value)
{
	return likely(queue->little_endian) ? __le16_to_cpu((__force __le16)value) : value;
}

static inline u16 vhm_to_ring16(const struct vhm_queue *queue, u16 value)
{
	return likely(queue->little_endian) ? (__force u16)__cpu_to_le16(value) : value;
}

static inline u32 vhm_to_ring32(const struct vhm_queue *queue, u32 value)
{
	return likely(queue->little_endian) ? (__force u32)__cpu_to_le32(value) : value;
}

/* Tell whoever watches the queue's error eventfd, and count @error by its cause. */
void vhm_ring_error(struct vhm_queue *queue, u64 *cause);

/*
 * Take the next chain that the driver made available, its pieces at queue->iov
 * from @used on, and with @logs the places that it lets the device write, from
 * log @logged on. Returns 1, 0 if there is none, -EAGAIN if a translation is
 * missing, or an error that was told to the driver's VMM.
 */
int vhm_ring_take(struct vhm_queue *queue, struct vhm_chain *chain, unsigned int used,
		  bool logs, unsigned int logged);

/* Give the last @chains chains back, which had @descriptors together: they come next again. */
static inline void vhm_ring_untake(struct vhm_queue *queue, u16 chains, u16 descriptors)
{
	queue->last_avail -= chains;
	queue->in_order_head -= descriptors;
}

/* Whether the driver made more available than was seen; false if that cannot be read. */
bool vhm_ring_more(struct vhm_queue *queue);

/*
 * Publish @count heads as used and signal if the driver asked to be. With
 * IN_ORDER each head stands for @buffers[i] buffers, otherwise @buffers is not read.
 */
void vhm_ring_used(struct vhm_queue *queue, const union vhm_used *heads, const u16 *buffers,
		   unsigned int count);

/*
 * Ask the driver not to kick, or to kick from now on. True if something was made
 * available meanwhile, so that the ring must be looked at once more.
 */
void vhm_ring_quiet(struct vhm_queue *queue);
bool vhm_ring_listen(struct vhm_queue *queue);

/* Take up a ring where memory says it stands: 0 or -EFAULT. */
int vhm_ring_start(struct vhm_queue *queue);

/* Whether the ring's parts can be memory. */
bool vhm_ring_ok(const struct vhm_queue *queue);

#endif
