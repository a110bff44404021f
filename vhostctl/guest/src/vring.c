// SPDX-License-Identifier: GPL-2.0-or-later
#include "vring.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define ARENA_ALIGN 64u

static uint64_t align_up(uint64_t n)
{
	return (n + ARENA_ALIGN - 1) & ~(uint64_t)(ARENA_ALIGN - 1);
}

static uint64_t tables_size(uint16_t size, uint32_t segments)
{
	if (segments == 1)
		return 0;
	return align_up((uint64_t)size * segments * sizeof(struct vring_desc));
}

/* Guest memory that a ring needs for tables and buffers, in bytes. */
uint64_t ring_arena(uint16_t size, uint32_t segments, uint32_t buffer_size)
{
	return tables_size(size, segments) + align_up((uint64_t)size * segments * buffer_size);
}

/*
 * The device reads used idx when it starts, and an avail event that lies behind the base would
 * keep the first kick from being sent: both start at the base, as avail idx does.
 */
static void reset_shared(struct driver_ring *r, uint16_t base)
{
	struct vring *v = &r->vring;

	v->avail->flags = r->event_idx ? 0 : VRING_AVAIL_F_NO_INTERRUPT;
	v->avail->idx = base;
	v->used->flags = 0;
	v->used->idx = base;
	if (r->event_idx) {
		vring_used_event(v) = (uint16_t)(base - 1);
		vring_avail_event(v) = base;
	}
}

int ring_init(struct driver_ring *r, const struct ring_config *c)
{
	uint64_t tables = tables_size(c->size, c->segments);

	*r = (struct driver_ring){
		.vring = {.num = c->size, .desc = c->desc, .avail = c->avail, .used = c->used},
		.tables = c->arena,
		.tables_gpa = c->arena_gpa,
		.buffers = (uint8_t *)c->arena + tables,
		.buffers_gpa = c->arena_gpa + tables,
		.buffer_size = c->buffer_size,
		.segments = c->segments,
		.mask = (uint16_t)(c->size - 1),
		.free_count = c->size,
		.avail_idx = c->base,
		.used_idx = c->base,
		.base = c->base,
		.published = c->base,
		.next = calloc(c->size, sizeof(*r->next)),
		.heads = calloc(c->size, sizeof(*r->heads)),
		.kick = c->kick,
		.call = c->call,
		.event_idx = c->event_idx,
	};
	if (!r->next || !r->heads) {
		ring_deinit(r);
		return -ENOMEM;
	}
	for (uint16_t i = 0; i < c->size; i++)
		r->next[i] = (uint16_t)((i + 1) & r->mask);
	reset_shared(r, c->base);
	return 0;
}

void ring_deinit(struct driver_ring *r)
{
	free(r->next);
	free(r->heads);
	r->next = NULL;
	r->heads = NULL;
}

/* Signal the device whatever it asked for; returns 0 or -errno. */
int ring_kick(struct driver_ring *r)
{
	const uint64_t one = 1;

	counter_add(&r->kicks, 1);
	/* EAGAIN: the counter is at its end, so the device has a kick to see. */
	if (write(r->kick, &one, sizeof(one)) < 0 && errno != EAGAIN)
		return -errno;
	return 0;
}

/* Show the device all finished chains and kick it if it wants that; returns 0 or -errno. */
int ring_publish(struct driver_ring *r)
{
	uint16_t old = (uint16_t)r->published;
	uint16_t idx = r->avail_idx;
	bool wanted;

	if (idx == old)
		return 0;
	__atomic_store_n(&r->vring.avail->idx, idx, __ATOMIC_RELEASE);
	counter_add(&r->published, (uint16_t)(idx - old));
	/* Pairs with the device's barrier between its wish for kicks and its look at avail idx. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (r->event_idx)
		wanted = vring_need_event(
			__atomic_load_n(&vring_avail_event(&r->vring), __ATOMIC_RELAXED), idx, old);
	else
		wanted = !(__atomic_load_n(&r->vring.used->flags, __ATOMIC_RELAXED) &
			   VRING_USED_F_NO_NOTIFY);
	return wanted ? ring_kick(r) : 0;
}

/* Take the ring out of use; the first fault is the one that counts. Returns -EPROTO. */
int ring_fail(struct driver_ring *r, enum ring_fault fault)
{
	if (!r->fault) {
		r->fault = fault;
		counter_add(&r->faults, 1);
	}
	return -EPROTO;
}

/*
 * Ask for an interrupt once `after` (at least 1) more entries are used. True if they are there
 * already: the device may have looked before it could see the wish, so the caller must not sleep.
 */
bool ring_arm(struct driver_ring *r, uint16_t after)
{
	uint16_t pending;

	if (r->event_idx)
		__atomic_store_n(&vring_used_event(&r->vring), (uint16_t)(r->used_idx + after - 1),
				 __ATOMIC_RELAXED);
	else
		__atomic_store_n(&r->vring.avail->flags, 0, __ATOMIC_RELAXED);
	r->armed = true;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	pending = (uint16_t)(__atomic_load_n(&r->vring.used->idx, __ATOMIC_ACQUIRE) - r->used_idx);
	return r->fault || pending >= after;
}

/* Withdraw the wish for an interrupt; one that is on its way may still come. */
void ring_disarm(struct driver_ring *r)
{
	if (!r->armed)
		return;
	r->armed = false;
	if (r->event_idx)
		__atomic_store_n(&vring_used_event(&r->vring), (uint16_t)(r->used_idx - 1),
				 __ATOMIC_RELAXED);
	else
		__atomic_store_n(&r->vring.avail->flags, VRING_AVAIL_F_NO_INTERRUPT,
				 __ATOMIC_RELAXED);
}

/* Consume the call eventfd, which must be readable. */
void ring_ack_call(struct driver_ring *r)
{
	uint64_t signals;

	if (read(r->call, &signals, sizeof(signals)) == (ssize_t)sizeof(signals))
		counter_add(&r->calls, signals);
}

/*
 * Published chains that the device has not used, as any thread may ask; `used`, if given, gets
 * how many it used since the ring was made.
 */
uint16_t ring_unused(const struct driver_ring *r, uint64_t *used)
{
	uint16_t idx = __atomic_load_n(&r->vring.used->idx, __ATOMIC_ACQUIRE);
	uint64_t published = counter_read(&r->published);
	uint16_t unused = (uint16_t)(published - idx);

	/* The two loads are no snapshot, and used idx is the device's to write. */
	if (unused > r->vring.num)
		unused = (uint16_t)r->vring.num;
	if (unused > published - r->base)
		unused = (uint16_t)(published - r->base);
	if (used)
		*used = published - r->base - unused;
	return unused;
}
