// SPDX-License-Identifier: GPL-2.0-only
/* From the backend to the guest's receive ring. */
#include <linux/vhost_types.h>
#include <linux/virtio_net.h>
#include "log.h"
#include "net.h"
#include "ring.h"

#define NUM_BUFFERS	offsetof(struct virtio_net_hdr_v1, num_buffers)

/* The buffers for one frame: pieces at queue->iov, heads after those that are done. */
struct buffers {
	unsigned int pieces;
	unsigned int logs;
	u16 heads;
	u16 descriptors;
	u32 visited;
};

static void publish(struct vhm_queue *queue)
{
	if (queue->done)
		vhm_ring_used(queue, queue->heads, queue->head_buffers, queue->done);
	queue->done = 0;
}

static void give_back(struct vhm_queue *queue, const struct buffers *buffers)
{
	vhm_ring_untake(queue, buffers->heads, buffers->descriptors);
}

/*
 * Take buffers for @size bytes: 1, 0 if the driver has not made enough available,
 * -EMSGSIZE if what it gave is all that may be used and too short, or an error.
 */
static int gather(struct vhm_queue *queue, size_t size, bool logs, struct buffers *buffers)
{
	unsigned int quota = vhm_has(queue, VIRTIO_NET_F_MRG_RXBUF) ? VHM_SEGMENTS : 1;
	union vhm_used *heads = queue->heads + queue->done;
	s64 left = size;
	u64 length = 0;
	int taken;

	*buffers = (struct buffers){};
	while (left > 0 && buffers->heads < quota) {
		struct vhm_chain chain;

		taken = -ENOBUFS;
		if (unlikely(buffers->pieces == VHM_SEGMENTS))
			goto undo;
		taken = vhm_ring_take(queue, &chain, buffers->pieces, logs, buffers->logs);
		if (unlikely(taken <= 0))
			goto undo;
		if (unlikely(chain.out || !chain.in)) {
			/*
			 * It alone is passed over. If good ones came before it, the first of
			 * them is instead: as many are given back as were good, from the end.
			 */
			vhm_ring_error(queue, &queue->stats.bad_buffers);
			taken = -EINVAL;
			goto undo;
		}
		length = vhm_length(queue->iov + buffers->pieces, chain.in);
		heads[buffers->heads].id = vhm_to_ring32(queue, chain.head);
		heads[buffers->heads].length = vhm_to_ring32(queue, length);
		left -= length;
		buffers->heads++;
		buffers->pieces += chain.in;
		buffers->logs += chain.logs;
		buffers->descriptors += chain.descriptors;
		buffers->visited += chain.visited;
	}
	taken = -EMSGSIZE;
	if (unlikely(left > 0))
		goto undo;
	heads[buffers->heads - 1].length = vhm_to_ring32(queue, length + left);
	return 1;
undo:
	give_back(queue, buffers);
	return taken;
}

static int put_bytes(const struct iovec *iov, size_t offset, const void *from, size_t length)
{
	while (length) {
		size_t part;

		if (offset >= iov->iov_len) {
			offset -= iov++->iov_len;
			continue;
		}
		part = min_t(size_t, iov->iov_len - offset, length);
		if (port_copy_out(port_uaddr(iov->iov_base) + offset, from, part))
			return -EFAULT;
		from += part;
		length -= part;
		offset += part;
	}
	return 0;
}

/* What of the header is ours: all of it if the backend has none, and the number of buffers. */
static int put_header(struct vhm_queue *queue, u16 heads)
{
	static const struct virtio_net_hdr none;
	u16 count = vhm_to_ring16(queue, heads);

	if (queue->header_own && put_bytes(queue->iov, 0, &none, sizeof(none)))
		return -EFAULT;
	if (!vhm_has(queue, VIRTIO_NET_F_MRG_RXBUF) && !vhm_has(queue, VIRTIO_F_VERSION_1))
		return 0;
	if (likely(queue->iov[0].iov_len >= NUM_BUFFERS + sizeof(count)))
		return port_copy_out(port_uaddr(queue->iov[0].iov_base) + NUM_BUFFERS, &count,
				     sizeof(count));
	return put_bytes(queue->iov, NUM_BUFFERS, &count, sizeof(count));
}

/*
 * Move one frame of @length bytes into its buffers: 1, 0 if it came out otherwise
 * than its length had promised and is gone, or -EFAULT.
 */
static int fill(struct vhm_queue *queue, size_t length, const struct buffers *buffers)
{
	size_t size = length + queue->header_backend;
	struct vhm_cut cut = { queue->iov, 0 };
	long got;

	if (queue->header_own)
		cut = vhm_cut(queue->iov, queue->header_own);
	got = port_receive(queue->backend, cut.piece, queue->iov + buffers->pieces - cut.piece,
			   size, queue->header_backend);
	vhm_uncut(cut);
	if (unlikely(got != (long)size))
		return 0;
	if (unlikely(put_header(queue, buffers->heads))) {
		vhm_ring_error(queue, &queue->stats.bad_addresses);
		return -EFAULT;
	}
	return 1;
}

static void finish(struct vhm_queue *queue, const struct buffers *buffers)
{
	if (unlikely(vhm_has(queue, VIRTIO_F_IN_ORDER))) {
		queue->heads[queue->done] = queue->heads[queue->done + buffers->heads - 1];
		queue->head_buffers[queue->done] = buffers->heads;
		queue->done++;
	} else {
		queue->done += buffers->heads;
	}
	if (queue->done > VHM_BATCH)
		publish(queue);
}

/* The backend has nothing: its next frame, or 0 after which it wakes us by itself. */
static size_t wait_for_frame(struct vhm_queue *queue)
{
	size_t length = 0;

	if (queue->busyloop) {
		u64 end = port_clock() + queue->busyloop;

		publish(queue);
		do {
			port_relax();
			length = port_receive_peek(queue->backend);
		} while (!length && port_clock() < end && !port_worker_busy(&queue->dev->worker));
	}
	if (!length)
		port_poll_resume(&queue->backend_poll);
	return length;
}

void vhm_receive(struct vhm_queue *queue)
{
	bool logs = vhm_has(queue, VHOST_F_LOG_ALL);
	unsigned int frames = 0;
	size_t bytes = 0;

	for (; !vhm_turn_over(frames, bytes); frames++) {
		size_t length = port_receive_peek(queue->backend);
		struct buffers buffers;
		size_t size;
		int done;

		if (!length)
			length = wait_for_frame(queue);
		if (!length)
			goto out;
		size = length + queue->header_backend + queue->header_own;
		done = gather(queue, size, logs, &buffers);
		if (unlikely(done == -EMSGSIZE)) {
			port_receive_drop(queue->backend);
			queue->stats.drops++;
			continue;
		}
		if (unlikely(!done && vhm_ring_listen(queue))) {
			vhm_ring_quiet(queue);
			continue;
		}
		/* Without buffers the frame stays where it is until the driver kicks. */
		if (unlikely(done <= 0))
			goto out;
		done = fill(queue, length, &buffers);
		if (unlikely(done <= 0)) {
			give_back(queue, &buffers);
			queue->stats.drops++;
			if (done < 0)
				goto out;
			continue;
		}
		if (unlikely(logs))
			vhm_log_frame(queue, buffers.logs, buffers.pieces, size);
		finish(queue, &buffers);
		queue->stats.frames++;
		queue->stats.bytes += length;
		bytes += size + buffers.visited * VHM_DESCRIPTOR_BYTES;
	}
	port_work_queue(&queue->work);
out:
	publish(queue);
}
