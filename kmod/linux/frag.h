/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Buffers that become packets: pieces of a large page, each with a reference to it.
 *
 * References are taken many at a time, when the page is new, and handed out with
 * the pieces. When the page is used up and all pieces have been freed, which is so
 * whenever the stack consumes packets while they are sent, it is used again.
 */
#ifndef VHM_FRAG_H
#define VHM_FRAG_H

#include <linux/mm.h>
#include <linux/uio.h>

struct frag {
	struct page *page;
	void *start;
	unsigned int size;
	unsigned int offset;
	unsigned int held;	/* references that are ours still */
};

bool frag_renew(struct frag *frag);
void frag_free(struct frag *frag);

/* Copy the pieces, one after the other: 0 or -EFAULT. */
int frag_copy(void *to, const struct iovec *iov, unsigned int count);

/* @size bytes, PAGE_SIZE at most, that are taken by frag_commit() only; NULL if there are none. */
static inline void *frag_reserve(struct frag *frag, unsigned int size)
{
	if (unlikely(frag->offset + size > frag->size) && !frag_renew(frag))
		return NULL;
	return frag->start + frag->offset;
}

static inline void frag_commit(struct frag *frag, unsigned int size)
{
	frag->offset += size;
	frag->held--;
}

#endif
