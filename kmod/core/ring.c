// SPDX-License-Identifier: GPL-2.0-only
/*
 * Chains out of the avail ring, heads into the used ring, and who wakes whom.
 *
 * Every value of the rings is read once and kept here: what the driver changes
 * afterwards cannot reach a decision that was made on it.
 */
#include <linux/vhost_types.h>
#include "log.h"
#include "memory.h"
#include "ring.h"

#define AVAIL_FLAGS	0
#define AVAIL_IDX	2
#define AVAIL_RING	4
#define USED_FLAGS	0
#define USED_IDX	2
#define USED_RING	4

union descriptor {
	struct {
		__u64 addr;
		__u32 length;
		__u16 flags;
		__u16 next;
	};
	u64 raw[2];
};

/* An indirect table, which may lie in several pieces of memory. */
struct table {
	const struct iovec *piece;
	size_t offset;		/* into the piece */
	u32 left;		/* descriptors */
};

void vhm_ring_error(struct vhm_queue *queue, u64 *cause)
{
	++*cause;
	port_trace_error(queue, cause - &queue->stats.bad_rings);
	if (queue->err)
		port_event_signal(queue->err);
}

static void convert(const struct vhm_queue *queue, union descriptor *desc)
{
	if (!queue->little_endian)
		return;
	desc->addr = __le64_to_cpu((__force __le64)desc->addr);
	desc->length = __le32_to_cpu((__force __le32)desc->length);
	desc->flags = __le16_to_cpu((__force __le16)desc->flags);
	desc->next = __le16_to_cpu((__force __le16)desc->next);
}

static int get_avail(struct vhm_queue *queue, u64 offset, u16 *value)
{
	u64 at = vhm_ring_at(queue, VHM_AVAIL, offset, 2, VHOST_ACCESS_RO);

	if (unlikely(!at || port_get16(value, at)))
		return -EFAULT;
	*value = vhm_from_ring16(queue, *value);
	return 0;
}

static int put_used(struct vhm_queue *queue, u64 offset, u16 value)
{
	u64 at = vhm_ring_at(queue, VHM_USED, offset, 2, VHOST_ACCESS_RO);

	if (unlikely(!at || port_put16(vhm_to_ring16(queue, value), at)))
		return -EFAULT;
	if (unlikely(queue->place.log_used)) {
		vhm_log_ring(queue, offset, 2);
		vhm_log_signal(queue);
	}
	return 0;
}

/* Look at avail idx: 1 if it moved since it was seen, 0 if not, or an error. */
static int see_avail(struct vhm_queue *queue)
{
	u16 idx;

	if (unlikely(get_avail(queue, AVAIL_IDX, &idx))) {
		vhm_ring_error(queue, &queue->stats.bad_rings);
		return -EFAULT;
	}
	if (idx == queue->avail_seen)
		return 0;
	if (unlikely((u16)(idx - queue->last_avail) > queue->num)) {
		vhm_ring_error(queue, &queue->stats.bad_rings);
		return -EFAULT;
	}
	queue->avail_seen = idx;
	/* The entries and descriptors are read after the idx that covers them. */
	port_rmb();
	return 1;
}

bool vhm_ring_more(struct vhm_queue *queue)
{
	u16 idx;

	if (queue->avail_seen != queue->last_avail)
		return true;
	return !get_avail(queue, AVAIL_IDX, &idx) && idx != queue->last_avail;
}

/* Add the memory behind one descriptor to the chain. */
static int add_buffer(struct vhm_queue *queue, struct vhm_chain *chain,
		      const union descriptor *desc, unsigned int used, struct vhm_log *log)
{
	bool write = desc->flags & VRING_DESC_F_WRITE;
	unsigned int at = used + chain->out + chain->in;
	int count;

	count = vhm_translate(queue, desc->addr, desc->length,
			      write ? VHOST_ACCESS_WO : VHOST_ACCESS_RO, queue->iov + at,
			      VHM_SEGMENTS - at);
	if (unlikely(count < 0)) {
		if (count != -EAGAIN)
			vhm_ring_error(queue, &queue->stats.bad_addresses);
		return count;
	}
	if (!write) {
		if (unlikely(chain->in)) {
			vhm_ring_error(queue, &queue->stats.bad_chains);
			return -EINVAL;
		}
		chain->out += count;
		return 0;
	}
	chain->in += count;
	if (unlikely(log && count)) {
		log[chain->logs].gpa = desc->addr;
		log[chain->logs].length = desc->length;
		chain->logs++;
	}
	return 0;
}

static int next_of_table(struct table *table, union descriptor *desc)
{
	u8 *to = (u8 *)desc;
	size_t need = sizeof(*desc);

	while (need) {
		size_t part = min(need, table->piece->iov_len - table->offset);

		if (port_copy_in(to, port_uaddr(table->piece->iov_base) + table->offset, part))
			return -EFAULT;
		to += part;
		need -= part;
		table->offset += part;
		if (table->offset == table->piece->iov_len) {
			table->piece++;
			table->offset = 0;
		}
	}
	table->left--;
	return 0;
}

/* Its own error is counted here, and once more by the caller: two words for one table. */
static int add_table(struct vhm_queue *queue, struct vhm_chain *chain,
		     const union descriptor *outer, unsigned int used, struct vhm_log *log)
{
	struct table table = {
		.piece = queue->table_iov,
		.left = outer->length / sizeof(union descriptor),
	};
	union descriptor desc;
	int error;

	if (unlikely(outer->length % sizeof(desc))) {
		error = -EINVAL;
		goto bad;
	}
	error = vhm_translate(queue, outer->addr, outer->length, VHOST_ACCESS_RO,
			      queue->table_iov, VHM_TABLE_PARTS);
	if (unlikely(error < 0)) {
		if (error == -EAGAIN)
			return error;
		goto bad;
	}
	error = -E2BIG;
	if (unlikely(table.left > VHM_TABLE_MAX))
		goto bad;
	do {
		error = -EINVAL;
		/* Many tables without a byte in them would keep us for ever. */
		if (unlikely(!table.left || chain->visited >= VHM_TABLE_MAX + VHM_NUM_MAX ||
			     next_of_table(&table, &desc)))
			goto bad;
		chain->visited++;
		convert(queue, &desc);
		if (unlikely(desc.flags & VRING_DESC_F_INDIRECT))
			goto bad;
		error = add_buffer(queue, chain, &desc, used, log);
		if (unlikely(error))
			return error;
	} while (desc.flags & VRING_DESC_F_NEXT);
	return 0;
bad:
	vhm_ring_error(queue, &queue->stats.bad_chains);
	return error;
}

/* Follow the descriptors from @index on. */
static int walk(struct vhm_queue *queue, struct vhm_chain *chain, u16 index, unsigned int used,
		struct vhm_log *log)
{
	union descriptor desc;
	int error;

	for (;;) {
		u64 at = vhm_ring_at(queue, VHM_DESC, index * sizeof(desc), sizeof(desc),
				     VHOST_ACCESS_RO);

		if (unlikely(chain->descriptors == queue->num))
			goto bad;
		chain->descriptors++;
		chain->visited++;
		if (unlikely(!at || port_get128(desc.raw, at)))
			goto bad;
		convert(queue, &desc);
		if (desc.flags & VRING_DESC_F_INDIRECT) {
			error = add_table(queue, chain, &desc, used, log);
			if (unlikely(error)) {
				if (error != -EAGAIN)
					vhm_ring_error(queue, &queue->stats.bad_chains);
				return error;
			}
		} else {
			error = add_buffer(queue, chain, &desc, used, log);
			if (unlikely(error))
				return error;
		}
		if (!(desc.flags & VRING_DESC_F_NEXT))
			return 0;
		index = desc.next;
		if (unlikely(index >= queue->num))
			goto bad;
	}
bad:
	vhm_ring_error(queue, &queue->stats.bad_chains);
	return -EINVAL;
}

int vhm_ring_take(struct vhm_queue *queue, struct vhm_chain *chain, unsigned int used,
		  bool logs, unsigned int logged)
{
	int error;

	if (queue->avail_seen == queue->last_avail) {
		int moved = see_avail(queue);

		if (moved <= 0)
			return moved;
	}
	if (vhm_has(queue, VIRTIO_F_IN_ORDER)) {
		chain->head = queue->in_order_head & (queue->num - 1);
	} else {
		u64 slot = queue->last_avail & (queue->num - 1);

		if (unlikely(get_avail(queue, AVAIL_RING + 2 * slot, &chain->head) ||
			     chain->head >= queue->num)) {
			vhm_ring_error(queue, &queue->stats.bad_rings);
			return -EINVAL;
		}
	}
	chain->out = 0;
	chain->in = 0;
	chain->logs = 0;
	chain->descriptors = 0;
	chain->visited = 0;
	error = walk(queue, chain, chain->head, used, logs ? queue->log + logged : NULL);
	if (unlikely(error))
		return error;
	queue->last_avail++;
	queue->in_order_head += chain->descriptors;
	port_trace_chain(queue, chain->head, chain->out, chain->in);
	return 1;
}

/* Whether the driver wants to hear that used idx moved to where it is now. */
static bool wants_signal(struct vhm_queue *queue)
{
	u16 old = queue->signalled;
	bool valid = queue->signalled_valid;
	u16 value;

	/* Used idx is seen by the driver before its flags or event are read. */
	port_mb();
	if (vhm_has(queue, VIRTIO_F_NOTIFY_ON_EMPTY) && !vhm_ring_more(queue))
		return true;
	if (!vhm_has(queue, VIRTIO_RING_F_EVENT_IDX)) {
		if (unlikely(get_avail(queue, AVAIL_FLAGS, &value)))
			goto unreadable;
		return !(value & VRING_AVAIL_F_NO_INTERRUPT);
	}
	queue->signalled = queue->last_used;
	queue->signalled_valid = true;
	if (unlikely(!valid))
		return true;
	if (unlikely(get_avail(queue, AVAIL_RING + 2ULL * queue->num, &value)))
		goto unreadable;
	return (u16)(queue->last_used - value - 1) < (u16)(queue->last_used - old);
unreadable:
	vhm_ring_error(queue, &queue->stats.bad_rings);
	return true;
}

/* The entry of a used ring in pieces may lie across two of them; its halves do not. */
static int put_halves(struct vhm_queue *queue, u64 offset, const union vhm_used *head)
{
	u64 id = vhm_ring_at(queue, VHM_USED, offset, 4, VHOST_ACCESS_WO);
	u64 length = vhm_ring_at(queue, VHM_USED, offset + 4, 4, VHOST_ACCESS_WO);

	if (!id || !length || port_copy_out(id, &head->id, 4) ||
	    port_copy_out(length, &head->length, 4))
		return -EFAULT;
	return 0;
}

static int put_head(struct vhm_queue *queue, u16 slot, const union vhm_used *head)
{
	u64 offset = USED_RING + 8ULL * (slot & (queue->num - 1));
	int error;

	if (likely(queue->direct[VHM_USED]))
		error = port_put64(head->raw, queue->direct[VHM_USED] + offset);
	else
		error = put_halves(queue, offset, head);
	if (unlikely(error))
		return error;
	if (unlikely(queue->place.log_used))
		vhm_log_ring(queue, offset, 8);
	return 0;
}

static int publish(struct vhm_queue *queue, const union vhm_used *heads, const u16 *buffers,
		   unsigned int count)
{
	bool in_order = vhm_has(queue, VIRTIO_F_IN_ORDER);
	u16 old = queue->last_used;
	u16 new = old;
	unsigned int i;

	for (i = 0; i < count; i++) {
		if (unlikely(put_head(queue, new, heads + i)))
			return -EFAULT;
		new += in_order ? buffers[i] : 1;
	}
	queue->last_used = new;
	/* More than a round without a decision: the last one says nothing any more. */
	if (unlikely((u16)(new - queue->signalled) < (u16)(new - old)))
		queue->signalled_valid = false;
	port_trace_used(queue, new - old);
	port_wmb();
	return put_used(queue, USED_IDX, new);
}

void vhm_ring_used(struct vhm_queue *queue, const union vhm_used *heads, const u16 *buffers,
		   unsigned int count)
{
	if (unlikely(publish(queue, heads, buffers, count)))
		vhm_ring_error(queue, &queue->stats.bad_used);
	if (queue->call && wants_signal(queue)) {
		queue->stats.signals++;
		port_trace_signal(queue);
		port_event_signal(queue->call);
	}
}

void vhm_ring_quiet(struct vhm_queue *queue)
{
	if (queue->used_flags & VRING_USED_F_NO_NOTIFY)
		return;
	queue->used_flags |= VRING_USED_F_NO_NOTIFY;
	if (!vhm_has(queue, VIRTIO_RING_F_EVENT_IDX) &&
	    put_used(queue, USED_FLAGS, queue->used_flags))
		vhm_ring_error(queue, &queue->stats.bad_used);
}

bool vhm_ring_listen(struct vhm_queue *queue)
{
	int error;

	if (!(queue->used_flags & VRING_USED_F_NO_NOTIFY))
		return false;
	queue->used_flags &= ~VRING_USED_F_NO_NOTIFY;
	if (vhm_has(queue, VIRTIO_RING_F_EVENT_IDX))
		error = put_used(queue, USED_RING + 8ULL * queue->num, queue->avail_seen);
	else
		error = put_used(queue, USED_FLAGS, queue->used_flags);
	if (unlikely(error)) {
		vhm_ring_error(queue, &queue->stats.bad_used);
		return false;
	}
	/* The driver may have looked before we wrote: look at what it wrote before that. */
	port_mb();
	return see_avail(queue) > 0;
}

int vhm_ring_start(struct vhm_queue *queue)
{
	u64 at;
	u16 idx;

	queue->little_endian = vhm_has(queue, VIRTIO_F_VERSION_1) ||
			       __le16_to_cpu((__force __le16)1) == 1;
	if (put_used(queue, USED_FLAGS, queue->used_flags))
		return -EFAULT;
	queue->signalled_valid = false;
	at = vhm_ring_at(queue, VHM_USED, USED_IDX, 2, VHOST_ACCESS_RO);
	if (!at || port_get16(&idx, at)) {
		vhm_ring_error(queue, &queue->stats.bad_used);
		return -EFAULT;
	}
	queue->last_used = vhm_from_ring16(queue, idx);
	return 0;
}

bool vhm_ring_ok(const struct vhm_queue *queue)
{
	enum vhm_part part;

	for (part = VHM_DESC; part < VHM_PARTS; part++)
		if (!port_range_ok(queue->place.part[part], vhm_part_size(queue, part)))
			return false;
	return true;
}
