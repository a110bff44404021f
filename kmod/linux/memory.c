// SPDX-License-Identifier: GPL-2.0-only
/* Memory of our own, and the log of pages that only the owner may map. */
#include <linux/bitops.h>
#include <linux/highmem.h>
#include <linux/mm.h>
#include "vhm.h"

void *port_alloc(size_t length)
{
	if (vhm_fails(PORT_FAULT_ALLOC))
		return NULL;
	return kvzalloc(length, GFP_KERNEL_ACCOUNT);
}

void port_free(void *memory)
{
	kvfree(memory);
}

/* The page is pinned, as a migration reads and clears the same bits meanwhile. */
int port_set_bit(u64 uaddr, unsigned int bit)
{
	struct page *page;
	void *base;

	if (vhm_fails(PORT_FAULT_COPY) || !port_range_ok(uaddr, 1) ||
	    pin_user_pages_fast(uaddr, 1, FOLL_WRITE, &page) != 1)
		return -EFAULT;
	base = kmap_local_page(page);
	set_bit_le(offset_in_page(uaddr) * BITS_PER_BYTE + bit, base);
	kunmap_local(base);
	unpin_user_pages_dirty_lock(&page, 1, true);
	return 0;
}
