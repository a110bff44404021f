/* SPDX-License-Identifier: GPL-2.0-only */
/* Frames between a ring and its backend. */
#ifndef VHM_NET_H
#define VHM_NET_H

#include "vhm.h"

/* One turn of the worker on a ring that runs; its lock is held. */
void vhm_receive(struct vhm_queue *queue);
void vhm_transmit(struct vhm_queue *queue);

/*
 * One ring cannot keep the worker: after this much the other one has its turn. The
 * descriptors that a frame took count as bytes, since it may have very many and be short.
 */
#define VHM_DESCRIPTOR_BYTES	16

static inline bool vhm_turn_over(unsigned int frames, size_t bytes)
{
	return frames >= 256 || bytes >= 0x80000;
}

/* A place in an array of pieces, to begin there and to have it whole again. */
struct vhm_cut {
	struct iovec *piece;
	size_t bytes;
};

/* Begin @bytes later; what comes before the cut's piece is to be left out. */
static inline struct vhm_cut vhm_cut(struct iovec *iov, size_t bytes)
{
	struct vhm_cut cut = { iov, bytes };

	while (cut.bytes && cut.bytes >= cut.piece->iov_len) {
		cut.bytes -= cut.piece->iov_len;
		cut.piece++;
	}
	if (cut.bytes) {
		cut.piece->iov_base += cut.bytes;
		cut.piece->iov_len -= cut.bytes;
	}
	return cut;
}

static inline void vhm_uncut(struct vhm_cut cut)
{
	if (cut.bytes) {
		cut.piece->iov_base -= cut.bytes;
		cut.piece->iov_len += cut.bytes;
	}
}

static inline u64 vhm_length(const struct iovec *iov, unsigned int count)
{
	u64 length = 0;

	while (count--)
		length += iov++->iov_len;
	return length;
}

#endif
