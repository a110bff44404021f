// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory tables and translation.
 *
 * A table is an array in the order of first addresses. Maps may overlap, and
 * then the one that begins lowest counts; with the running maximum of the last
 * addresses ("reach") it is found by one binary search: it is the first map whose
 * reach is not below the address.
 */
#include <linux/vhost_types.h>
#include "iotlb.h"
#include "memory.h"
#include "ring.h"

#define VHM_LOG_SPAN	(8ULL * VHOST_PAGE_SIZE)	/* memory behind a byte of the log */

struct vhm_table *vhm_table_new(void)
{
	return port_alloc(sizeof(struct vhm_table));
}

void vhm_table_free(struct vhm_table *table)
{
	if (!table)
		return;
	port_free(table->maps);
	port_free(table);
}

static void set_reach(struct vhm_table *table, unsigned int from)
{
	u64 reach = from ? table->maps[from - 1].reach : 0;
	struct vhm_map *map = table->maps + from;
	struct vhm_map *end = table->maps + table->count;

	for (; map < end; map++) {
		if (map->last > reach)
			reach = map->last;
		map->reach = reach;
	}
}

/* Index of the first map whose reach is not below @addr; count if there is none. */
static unsigned int find(const struct vhm_table *table, u64 addr)
{
	unsigned int low = 0;
	unsigned int high = table->count;

	while (low < high) {
		unsigned int middle = (low + high) / 2;

		if (table->maps[middle].reach < addr)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static int grow(struct vhm_table *table)
{
	unsigned int room = table->room ? 2 * table->room : 8;
	struct vhm_map *maps;

	if (table->count < table->room)
		return 0;
	maps = port_alloc(room * sizeof(*maps));
	if (!maps)
		return -ENOMEM;
	if (table->count)
		memcpy(maps, table->maps, table->count * sizeof(*maps));
	port_free(table->maps);
	table->maps = maps;
	table->room = room;
	return 0;
}

static void remove_at(struct vhm_table *table, unsigned int index)
{
	struct vhm_map *map = table->maps + index;

	table->count--;
	memmove(map, map + 1, (table->count - index) * sizeof(*map));
	set_reach(table, index);
}

static void remove_oldest(struct vhm_table *table)
{
	unsigned int oldest = 0;
	unsigned int i;

	for (i = 1; i < table->count; i++)
		if (table->maps[i].age < table->maps[oldest].age)
			oldest = i;
	remove_at(table, oldest);
}

int vhm_table_add(struct vhm_table *table, u64 first, u64 last, u64 uaddr, u32 access, int limit)
{
	struct vhm_map *map;
	unsigned int at;
	int error;

	if (last < first)
		return -EFAULT;
	if (!first && last == ~0ULL) {
		u64 half = ~0ULL / 2;

		error = vhm_table_add(table, 0, half, uaddr, access, limit);
		if (error)
			return error;
		return vhm_table_add(table, half + 1, last, uaddr + half + 1, access, limit);
	}
	if (limit > 0 && table->count >= (unsigned int)limit)
		remove_oldest(table);
	error = grow(table);
	if (error)
		return error;
	for (at = table->count; at && table->maps[at - 1].first > first; at--)
		;
	map = table->maps + at;
	memmove(map + 1, map, (table->count - at) * sizeof(*map));
	map->first = first;
	map->last = last;
	map->uaddr = uaddr;
	map->access = access;
	map->age = table->arrivals++;
	table->count++;
	set_reach(table, at);
	return 0;
}

void vhm_table_remove(struct vhm_table *table, u64 first, u64 last)
{
	unsigned int kept = 0;
	unsigned int i;

	for (i = 0; i < table->count; i++) {
		const struct vhm_map *map = table->maps + i;

		if (map->first > last || map->last < first)
			table->maps[kept++] = *map;
	}
	table->count = kept;
	set_reach(table, 0);
}

/* The map that counts for @addr, or NULL. */
static const struct vhm_map *lookup(struct vhm_queue *queue, const struct vhm_table *table,
				    u64 addr)
{
	unsigned int index = queue->hint;
	const struct vhm_map *map;

	if (index < table->count) {
		map = table->maps + index;
		if (map->first <= addr && addr <= map->last &&
		    (!index || map[-1].reach < addr))
			return map;
	}
	index = find(table, addr);
	if (index == table->count || table->maps[index].first > addr)
		return NULL;
	queue->hint = index;
	return table->maps + index;
}

int vhm_translate(struct vhm_queue *queue, u64 addr, u64 length, u32 access, struct iovec *iov,
		  unsigned int room)
{
	const struct vhm_table *table = queue->dev->iotlb ?: queue->dev->memory;
	unsigned int count = 0;

	while (length) {
		const struct vhm_map *map;
		u64 rest;

		if (count == room)
			return -ENOBUFS;
		map = lookup(queue, table, addr);
		if (unlikely(!map)) {
			if (!queue->dev->iotlb)
				return -EFAULT;
			vhm_iotlb_miss(queue, addr, access);
			return -EAGAIN;
		}
		if (unlikely(!(map->access & access)))
			return -EPERM;
		rest = map->last - addr + 1;
		if (!rest || rest > length)
			rest = length;
		iov[count].iov_base = port_pointer(map->uaddr + (addr - map->first));
		iov[count].iov_len = rest;
		count++;
		addr += rest;
		length -= rest;
		if (unlikely(!addr && length))
			return -EFAULT;
	}
	return count;
}

bool vhm_log_range_ok(u64 log_base, u64 gpa, u64 length)
{
	u64 start = gpa / VHM_LOG_SPAN;

	if (log_base + start < start)
		return false;
	/* A length just below 2^64 wraps here, as it does in the reference. */
	return port_range_ok(log_base + start, (length + VHM_LOG_SPAN - 1) / VHM_LOG_SPAN);
}

bool vhm_table_ok(const struct vhm_table *table, u64 log_base, bool log)
{
	unsigned int i;

	if (!table)
		return false;
	for (i = 0; i < table->count; i++) {
		const struct vhm_map *map = table->maps + i;
		u64 size = map->last - map->first + 1;

		if (!port_range_ok(map->uaddr, size))
			return false;
		if (log && !vhm_log_range_ok(log_base, map->first, size))
			return false;
	}
	return true;
}

u64 vhm_part_size(const struct vhm_queue *queue, enum vhm_part part)
{
	u64 event = vhm_has(queue, VIRTIO_RING_F_EVENT_IDX) ? 2 : 0;

	switch (part) {
	case VHM_DESC:
		return 16ULL * queue->num;
	case VHM_AVAIL:
		return 4 + 2ULL * queue->num + event;
	default:
		return 4 + 8ULL * queue->num + event;
	}
}

/* Whether the IOTLB maps the whole part; its uaddr too if that is one piece. */
static bool locate_part(struct vhm_queue *queue, enum vhm_part part)
{
	const struct vhm_table *iotlb = queue->dev->iotlb;
	u32 access = part == VHM_USED ? VHOST_ACCESS_WO : VHOST_ACCESS_RO;
	u64 start = queue->place.part[part];
	u64 addr = start;
	u64 length = vhm_part_size(queue, part);

	while (length) {
		const struct vhm_map *map = lookup(queue, iotlb, addr);
		u64 rest;

		if (!map) {
			vhm_iotlb_miss(queue, addr, access);
			return false;
		}
		if (!(map->access & access))
			return false;
		rest = map->last - addr + 1;
		if (!rest || rest >= length) {
			if (addr == start)
				queue->direct[part] = map->uaddr + (addr - map->first);
			return true;
		}
		addr += rest;
		length -= rest;
	}
	return true;
}

void vhm_ring_forget(struct vhm_queue *queue)
{
	if (queue->dev->iotlb)
		memset(queue->direct, 0, sizeof(queue->direct));
	else
		memcpy(queue->direct, queue->place.part, sizeof(queue->direct));
}

bool vhm_ring_locate(struct vhm_queue *queue)
{
	const struct vhm_place *place = &queue->place;
	enum vhm_part part;

	if (likely(!queue->dev->iotlb))
		return true;
	if (!place->part[VHM_DESC] && !place->part[VHM_AVAIL] && !place->part[VHM_USED])
		return false;
	for (part = VHM_DESC; part < VHM_PARTS; part++)
		if (!queue->direct[part] && !locate_part(queue, part))
			return false;
	return true;
}

u64 vhm_ring_translate(struct vhm_queue *queue, enum vhm_part part, u64 offset, u64 length,
		       u32 access)
{
	struct iovec iov;

	if (!queue->dev->iotlb)
		return 0;
	if (vhm_translate(queue, queue->place.part[part] + offset, length, access, &iov, 1) != 1)
		return 0;
	return port_uaddr(iov.iov_base);
}
