// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "pump.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

/* How long a frame may wait for others before it is received, where they come one by another. */
#define FLOW_US 200

enum { RX, TX, STOP, WAKE, FD, FILES };

static bool arm(struct pump *p, unsigned int want)
{
	bool there = false;

	if (want & PUMP_RX)
		there |= ring_arm(&p->rx->ring, 1);
	else if (want & PUMP_FLOW && p->rx->ring.event_idx)
		there |= ring_arm(&p->rx->ring, net_flow(p->rx));
	if (want & PUMP_DRAIN)
		there |= ring_arm(&p->tx->ring, (uint16_t)(p->tx->ring.published -
							   p->tx->ring.used_idx));
	else if (want & PUMP_TX)
		there |= ring_arm(&p->tx->ring, net_batch(p->tx));
	return there;
}

static void disarm(struct pump *p)
{
	if (p->rx)
		ring_disarm(&p->rx->ring);
	if (p->tx)
		ring_disarm(&p->tx->ring);
}

static int look(struct pump *p, unsigned int want, int64_t timeout_us)
{
	struct pollfd files[FILES] = {
		[RX] = {.fd = p->rx ? p->rx->ring.call : -1, .events = POLLIN},
		[TX] = {.fd = p->tx ? p->tx->ring.call : -1, .events = POLLIN},
		[STOP] = {.fd = p->stop, .events = POLLIN},
		[WAKE] = {.fd = p->wake, .events = POLLIN},
		[FD] = {.fd = want & PUMP_FD ? p->fd : -1, .events = POLLIN},
	};
	const struct timespec timeout = {
		.tv_sec = timeout_us / 1000000,
		.tv_nsec = timeout_us % 1000000 * 1000,
	};
	uint64_t drained;
	int n = ppoll(files, FILES, &timeout, NULL);

	if (n < 0)
		return -errno;
	if (!n)
		return timeout_us && !(want & PUMP_FLOW) ? -EINTR : 0;
	for (int i = 0; i < FD; i++)
		if (files[i].revents & ~POLLIN)
			return -EBADF;
	if (files[RX].revents)
		ring_ack_call(&p->rx->ring);
	if (files[TX].revents)
		ring_ack_call(&p->tx->ring);
	if (files[WAKE].revents && read(p->wake, &drained, sizeof(drained)) < 0 && errno != EAGAIN)
		return -errno;
	p->stopped |= files[STOP].revents != 0;
	p->readable |= files[FD].revents != 0;
	return 0;
}

/*
 * Sleep until something that is wanted is there, `stop` or `wake` is signalled, or the time is
 * over (-EINTR). Queues interrupt during the sleep only. With a timeout of 0, or when entries
 * came while interrupts were being asked for, there is no sleep and mostly no system call.
 */
int pump_wait(struct pump *p, unsigned int want, int64_t timeout_us)
{
	int err = 0;

	if (arm(p, want))
		timeout_us = 0;
	if (timeout_us || ++p->busy % PUMP_LOOK_EVERY == 0)
		err = look(p, want, timeout_us);
	disarm(p);
	return err;
}

/* What there is to do without a wait: 1 or 0, or -EPROTO. */
static int ready(struct net_queue *rx, struct net_queue *tx)
{
	int err = 0;

	if (tx) {
		err = net_reclaim(tx);
		if (!err && net_room(tx))
			return 1;
	}
	if (rx && !err)
		err = ring_pending(&rx->ring);
	return err > 0 ? 1 : err;
}

/*
 * Wait until `rx` has something to receive or `tx` has room for any frame: 1, or 0 after a
 * wake-up that brought nothing.
 */
int pump_ready(struct net_queue *rx, struct net_queue *tx, int timeout_ms)
{
	struct pump p = {.rx = rx, .tx = tx, .stop = -1, .wake = -1, .fd = -1};
	unsigned int want = (rx ? PUMP_RX : 0) | (tx ? PUMP_TX : 0);
	int err = ready(rx, tx);

	if (err)
		return err;
	err = pump_wait(&p, want, timeout_ms * INT64_C(1000));
	return err ? err : ready(rx, tx);
}

/* Queue packed frames while there is room and show them to the device: how many, or -errno. */
int pump_send(struct net_queue *tx, const uint8_t *frames, const uint32_t *lengths, uint32_t count)
{
	uint32_t done;
	int err = net_reclaim(tx);

	if (err)
		return err;
	for (done = 0; done < count && net_put(tx, frames, lengths[done]); done++)
		frames += lengths[done];
	err = ring_publish(&tx->ring);
	return err ? err : (int)done;
}

/*
 * Copy out up to `limit` frames, packed, while any frame would fit into `room` bytes, and post
 * their buffers again: how many, or -errno.
 */
int pump_receive(struct net_queue *rx, uint8_t *to, uint32_t room, uint32_t *lengths,
		 uint32_t limit)
{
	struct net_frame f;
	uint32_t n = 0;
	int err = 0;

	while (n < limit && room >= rx->shape.limit && (err = net_next(rx, &f)) > 0) {
		lengths[n++] = net_copy(&f, to);
		to += f.len;
		room -= f.len;
	}
	/* What came before a fault is still good; the next call tells of the fault. */
	if (err < 0 && !n)
		return err;
	err = net_refill(rx);
	return err ? err : (int)n;
}

/* Receive and drop what is there and post the buffers again; returns 0 or -errno. */
static int sink_round(struct net_queue *rx, uint64_t until)
{
	struct net_frame f;
	int err = 0;

	while (!err && rx->frames < until && (err = net_next(rx, &f)) > 0)
		/* Half a ring at a time: few avail updates, and the device never starves. */
		err = rx->ring.free_count >= rx->ring.vring.num / 2 ? net_refill(rx) : 0;
	return err ? err : net_refill(rx);
}

/*
 * Receive and drop until the queue's frame counter reads `until`. While frames flow, the loop
 * sleeps until a good part of the ring is used or a short time is over, and is interrupted once
 * for many frames; when none came in that time it waits for the next one.
 */
int pump_sink(struct net_queue *rx, int stop, uint64_t until)
{
	struct pump p = {.rx = rx, .stop = stop, .wake = -1, .fd = -1};
	uint64_t before;
	int err;

	do {
		before = rx->frames;
		err = sink_round(rx, until);
		if (err || rx->frames >= until)
			break;
		err = rx->frames > before ? pump_wait(&p, PUMP_FLOW, FLOW_US) :
					    pump_wait(&p, PUMP_RX, PUMP_SLICE_US);
	} while (!err && !p.stopped);
	return err;
}

/*
 * Send `frame` until the queue's frame counter reads `until` and the device has used all. Each
 * frame is written into its buffer anew, as a driver with payloads to send would do.
 */
int pump_transmit(struct net_queue *tx, int stop, const uint8_t *frame, uint32_t len,
		  uint64_t until)
{
	struct pump p = {.tx = tx, .stop = stop, .wake = -1, .fd = -1};
	int err;

	do {
		err = net_reclaim(tx);
		while (!err && tx->frames < until && net_put(tx, frame, len))
			;
		if (!err)
			err = ring_publish(&tx->ring);
		if (err || (tx->frames >= until && (uint16_t)tx->ring.published ==
							   tx->ring.used_idx))
			break;
		err = pump_wait(&p, tx->frames < until ? PUMP_TX : PUMP_DRAIN, PUMP_SLICE_US);
	} while (!err && !p.stopped);
	return err;
}
