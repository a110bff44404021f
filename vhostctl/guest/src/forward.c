// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "forward.h"

#include "inet.h"

#include <errno.h>
#include <linux/virtio_net.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define BATCH 64u

struct forward {
	struct pump pump;
	bool socket;
	uint32_t header;		/* bytes before each frame of the file: 0 or 10 */
	uint32_t limit;			/* longest frame of the transmit queue */
	struct forward_stats stats;
	struct virtio_net_hdr zero;
	struct iovec *out_iov;		/* a header for each of a batch, and what a ring can hold */
	struct iovec in_iov[BATCH];
	struct mmsghdr in[BATCH];	/* one fixed buffer each */
	struct mmsghdr out[BATCH];	/* over guest memory */
	uint8_t buffers[];		/* one byte more than allowed each, to tell a longer frame */
};

struct forward *forward_create(struct net_queue *rx, struct net_queue *tx, int stop, int fd,
			       bool socket, bool vnet_hdr)
{
	uint32_t header = vnet_hdr ? sizeof(struct virtio_net_hdr) : 0;
	uint32_t size = header + tx->shape.limit + 1;
	struct forward *f = calloc(1, sizeof(*f) + (size_t)BATCH * size);

	if (!f)
		return NULL;
	f->out_iov = calloc(BATCH + (size_t)rx->ring.vring.num * rx->shape.segments,
			    sizeof(*f->out_iov));
	if (!f->out_iov) {
		free(f);
		return NULL;
	}
	f->pump = (struct pump){.rx = rx, .tx = tx, .stop = stop, .wake = -1, .fd = fd};
	f->socket = socket;
	f->header = header;
	f->limit = tx->shape.limit;
	for (uint32_t i = 0; i < BATCH; i++) {
		f->in_iov[i] = (struct iovec){
			.iov_base = f->buffers + (size_t)i * size,
			.iov_len = size,
		};
		f->in[i].msg_hdr = (struct msghdr){.msg_iov = &f->in_iov[i], .msg_iovlen = 1};
	}
	return f;
}

void forward_destroy(struct forward *f)
{
	free(f->out_iov);
	free(f);
}

void forward_read_stats(const struct forward *f, struct forward_stats *s)
{
	s->to_file = counter_read(&f->stats.to_file);
	s->from_file = counter_read(&f->stats.from_file);
	s->dropped = counter_read(&f->stats.dropped);
}

/* Hand over the messages from `done` on; returns how many were taken, or -1 and errno. */
static int write_frames(struct forward *f, uint32_t done, uint32_t count)
{
	const struct msghdr *m = &f->out[done].msg_hdr;

	if (f->socket)
		return sendmmsg(f->pump.fd, &f->out[done], count - done,
				MSG_DONTWAIT | MSG_NOSIGNAL);
	return writev(f->pump.fd, m->msg_iov, (int)m->msg_iovlen) < 0 ? -1 : 1;
}

/* What is no fault of ours or of the file, but of one frame or of one moment. */
static bool is_drop(int error)
{
	return error == EAGAIN || error == ENOBUFS || error == EMSGSIZE || error == EINVAL ||
	       error == EIO || error == ENETDOWN;
}

static int flush(struct forward *f, uint32_t count)
{
	for (uint32_t done = 0; done < count;) {
		int n = write_frames(f, done, count);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && !is_drop(errno))
			return -errno;
		counter_add(n < 0 ? &f->stats.dropped : &f->stats.to_file, n < 0 ? 1 : (uint64_t)n);
		done += n < 0 ? 1 : (uint32_t)n;
	}
	return 0;
}

/* Lay out a frame as the file wants it from `iov` on; returns how many entries that took. */
static uint32_t wrap(struct forward *f, struct iovec *iov, const struct net_frame *frame)
{
	uint32_t n = 0;

	if (f->header)
		iov[n++] = (struct iovec){.iov_base = &f->zero, .iov_len = f->header};
	memcpy(&iov[n], frame->iov, frame->count * sizeof(*iov));
	return n + frame->count;
}

/* Queue to file: up to a batch. Returns how many frames were taken, or -errno. */
static int to_file(struct forward *f)
{
	struct iovec *iov = f->out_iov;
	struct net_frame frame;
	uint32_t n = 0;
	int err = 0;

	for (; n < BATCH && (err = net_next(f->pump.rx, &frame)) > 0; n++) {
		uint32_t count = wrap(f, iov, &frame);

		f->out[n].msg_hdr = (struct msghdr){.msg_iov = iov, .msg_iovlen = count};
		iov += count;
	}
	if (err < 0)
		return err;
	err = flush(f, n);
	if (!err)
		err = net_refill(f->pump.rx);
	return err ? err : (int)n;
}

/* Read up to `limit` frames; returns how many, or -1 and errno. */
static int read_frames(struct forward *f, uint32_t limit)
{
	uint32_t n = 0;

	if (f->socket)
		return recvmmsg(f->pump.fd, f->in, limit, MSG_DONTWAIT, NULL);
	for (; n < limit; n++) {
		ssize_t len = read(f->pump.fd, f->in_iov[n].iov_base, f->in_iov[n].iov_len);

		if (len < 0)
			return n ? (int)n : -1;
		f->in[n].msg_len = (unsigned int)len;
	}
	return (int)n;
}

/* Make what was read, header and frame, fit for the queue; false: it cannot be. */
static bool unwrap(const struct forward *f, uint8_t *data, uint32_t len)
{
	struct virtio_net_hdr h;

	if (len <= f->header || len - f->header > f->limit)
		return false;
	if (!f->header)
		return true;
	memcpy(&h, data, sizeof(h));
	if (h.gso_type != VIRTIO_NET_HDR_GSO_NONE)
		return false;
	return !(h.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) ||
	       inet_complete(data + f->header, len - f->header, h.csum_start, h.csum_offset);
}

/* What a failed read means for the loop: 0 to go on, or -errno. */
static int read_failed(struct forward *f, int error)
{
	/* The file took a frame out that its header has no type for; the next may be there. */
	if (f->header && error == EINVAL) {
		counter_add(&f->stats.dropped, 1);
		return 0;
	}
	f->pump.readable = false;
	return error == EAGAIN || error == EINTR || error == ENETDOWN ? 0 : -error;
}

/* File to queue: as many as there is room for. Returns 0 or -errno. */
static int from_file(struct forward *f)
{
	struct net_queue *tx = f->pump.tx;
	uint32_t room = net_room(tx);
	uint32_t limit = room < BATCH ? room : BATCH;
	int n = read_frames(f, limit);

	if (n < 0)
		return read_failed(f, errno);
	f->pump.readable = n == (int)limit;
	for (int i = 0; i < n; i++) {
		uint8_t *data = f->in_iov[i].iov_base;
		uint32_t len = f->in[i].msg_len;
		bool fits = unwrap(f, data, len) &&
			    net_put(tx, data + f->header, len - f->header);

		counter_add(fits ? &f->stats.from_file : &f->stats.dropped, 1);
	}
	return ring_publish(&tx->ring);
}

/* Forward both ways until stopped. */
int forward_run(struct forward *f)
{
	struct pump *p = &f->pump;
	int err;

	p->stopped = false;
	do {
		int taken = to_file(f);
		unsigned int want = PUMP_RX | PUMP_FD;

		err = taken < 0 ? taken : net_reclaim(p->tx);
		if (!err && p->readable && net_room(p->tx))
			err = from_file(f);
		if (err)
			break;
		if (!net_room(p->tx))
			want = PUMP_RX | PUMP_TX;
		err = pump_wait(p, want, PUMP_SLICE_US);
	} while (!err && !p->stopped);
	return err;
}
