/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Frames between a queue pair and a packet socket or a tap, in batches.
 *
 * With `vnet_hdr` (PACKET_VNET_HDR, IFF_VNET_HDR) every frame on the file stands behind a struct
 * virtio_net_hdr of 10 bytes. It is zero on the way out. On the way in, a checksum that was left
 * to the receiver is completed, since the queue's own header says that there is none to complete;
 * a packet that was left to be cut into segments is dropped.
 */
#ifndef VHOSTCTL_GUEST_FORWARD_H
#define VHOSTCTL_GUEST_FORWARD_H

#include "pump.h"

struct forward_stats {
	uint64_t to_file, from_file;	/* frames */
	uint64_t dropped;		/* the file was full, or a frame not for the queue */
};

struct forward;

struct forward *forward_create(struct net_queue *rx, struct net_queue *tx, int stop, int fd,
			       bool socket, bool vnet_hdr);
void forward_destroy(struct forward *f);
int forward_run(struct forward *f);
void forward_read_stats(const struct forward *f, struct forward_stats *s);

#endif
