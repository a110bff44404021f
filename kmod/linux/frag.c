// SPDX-License-Identifier: GPL-2.0-only
/* Pages for frames, and the copy into them. */
#include <linux/gfp.h>
#include <linux/page_ref.h>
#include <linux/uaccess.h>
#include "frag.h"
#include "port.h"

#define ORDER		get_order(32768)
#define REFERENCES	65536
/* More than the pieces of a page. */
#define FEW_REFERENCES	1024

/* Up to here a loop over words is faster than starting a string instruction. */
#define SHORT_COPY	256

static struct page *alloc_largest(unsigned int *size)
{
	struct page *page;

	*size = PAGE_SIZE << ORDER;
	page = alloc_pages((GFP_KERNEL & ~__GFP_DIRECT_RECLAIM) | __GFP_COMP | __GFP_NOWARN |
			   __GFP_NORETRY, ORDER);
	if (likely(page))
		return page;
	*size = PAGE_SIZE;
	return alloc_page(GFP_KERNEL);
}

bool frag_renew(struct frag *frag)
{
	struct page *page = frag->page;

	/* Nobody has a reference but we, so nobody can get one. */
	if (page && page_ref_count(page) == frag->held && !page_is_pfmemalloc(page)) {
		if (unlikely(frag->held < FEW_REFERENCES)) {
			page_ref_add(page, REFERENCES - frag->held);
			frag->held = REFERENCES;
		}
		frag->offset = 0;
		return true;
	}
	frag_free(frag);
	page = alloc_largest(&frag->size);
	if (unlikely(!page)) {
		frag->size = 0;
		return false;
	}
	page_ref_add(page, REFERENCES - 1);
	frag->held = REFERENCES;
	frag->page = page;
	frag->start = page_address(page);
	frag->offset = 0;
	return true;
}

void frag_free(struct frag *frag)
{
	if (!frag->page)
		return;
	page_ref_sub(frag->page, frag->held - 1);
	put_page(frag->page);
	frag->page = NULL;
	frag->size = 0;
}

#define COPY_WORDS(type)								\
	for (; length >= sizeof(type); length -= sizeof(type)) {			\
		unsafe_get_user(*(type *)to, (const type __user *)from, fault);		\
		to += sizeof(type);							\
		from += sizeof(type);							\
	}

static int copy_short(void *to, const void __user *from, size_t length)
{
	if (unlikely(!user_read_access_begin(from, length)))
		return -EFAULT;
	for (; length >= 4 * sizeof(u64); length -= 4 * sizeof(u64)) {
		unsafe_get_user(((u64 *)to)[0], (const u64 __user *)from, fault);
		unsafe_get_user(((u64 *)to)[1], (const u64 __user *)from + 1, fault);
		unsafe_get_user(((u64 *)to)[2], (const u64 __user *)from + 2, fault);
		unsafe_get_user(((u64 *)to)[3], (const u64 __user *)from + 3, fault);
		to += 4 * sizeof(u64);
		from += 4 * sizeof(u64);
	}
	COPY_WORDS(u64);
	COPY_WORDS(u32);
	COPY_WORDS(u8);
	user_read_access_end();
	return 0;
fault:
	user_read_access_end();
	return -EFAULT;
}

int frag_copy(void *to, const struct iovec *iov, unsigned int count)
{
	const struct iovec *end = iov + count;

	if (vhm_fails(PORT_FAULT_COPY))
		return -EFAULT;
	for (; iov < end; iov++) {
		size_t length = iov->iov_len;

		if (VHM_HAVE_FAULT_JUMPS && length <= SHORT_COPY) {
			if (unlikely(copy_short(to, iov->iov_base, length)))
				return -EFAULT;
		} else if (unlikely(!access_ok(iov->iov_base, length) ||
				    raw_copy_from_user(to, iov->iov_base, length))) {
			return -EFAULT;
		}
		to += length;
	}
	return 0;
}
