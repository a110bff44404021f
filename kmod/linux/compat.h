/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What differs between kernels, and nowhere else: by feature where one can be
 * seen, since distributions backport; by version where a change left no mark.
 */
#ifndef VHM_COMPAT_H
#define VHM_COMPAT_H

#include <linux/eventfd.h>
#include <linux/if_tun.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <net/xdp.h>

/*
 * Threads of the owner's process that run kernel code: there since 6.4; what is to
 * be done when one is killed is asked for since 6.10, and not to be told is to hang.
 */
#if IS_ENABLED(CONFIG_VHOST_TASK) && LINUX_VERSION_CODE >= KERNEL_VERSION(6, 10, 0)
#include <linux/sched/vhost_task.h>
#define VHM_HAVE_TASK 1
#else
#define VHM_HAVE_TASK 0
#endif

/* Since 6.8 a signal is always one more. */
static inline void vhm_eventfd_signal(struct eventfd_ctx *context)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 8, 0)
	eventfd_signal(context);
#else
	eventfd_signal(context, 1);
#endif
}

/*
 * Where tun and tap look for the virtio_net_hdr of a frame that they are given as
 * a buffer, and for the size of that buffer. Up to 6.16 both are in a struct at the
 * buffer's start; it was removed then, and defining it again proves that.
 */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 17, 0)
struct tun_xdp_hdr {
	struct virtio_net_hdr gso;
};

static inline void vhm_tun_buffer_size(void *buffer, u32 size)
{
}
#else
static inline void vhm_tun_buffer_size(void *buffer, u32 size)
{
	((struct tun_xdp_hdr *)buffer)->buflen = size;
}
#endif

static inline void *vhm_tun_header(void *buffer)
{
	return buffer + offsetof(struct tun_xdp_hdr, gso);
}

/*
 * Whether a load that faults may jump. Without that every load is followed by a
 * test, and copying word by word does not pay.
 */
#ifdef CONFIG_CC_HAS_ASM_GOTO_OUTPUT
#define VHM_HAVE_FAULT_JUMPS 1
#else
#define VHM_HAVE_FAULT_JUMPS 0
#endif

#endif
