// SPDX-License-Identifier: GPL-2.0-only
/*
 * The dirty log. A log that cannot be written stops nothing: the VMM gave us
 * its address and sees the missing bits.
 */
#include <linux/vhost_types.h>
#include "log.h"
#include "memory.h"

static int log_pages(u64 log_base, u64 gpa, u64 length)
{
	u64 page = gpa / VHOST_PAGE_SIZE;
	u64 last = (gpa + length - 1) / VHOST_PAGE_SIZE;

	if (!length)
		return 0;
	for (; page <= last; page++) {
		int error = port_set_bit(log_base + page / 8, page % 8);

		if (error)
			return error;
	}
	return 0;
}

/* A host address may be mapped by several regions, and is dirty in each. */
static int log_uaddr(struct vhm_queue *queue, u64 uaddr, u64 length)
{
	const struct vhm_table *memory = queue->dev->memory;
	bool hit = false;
	unsigned int i;

	if (!length)
		return 0;
	for (i = 0; memory && i < memory->count; i++) {
		const struct vhm_map *map = memory->maps + i;
		u64 last = map->uaddr + (map->last - map->first);
		u64 start = uaddr > map->uaddr ? uaddr : map->uaddr;
		u64 end = min(uaddr + length - 1, last);

		if (start > end)
			continue;
		hit = true;
		if (log_pages(queue->log_base, map->first + (start - map->uaddr),
			      end - start + 1))
			return -EFAULT;
	}
	return hit ? 0 : -EFAULT;
}

void vhm_log_ring(struct vhm_queue *queue, u64 offset, u64 length)
{
	u64 addr = queue->place.part[VHM_USED] + offset;

	/* Whoever finds the bit set must find what was written. */
	port_wmb();
	if (!queue->dev->iotlb) {
		log_pages(queue->log_base, queue->place.used_log + offset, length);
		return;
	}
	while (length) {
		struct iovec iov;
		int count = vhm_translate(queue, addr, length, VHOST_ACCESS_WO, &iov, 1);

		if (count != 1 && count != -ENOBUFS)
			return;
		if (log_uaddr(queue, port_uaddr(iov.iov_base), iov.iov_len))
			return;
		addr += iov.iov_len;
		length -= iov.iov_len;
	}
}

void vhm_log_frame(struct vhm_queue *queue, unsigned int logs, unsigned int count, u64 length)
{
	unsigned int i;

	port_wmb();
	if (queue->dev->iotlb) {
		for (i = 0; i < count && length; i++) {
			u64 part = min_t(u64, queue->iov[i].iov_len, length);

			if (log_uaddr(queue, port_uaddr(queue->iov[i].iov_base), part))
				return;
			length -= part;
		}
		return;
	}
	for (i = 0; i < logs && length; i++) {
		u64 part = min(queue->log[i].length, length);

		if (log_pages(queue->log_base, queue->log[i].gpa, part))
			return;
		length -= part;
	}
	vhm_log_signal(queue);
}

void vhm_log_signal(struct vhm_queue *queue)
{
	if (queue->dev->log_event)
		port_event_signal(queue->dev->log_event);
}
