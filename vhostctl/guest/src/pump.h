/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Loops that keep queues moving without an interpreter. Each returns 0 when it was stopped or
 * has done what it was asked for, -EINTR when the caller should look for signals and call again,
 * and another -errno (-EPROTO: see ring.fault) when it cannot go on.
 */
#ifndef VHOSTCTL_GUEST_PUMP_H
#define VHOSTCTL_GUEST_PUMP_H

#include "net.h"

/* Longest sleep: a signal that came just before it is looked at after no longer than this. */
#define PUMP_SLICE_US 1000000

/* A loop that always finds work looks at its stop file once in so many rounds. */
#define PUMP_LOOK_EVERY 16u

enum pump_want {
	PUMP_RX = 1,		/* a used entry of the receive queue */
	PUMP_TX = 2,		/* a good part of the transmit queue used */
	PUMP_DRAIN = 4,		/* all of it used */
	PUMP_FD = 8,		/* `fd` readable */
	PUMP_FLOW = 16,		/* a good part of the receive queue used, or the time is over */
};

struct pump {
	struct net_queue *rx, *tx;	/* NULL where nothing is wanted of them */
	int stop, wake, fd;		/* -1: none */
	unsigned int busy;		/* rounds without a look at the files */
	bool stopped;			/* `stop` was readable; it is left so */
	bool readable;			/* `fd` was readable, or has an error to tell */
};

int pump_wait(struct pump *p, unsigned int want, int64_t timeout_us);

int pump_ready(struct net_queue *rx, struct net_queue *tx, int timeout_ms);
int pump_send(struct net_queue *tx, const uint8_t *frames, const uint32_t *lengths,
	      uint32_t count);
int pump_receive(struct net_queue *rx, uint8_t *to, uint32_t room, uint32_t *lengths,
		 uint32_t limit);
int pump_sink(struct net_queue *rx, int stop, uint64_t until);
int pump_transmit(struct net_queue *tx, int stop, const uint8_t *frame, uint32_t len,
		  uint64_t until);

#endif
