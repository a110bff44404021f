/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Two queue pairs joined: what one receives the other sends, behind the same header, so that a
 * packet which is still to be cut into segments, or to get its checksum, passes as it is.
 *
 * A frame that the other side has no room for waits in the queue that it came from. A checksum
 * that the other side would not complete is completed here. What is dropped is counted: a frame
 * whose header cannot be true, and one that has to be cut for a side that does not do it.
 */
#ifndef VHOSTCTL_GUEST_PATCH_H
#define VHOSTCTL_GUEST_PATCH_H

#include "pump.h"

enum { PATCH_LANES = 2 };

/* One direction. */
struct patch_stats {
	uint64_t frames, bytes;		/* sent on, without headers */
	uint64_t gso;			/* of them, still to be cut */
	uint64_t completed;		/* of them, with a checksum that was completed here */
	uint64_t greatest;		/* longest frame sent on, in bytes */
	uint64_t malformed, refused;	/* frames dropped */
};

struct patch;

struct patch *patch_create(struct net_queue *rx0, struct net_queue *tx0, struct net_queue *rx1,
			   struct net_queue *tx1, int stop);
void patch_destroy(struct patch *p);
int patch_run(struct patch *p);
void patch_read_stats(const struct patch *p, unsigned int from, struct patch_stats *s);

#endif
