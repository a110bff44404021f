/* SPDX-License-Identifier: GPL-2.0-only */
/* Which host memory is behind the guest's addresses. */
#ifndef VHM_MEMORY_H
#define VHM_MEMORY_H

#include "vhm.h"

/* An empty table, or NULL. */
struct vhm_table *vhm_table_new(void);
void vhm_table_free(struct vhm_table *table);

/*
 * Map [first, last] to @uaddr: 0, -EFAULT if it wraps, -ENOMEM. The whole of
 * 2^64 bytes becomes two maps. With @limit, the oldest maps make room.
 */
int vhm_table_add(struct vhm_table *table, u64 first, u64 last, u64 uaddr, u32 access, int limit);

/* Remove every map that overlaps [first, last]. */
void vhm_table_remove(struct vhm_table *table, u64 first, u64 last);

/*
 * Translate [addr, addr + length) of the queue's address space to at most @room
 * pieces at @iov. Returns their number; -EFAULT if nothing is behind it, -EPERM
 * if it may not be accessed so, -ENOBUFS if there are more pieces, -EAGAIN
 * if an IOTLB message was sent to ask for it.
 */
int vhm_translate(struct vhm_queue *queue, u64 addr, u64 length, u32 access, struct iovec *iov,
		  unsigned int room);

/* Whether everything that @table maps can be memory, and its log be written. */
bool vhm_table_ok(const struct vhm_table *table, u64 log_base, bool log);

/* Whether the log of [gpa, gpa + length) at @log_base can be memory. */
bool vhm_log_range_ok(u64 log_base, u64 gpa, u64 length);

/*
 * Find where the parts of the ring are, once before each turn. False if the ring
 * cannot be worked on now; what is missing has then been asked for.
 */
bool vhm_ring_locate(struct vhm_queue *queue);

/* The ring was moved or what is mapped changed: look again before the next turn. */
void vhm_ring_forget(struct vhm_queue *queue);

/*
 * Where [part + offset, + length) is, all in one piece, or 0. The inline function
 * is for parts that vhm_ring_locate() found whole, which is nearly always.
 */
u64 vhm_ring_translate(struct vhm_queue *queue, enum vhm_part part, u64 offset, u64 length,
		       u32 access);

static inline u64 vhm_ring_at(struct vhm_queue *queue, enum vhm_part part, u64 offset, u64 length,
			      u32 access)
{
	if (likely(queue->direct[part]))
		return queue->direct[part] + offset;
	return vhm_ring_translate(queue, part, offset, length, access);
}

/* Bytes of a part of the ring. */
u64 vhm_part_size(const struct vhm_queue *queue, enum vhm_part part);

#endif
