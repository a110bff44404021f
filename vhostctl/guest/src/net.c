// SPDX-License-Identifier: GPL-2.0-or-later
#include "net.h"

#include <errno.h>
#include <linux/virtio_config.h>
#include <stdlib.h>
#include <string.h>

#define VLAN_TAG 4u

static bool has(uint64_t features, unsigned int bit)
{
	return features >> bit & 1;
}

static uint32_t div_up(uint32_t n, uint32_t by)
{
	return (n + by - 1) / by;
}

void net_shape(struct net_shape *s, uint64_t features, uint32_t buffer_size, uint32_t max_frame,
	       bool receive)
{
	bool modern = has(features, VIRTIO_F_VERSION_1);
	bool merge = has(features, VIRTIO_NET_F_MRG_RXBUF);

	*s = (struct net_shape){
		.header = modern || merge ? sizeof(struct virtio_net_hdr_mrg_rxbuf) :
					    sizeof(struct virtio_net_hdr),
		.limit = max_frame + VLAN_TAG,
		.mergeable = receive && merge,
	};
	/* Legacy framing: without ANY_LAYOUT the header is a descriptor of its own (5.1.6.6). */
	s->split = !modern && !has(features, VIRTIO_F_ANY_LAYOUT) && !s->mergeable;
	s->single = s->split ? 0 : buffer_size - s->header;
	if (s->mergeable)
		s->chain = 1;
	else if (s->split)
		s->chain = 1 + div_up(s->limit, buffer_size);
	else
		s->chain = div_up(s->header + s->limit, buffer_size);
	s->segments = has(features, VIRTIO_RING_F_INDIRECT_DESC) ? s->chain : 1;
}

struct net_queue *net_queue_create(const struct net_queue_config *c)
{
	struct net_queue *q = calloc(1, sizeof(*q));

	if (!q)
		return NULL;
	q->features = c->features;
	net_shape(&q->shape, c->features, c->buffer_size, c->max_frame, c->receive);
	const struct ring_config ring = {
		.desc = c->desc,
		.avail = c->avail,
		.used = c->used,
		.arena = c->arena,
		.arena_gpa = c->arena_gpa,
		.buffer_size = c->buffer_size,
		.segments = q->shape.segments,
		.size = c->size,
		.base = c->base,
		.kick = c->kick,
		.call = c->call,
		.event_idx = has(c->features, VIRTIO_RING_F_EVENT_IDX),
	};
	if (ring_init(&q->ring, &ring) < 0) {
		free(q);
		return NULL;
	}
	if (c->receive) {
		q->iov = calloc((size_t)c->size * q->shape.segments, sizeof(*q->iov));
		if (!q->iov) {
			net_queue_destroy(q);
			return NULL;
		}
	}
	return q;
}

void net_queue_destroy(struct net_queue *q)
{
	ring_deinit(&q->ring);
	free(q->iov);
	free(q);
}

void net_queue_stats(const struct net_queue *q, struct net_stats *s)
{
	s->frames = counter_read(&q->frames);
	s->bytes = counter_read(&q->bytes);
	s->errors = counter_read(&q->dropped) + counter_read(&q->ring.faults);
	s->kicks = counter_read(&q->ring.kicks);
	s->calls = counter_read(&q->ring.calls);
	s->in_flight = ring_unused(&q->ring, &s->completed);
}

/* Take back all buffers that the device has used; returns 0 or -EPROTO. */
int net_reclaim(struct net_queue *q)
{
	int pending = ring_pending(&q->ring);
	uint32_t len;

	for (; pending > 0; pending--)
		if (ring_take(&q->ring, &len) < 0)
			return -EPROTO;
	return pending;
}

/*
 * Lay a frame over a chain of `total` segments, the first of which holds the header and `first`
 * bytes. Inlined twice: nearly all frames are one segment, and cost half as much for that.
 */
static inline __attribute__((always_inline)) bool put(struct net_queue *q, const uint8_t *frame,
						       uint32_t len, uint32_t first, uint32_t total)
{
	const uint32_t header = q->shape.header;
	uint32_t done = first;
	struct ring_chain c;
	uint8_t *to;

	if (!ring_room(&q->ring, total))
		return false;
	ring_chain_begin(&q->ring, &c, total, 0);
	to = ring_chain_add(&q->ring, &c, header + first);
	/* A legacy header is shorter, but the frame is written after it. */
	memset(to, 0, sizeof(struct virtio_net_hdr_mrg_rxbuf));
	memcpy(to + header, frame, first);
	while (total > 1 && done < len) {
		uint32_t n = len - done < q->ring.buffer_size ? len - done : q->ring.buffer_size;

		memcpy(ring_chain_add(&q->ring, &c, n), frame + done, n);
		done += n;
	}
	ring_chain_end(&q->ring, &c);
	counter_add(&q->frames, 1);
	counter_add(&q->bytes, len);
	return true;
}

static __attribute__((noinline)) bool put_long(struct net_queue *q, const void *frame,
					       uint32_t len)
{
	uint32_t rest = len - q->shape.single;

	return put(q, frame, len, q->shape.single, 1 + div_up(rest, q->ring.buffer_size));
}

/* Queue a frame of 1 to shape.limit bytes for the next ring_publish(); false: no room. */
bool net_put(struct net_queue *q, const void *frame, uint32_t len)
{
	return len <= q->shape.single ? put(q, frame, len, len, 1) : put_long(q, frame, len);
}

/* Where in the segments of a frame a copy stands. */
struct cursor {
	const struct iovec *iov;
	size_t done;			/* bytes of the first one */
};

static void copy(uint8_t *to, struct cursor *from, size_t len)
{
	while (len) {
		size_t n = from->iov->iov_len - from->done;

		if (n > len)
			n = len;
		memcpy(to, (const uint8_t *)from->iov->iov_base + from->done, n);
		to += n;
		len -= n;
		from->done += n;
		if (from->done == from->iov->iov_len)
			*from = (struct cursor){.iov = from->iov + 1};
	}
}

/* Queue a received frame of 1 to shape.limit bytes behind `h`, as net_put() does. */
bool net_put_received(struct net_queue *q, const struct net_frame *f,
		      const struct virtio_net_hdr *h)
{
	const struct net_shape *s = &q->shape;
	const uint32_t size = q->ring.buffer_size;
	uint32_t n = f->len < s->single ? f->len : s->single;
	uint32_t total = 1 + div_up(f->len - n, size);
	struct cursor from = {.iov = f->iov};
	struct ring_chain c;
	uint8_t *to;

	if (!ring_room(&q->ring, total))
		return false;
	ring_chain_begin(&q->ring, &c, total, 0);
	to = ring_chain_add(&q->ring, &c, s->header + n);
	memset(to, 0, sizeof(struct virtio_net_hdr_mrg_rxbuf));
	memcpy(to, h, sizeof(*h));
	copy(to + s->header, &from, n);
	for (uint32_t left = f->len - n; left; left -= n) {
		n = left < size ? left : size;
		copy(ring_chain_add(&q->ring, &c, n), &from, n);
	}
	ring_chain_end(&q->ring, &c);
	counter_add(&q->frames, 1);
	counter_add(&q->bytes, f->len);
	return true;
}

static void add_segment(struct net_queue *q, struct net_frame *f, uint8_t *at, uint32_t len)
{
	q->iov[q->iov_count++] = (struct iovec){.iov_base = at, .iov_len = len};
	f->count++;
	f->len += len;
}

/* Add the `used` bytes of a chain that was posted whole, less the vnet header. */
static __attribute__((noinline)) void add_chain(struct net_queue *q, struct net_frame *f,
					       uint16_t head, uint32_t used)
{
	const struct net_shape *s = &q->shape;
	bool indirect = ring_is_indirect(&q->ring, s->chain);
	uint32_t skip = s->header;
	uint16_t slot = head;

	for (uint32_t i = 0; used; i++) {
		uint32_t len = s->split && !i ? s->header : q->ring.buffer_size;
		uint8_t *at = indirect ? ring_buffer(&q->ring, head, i) :
					 ring_buffer(&q->ring, slot, 0);

		if (len > used)
			len = used;
		if (len > skip)
			add_segment(q, f, at + skip, len - skip);
		used -= len;
		skip = 0;
		slot = q->ring.next[slot];
	}
}

/* Add `more` buffers to a merged frame; `len` is how much of the one before them was used. */
static __attribute__((noinline)) int add_merged(struct net_queue *q, struct net_frame *f,
					       uint32_t len, uint32_t more)
{
	for (; more; more--) {
		int head;

		if (len != q->ring.buffer_size)
			return ring_fail(&q->ring, RING_FAULT_PARTIAL_BUFFER);
		head = ring_take(&q->ring, &len);
		if (head < 0)
			return head;
		add_segment(q, f, ring_buffer(&q->ring, (uint16_t)head, 0), len);
	}
	return 0;
}

/* Take one frame from `pending` used entries; returns 0 or -EPROTO. */
static int take_frame(struct net_queue *q, struct net_frame *f, uint32_t pending)
{
	uint32_t len, end, buffers;
	uint64_t begin;
	uint8_t *header;
	int head = ring_take(&q->ring, &len);

	if (head < 0)
		return head;
	if (len < q->shape.header)
		return ring_fail(&q->ring, RING_FAULT_SHORT_FRAME);
	/* Read once: the device can change it while it is looked at. A shorter one is read over. */
	header = ring_buffer(&q->ring, (uint16_t)head, 0);
	begin = __atomic_load_n((const uint64_t *)header, __ATOMIC_RELAXED);
	end = __atomic_load_n((const uint32_t *)(header + sizeof(begin)), __ATOMIC_RELAXED);
	f->iov = q->iov + q->iov_count;
	f->count = f->len = 0;
	memcpy(&f->header, &begin, sizeof(begin));
	f->header.csum_offset = (uint16_t)end;
	if (!q->shape.mergeable) {
		add_chain(q, f, (uint16_t)head, len);
		return 0;
	}
	/* All buffers of a frame become used together (5.1.6.4.2). */
	buffers = end >> 16;
	if (!buffers || buffers > pending)
		return ring_fail(&q->ring, RING_FAULT_NUM_BUFFERS);
	if (len > q->shape.header)
		add_segment(q, f, header + q->shape.header, len - q->shape.header);
	return buffers == 1 ? 0 : add_merged(q, f, len, buffers - 1);
}

/*
 * The next received frame: 1, 0 if there is none, or -EPROTO. Frames that are empty or longer
 * than the limit are dropped and counted.
 */
int net_next(struct net_queue *q, struct net_frame *f)
{
	for (;;) {
		int pending = ring_pending(&q->ring);

		if (pending <= 0)
			return pending;
		if (take_frame(q, f, (uint32_t)pending) < 0)
			return -EPROTO;
		if (f->len && f->len <= q->shape.limit)
			break;
		counter_add(&q->dropped, 1);
	}
	counter_add(&q->frames, 1);
	counter_add(&q->bytes, f->len);
	return 1;
}

/* Copy a frame out of guest memory; `to` has room for shape.limit bytes. Returns its length. */
uint32_t net_copy(const struct net_frame *f, uint8_t *to)
{
	for (uint32_t i = 0; i < f->count; i++) {
		memcpy(to, f->iov[i].iov_base, f->iov[i].iov_len);
		to += f->iov[i].iov_len;
	}
	return f->len;
}

/* Post receive chains of `total` segments while there is room; inlined twice, as put(). */
static inline __attribute__((always_inline)) void post(struct net_queue *q, uint32_t total)
{
	const struct net_shape *s = &q->shape;

	for (uint16_t room = ring_room(&q->ring, total); room; room--) {
		struct ring_chain c;

		ring_chain_begin(&q->ring, &c, total, VRING_DESC_F_WRITE);
		for (uint32_t i = 0; i < total; i++)
			ring_chain_add(&q->ring, &c,
				       s->split && !i ? s->header : q->ring.buffer_size);
		ring_chain_end(&q->ring, &c);
	}
}

/* Post all free buffers of a receive queue; frames taken before are gone. 0 or -errno. */
int net_refill(struct net_queue *q)
{
	if (q->shape.chain == 1)
		post(q, 1);
	else
		post(q, q->shape.chain);
	q->iov_count = 0;
	return ring_publish(&q->ring);
}

/*
 * Post free receive buffers and kick in any case: a device that was just started may have missed
 * kicks, and its wish for them may be a stale one. Returns 0 or -errno.
 */
int net_start(struct net_queue *q)
{
	uint64_t kicks = q->ring.kicks;
	int err = q->ring.fault ? -EPROTO : 0;

	if (!err && q->iov)
		err = net_refill(q);
	if (!err && q->ring.kicks == kicks)
		err = ring_kick(&q->ring);
	return err;
}
