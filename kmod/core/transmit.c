// SPDX-License-Identifier: GPL-2.0-only
/* From the guest's transmit ring to the backend. */
#include "net.h"
#include "ring.h"

/* Let the backend have what it keeps, and the driver its buffers. */
static void flush(struct vhm_queue *queue)
{
	unsigned int done = queue->done;

	queue->done = 0;
	/* Buffers of frames that a vanished device refused are not given back. */
	if (!done || port_send_flush(queue->backend))
		return;
	if (unlikely(vhm_has(queue, VIRTIO_F_IN_ORDER))) {
		queue->heads[0] = queue->heads[done - 1];
		queue->head_buffers[0] = done;
		done = 1;
	}
	vhm_ring_used(queue, queue->heads, queue->head_buffers, done);
}

/* The ring is empty. True if it is worth another look, after polling or a race. */
static bool wait_for_more(struct vhm_queue *queue)
{
	if (queue->busyloop) {
		u64 end = port_clock() + queue->busyloop;

		while (!vhm_ring_more(queue) && port_clock() < end &&
		       !port_worker_busy(&queue->dev->worker))
			port_relax();
		if (vhm_ring_more(queue))
			return true;
	}
	if (!vhm_ring_listen(queue))
		return false;
	vhm_ring_quiet(queue);
	return true;
}

/* Send what a chain holds: its bytes, or an error of port_send(). */
static long send(struct vhm_queue *queue, const struct vhm_chain *chain, size_t bytes)
{
	size_t length = vhm_length(queue->iov, chain->out);
	struct vhm_cut cut = { queue->iov, 0 };
	bool more;
	int error;

	if (unlikely(chain->in || length <= queue->header_own)) {
		vhm_ring_error(queue, &queue->stats.bad_buffers);
		return -ENODATA;
	}
	length -= queue->header_own;
	if (queue->header_own)
		cut = vhm_cut(queue->iov, queue->header_own);
	more = queue->avail_seen != queue->last_avail && !vhm_turn_over(0, bytes + length);
	error = port_send(queue->backend, cut.piece, queue->iov + chain->out - cut.piece,
			  length, queue->header_backend, more);
	if (unlikely(error))
		return error;
	queue->stats.frames++;
	queue->stats.bytes += length - min_t(size_t, length, queue->header_backend);
	return length;
}

void vhm_transmit(struct vhm_queue *queue)
{
	unsigned int frames = 0;
	size_t bytes = 0;

	while (!vhm_turn_over(frames, bytes)) {
		struct vhm_chain chain;
		long length;
		int taken;

		if (queue->done == VHM_BATCH)
			flush(queue);
		taken = vhm_ring_take(queue, &chain, 0, false, 0);
		if (unlikely(taken < 0))
			goto out;
		if (!taken) {
			flush(queue);
			if (wait_for_more(queue))
				continue;
			goto out;
		}
		length = send(queue, &chain, bytes);
		if (unlikely(length < 0)) {
			/* A buffer of the wrong kind is passed over, the rest is tried again. */
			if (length != -ENODATA)
				vhm_ring_untake(queue, 1, chain.descriptors);
			if (length == -EAGAIN)
				port_poll_resume(&queue->backend_poll);
			else if (length != -ENODATA)
				queue->stats.bad_frames++;
			goto out;
		}
		queue->heads[queue->done].id = vhm_to_ring32(queue, chain.head);
		queue->heads[queue->done].length = 0;
		queue->done++;
		frames++;
		bytes += length + chain.visited * VHM_DESCRIPTOR_BYTES;
	}
	port_work_queue(&queue->work);
out:
	flush(queue);
}
