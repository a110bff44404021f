/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The driver side of a split virtqueue (virtio 1.2, section 2.7).
 *
 * Every descriptor owns fixed guest memory, so that a free descriptor is free memory too: one
 * buffer, or, where chains are indirect, a table and as many buffers as the longest chain has
 * segments. Nothing that lies in shared memory is read back except the used ring and the two
 * event fields; links and lengths are kept here.
 *
 * One thread at a time may drive a ring. Counters may be read from any thread.
 */
#ifndef VHOSTCTL_GUEST_VRING_H
#define VHOSTCTL_GUEST_VRING_H

#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
	       "ring fields are used as they are: VERSION_1 rings are little-endian");

/* How a device broke the protocol. A ring with a fault takes no more part in anything. */
enum ring_fault {
	RING_FAULT_NONE,
	RING_FAULT_USED_INDEX,	/* used idx passed what was made available */
	RING_FAULT_USED_ID,	/* a used id that is no descriptor of the ring */
	RING_FAULT_USED_IDLE,	/* a used id that heads no chain of the device's */
	RING_FAULT_USED_LENGTH,	/* more bytes used than the chain can take */
	RING_FAULT_SHORT_FRAME,	/* a received frame without its whole header */
	RING_FAULT_NUM_BUFFERS,	/* num_buffers of zero, or beyond the buffers used */
	RING_FAULT_PARTIAL_BUFFER,	/* a merged buffer left unfilled before the last */
};

struct ring_head {
	uint32_t writable;	/* bytes that the device may write */
	uint16_t slots;		/* descriptors of the chain; 0: not in use as a head */
	uint16_t last;		/* its last descriptor */
};

struct driver_ring {
	struct vring vring;
	struct vring_desc *tables;	/* `segments` entries per descriptor */
	uint8_t *buffers;		/* `segments` buffers per descriptor */
	uint64_t tables_gpa;
	uint64_t buffers_gpa;
	uint32_t buffer_size;
	uint32_t segments;		/* more than one: longer chains are indirect */

	uint16_t mask;
	uint16_t free_head;
	uint16_t free_count;
	uint16_t avail_idx;		/* next entry to fill */
	uint16_t used_idx;		/* next entry to take */
	uint16_t base;
	uint16_t *next;			/* free list and chain links */
	struct ring_head *heads;

	int kick;
	int call;
	bool event_idx;
	bool armed;
	enum ring_fault fault;
	uint64_t published;		/* base + chains published: its low half is avail idx */
	uint64_t kicks;
	uint64_t calls;
	uint64_t faults;
};

struct ring_config {
	void *desc, *avail, *used;	/* the device sees the same memory */
	void *arena;			/* ring_arena() bytes on a 64-byte boundary */
	uint64_t arena_gpa;
	uint32_t buffer_size;
	uint32_t segments;
	uint16_t size;
	uint16_t base;			/* where both indices start */
	int kick, call;			/* eventfds, borrowed */
	bool event_idx;
};

/* A chain that is being laid out; it costs nothing to abandon one before ring_chain_end(). */
struct ring_chain {
	uint32_t bytes;
	uint16_t head, slot, last;
	uint16_t total, count;
	uint16_t flags;
	bool indirect;
};

uint64_t ring_arena(uint16_t size, uint32_t segments, uint32_t buffer_size);
int ring_init(struct driver_ring *r, const struct ring_config *c);
void ring_deinit(struct driver_ring *r);

int ring_kick(struct driver_ring *r);
int ring_publish(struct driver_ring *r);
int ring_fail(struct driver_ring *r, enum ring_fault fault) __attribute__((cold));
bool ring_arm(struct driver_ring *r, uint16_t after);
void ring_disarm(struct driver_ring *r);
void ring_ack_call(struct driver_ring *r);
uint16_t ring_unused(const struct driver_ring *r, uint64_t *used);

/* Counters have one writer; relaxed accesses keep a concurrent reader's loads whole. */
static inline void counter_add(uint64_t *counter, uint64_t n)
{
	__atomic_store_n(counter, __atomic_load_n(counter, __ATOMIC_RELAXED) + n,
			 __ATOMIC_RELAXED);
}

static inline uint64_t counter_read(const uint64_t *counter)
{
	return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

/* Buffer `segment` of descriptor `slot`, counted from the start of the buffers. */
static inline size_t ring_buffer_index(const struct driver_ring *r, uint16_t slot, uint32_t segment)
{
	return (size_t)slot * r->segments + segment;
}

static inline uint8_t *ring_buffer(const struct driver_ring *r, uint16_t slot, uint32_t segment)
{
	return r->buffers + ring_buffer_index(r, slot, segment) * r->buffer_size;
}

static inline bool ring_is_indirect(const struct driver_ring *r, uint32_t total)
{
	return total > 1 && r->segments > 1;
}

/* How many chains of `total` segments can be laid out now. */
static inline uint16_t ring_room(const struct driver_ring *r, uint32_t total)
{
	if (total == 1 || ring_is_indirect(r, total))
		return r->free_count;
	return (uint16_t)(r->free_count / total);
}

/* Used entries that were not taken yet, or -EPROTO. */
static inline int ring_pending(struct driver_ring *r)
{
	uint16_t idx = __atomic_load_n(&r->vring.used->idx, __ATOMIC_ACQUIRE);
	uint16_t pending = (uint16_t)(idx - r->used_idx);

	if (__builtin_expect(r->fault || pending > (uint16_t)(r->published - r->used_idx), 0))
		return ring_fail(r, RING_FAULT_USED_INDEX);
	return pending;
}

/*
 * Take one of the ring_pending() used entries: its head, or -EPROTO. The chain's descriptors are
 * free from now on, but its memory keeps its content until a new chain is laid over it.
 */
static inline int ring_take(struct driver_ring *r, uint32_t *len)
{
	const struct vring_used_elem *elem = &r->vring.used->ring[r->used_idx & r->mask];
	uint32_t id = __atomic_load_n(&elem->id, __ATOMIC_RELAXED);
	struct ring_head *head = &r->heads[id & r->mask];

	*len = __atomic_load_n(&elem->len, __ATOMIC_RELAXED);
	if (__builtin_expect(id > r->mask, 0))
		return ring_fail(r, RING_FAULT_USED_ID);
	if (__builtin_expect(!head->slots, 0))
		return ring_fail(r, RING_FAULT_USED_IDLE);
	if (__builtin_expect(*len > head->writable, 0))
		return ring_fail(r, RING_FAULT_USED_LENGTH);
	r->used_idx++;
	r->next[head->last] = r->free_head;
	r->free_head = (uint16_t)id;
	r->free_count += head->slots;
	head->slots = 0;
	return (int)id;
}

/* Begin a chain of `total` segments; there must be room. `flags`: VRING_DESC_F_WRITE or 0. */
static inline void ring_chain_begin(const struct driver_ring *r, struct ring_chain *c,
				    uint32_t total, uint16_t flags)
{
	*c = (struct ring_chain){
		.head = r->free_head,
		.slot = r->free_head,
		.last = r->free_head,
		.total = (uint16_t)total,
		.flags = flags,
		.indirect = ring_is_indirect(r, total),
	};
}

/* Give the next segment of the chain `len` bytes; returns its memory. */
static inline uint8_t *ring_chain_add(const struct driver_ring *r, struct ring_chain *c,
				      uint32_t len)
{
	uint16_t segment = c->count++;
	struct vring_desc *desc;
	size_t buffer;
	uint16_t next;

	if (c->indirect) {
		buffer = ring_buffer_index(r, c->head, segment);
		desc = &r->tables[buffer];
		next = c->count;
	} else {
		buffer = ring_buffer_index(r, c->slot, 0);
		desc = &r->vring.desc[c->slot];
		next = r->next[c->slot];
		c->last = c->slot;
		c->slot = next;
	}
	*desc = (struct vring_desc){
		.addr = r->buffers_gpa + buffer * r->buffer_size,
		.len = len,
		.flags = c->flags | (c->count < c->total ? VRING_DESC_F_NEXT : 0),
		.next = next,
	};
	c->bytes += len;
	return r->buffers + buffer * r->buffer_size;
}

/* Enter the chain in the avail ring; the device learns of it through ring_publish(). */
static inline void ring_chain_end(struct driver_ring *r, const struct ring_chain *c)
{
	uint16_t slots = c->indirect ? 1 : c->total;

	if (c->indirect)
		r->vring.desc[c->head] = (struct vring_desc){
			.addr = r->tables_gpa +
				ring_buffer_index(r, c->head, 0) * sizeof(struct vring_desc),
			.len = c->total * (uint32_t)sizeof(struct vring_desc),
			.flags = VRING_DESC_F_INDIRECT,
		};
	r->free_head = r->next[c->last];
	r->free_count -= slots;
	r->heads[c->head] = (struct ring_head){
		.writable = c->flags & VRING_DESC_F_WRITE ? c->bytes : 0,
		.slots = slots,
		.last = c->last,
	};
	r->vring.avail->ring[r->avail_idx++ & r->mask] = c->head;
}

#endif
