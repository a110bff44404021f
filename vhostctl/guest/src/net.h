/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * virtio-net queues (virtio 1.2, section 5.1.6) over a driver ring: whole Ethernet frames in and
 * out, each behind a vnet header. A received one is kept beside its frame and means nothing until
 * it was checked; a frame that is sent has one that is zero, or the one that comes with it.
 */
#ifndef VHOSTCTL_GUEST_NET_H
#define VHOSTCTL_GUEST_NET_H

#include "vring.h"

#include <linux/virtio_net.h>
#include <sys/uio.h>

/* How frames of one direction are cut into buffers. */
struct net_shape {
	uint32_t header;	/* bytes of the vnet header: 10 or 12 */
	uint32_t limit;		/* longest frame, a VLAN tag included */
	uint32_t single;	/* longest frame that one segment holds; 0 if none does */
	uint32_t chain;		/* segments of the longest frame, or of each posted chain */
	uint32_t segments;	/* buffers per descriptor */
	bool split;		/* the header has a segment of its own */
	bool mergeable;		/* a received frame may span several buffers */
};

struct net_queue_config {
	uint64_t features;
	uint32_t buffer_size;
	uint32_t max_frame;
	uint16_t size;
	uint16_t base;
	bool receive;
	int kick, call;
	void *desc, *avail, *used, *arena;
	uint64_t arena_gpa;
};

struct net_stats {
	uint64_t frames, bytes;		/* without vnet headers */
	uint64_t errors;		/* frames dropped, and the fault if there is one */
	uint64_t kicks, calls;		/* eventfd signals sent and seen */
	uint64_t completed;		/* chains that the device has used */
	uint64_t in_flight;		/* chains that it still has */
};

struct net_queue {
	struct driver_ring ring;
	struct net_shape shape;
	uint64_t features;
	struct iovec *iov;		/* of the frames taken since the last refill */
	uint32_t iov_count;
	uint64_t frames, bytes, dropped;
};

/* A received frame where it lies in guest memory; valid until net_refill(). */
struct net_frame {
	const struct iovec *iov;
	uint32_t count;
	uint32_t len;
	struct virtio_net_hdr header;	/* as the device wrote it */
};

void net_shape(struct net_shape *s, uint64_t features, uint32_t buffer_size, uint32_t max_frame,
	       bool receive);
struct net_queue *net_queue_create(const struct net_queue_config *c);
void net_queue_destroy(struct net_queue *q);
void net_queue_stats(const struct net_queue *q, struct net_stats *s);

int net_reclaim(struct net_queue *q);
bool net_put(struct net_queue *q, const void *frame, uint32_t len);
bool net_put_received(struct net_queue *q, const struct net_frame *f,
		      const struct virtio_net_hdr *h);
int net_next(struct net_queue *q, struct net_frame *f);
uint32_t net_copy(const struct net_frame *f, uint8_t *to);
int net_refill(struct net_queue *q);
int net_start(struct net_queue *q);

/* Frames of the greatest length that a transmit queue takes now. */
static inline uint16_t net_room(const struct net_queue *q)
{
	return ring_room(&q->ring, q->shape.chain);
}

/*
 * Used entries worth an interrupt: three quarters of what the device has, so that a sender
 * sleeps through most of a ring and still refills it before the device runs dry.
 */
static inline uint16_t net_batch(const struct net_queue *q)
{
	uint16_t unused = (uint16_t)(q->ring.published - q->ring.used_idx);

	return (uint16_t)(unused - unused / 4);
}

/* Received entries worth an interrupt while frames flow: a quarter of what was posted. */
static inline uint16_t net_flow(const struct net_queue *q)
{
	uint16_t unused = (uint16_t)(q->ring.published - q->ring.used_idx);

	return unused / 4 ? unused / 4 : 1;
}

#endif
