/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Frames between a queue pair and a packet socket or a tap, in batches. */
#ifndef VHOSTCTL_GUEST_FORWARD_H
#define VHOSTCTL_GUEST_FORWARD_H

#include "pump.h"

struct forward_stats {
	uint64_t to_file, from_file;	/* frames */
	uint64_t dropped;		/* the file was full, or a frame too long for the queue */
};

struct forward;

struct forward *forward_create(struct net_queue *rx, struct net_queue *tx, int stop, int fd,
			       bool socket);
void forward_destroy(struct forward *f);
int forward_run(struct forward *f);
void forward_read_stats(const struct forward *f, struct forward_stats *s);

#endif
