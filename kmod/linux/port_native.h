/* SPDX-License-Identifier: GPL-2.0-only */
/* The kernel's types behind ../core/port.h, and its inline operations. */
#ifndef VHM_PORT_NATIVE_H
#define VHM_PORT_NATIVE_H

#include <linux/errno.h>
#include <linux/jump_label.h>
#include <linux/llist.h>
#include <linux/minmax.h>
#include <linux/mutex.h>
#include <linux/poll.h>
#include <linux/sched.h>
#include <linux/sched/clock.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/uio.h>
#include "compat.h"
#include "trace.h"

struct mm_struct;
struct ptr_ring;
struct task_struct;
struct vhost_task;

struct port_lock {
	struct mutex mutex;	/* what it protects is the core's to say */
};

struct port_worker {
	struct llist_head works;
	struct mm_struct *mm;		/* the owner's, NULL without one */
	struct task_struct *task;
	struct vhost_task *vtask;	/* NULL if task is a kernel thread */
	bool dead;			/* killed with its owner: nothing runs any more */
};

struct port_work {
	struct llist_node node;
	unsigned long queued;		/* bit 0, from being queued until it begins to run */
	struct port_worker *worker;
	struct vhm_queue *queue;	/* NULL: a flush waits for this */
};

struct port_poll {
	wait_queue_entry_t entry;
	poll_table table;
	wait_queue_head_t *head;	/* what is watched, or was before a pause */
	struct port_work *work;
	struct file *file;
	struct ptr_ring *ring;		/* says whether the file is readable, if there */
	__poll_t events;
	bool watching;			/* entry is in head's list */
	unsigned long wakes;		/* how often it queued the work; under the lock of head */
};

static inline void __user *port_pointer(u64 uaddr)
{
	return (void __user *)(unsigned long)uaddr;
}

static inline u64 port_uaddr(const void __user *pointer)
{
	return (__force unsigned long)pointer;
}

static inline bool port_range_ok(u64 uaddr, u64 length)
{
	return uaddr == (unsigned long)uaddr && length == (unsigned long)length &&
	       access_ok(port_pointer(uaddr), length);
}

DECLARE_STATIC_KEY_FALSE(vhm_faults);
bool vhm_fault(enum port_site site);

/* Whether an operation at @site is to fail, because a module parameter says so. */
static __always_inline bool vhm_fails(enum port_site site)
{
	return static_branch_unlikely(&vhm_faults) && vhm_fault(site);
}

#define VHM_DEFINE_GET(name, type)							\
static __always_inline int name(type *value, u64 uaddr)					\
{											\
	const type __user *from = port_pointer(uaddr);					\
											\
	if (vhm_fails(PORT_FAULT_COPY) ||						\
	    unlikely(!user_read_access_begin(from, sizeof(type))))			\
		return -EFAULT;								\
	unsafe_get_user(*value, from, fault);						\
	user_read_access_end();								\
	return 0;									\
fault:											\
	user_read_access_end();								\
	return -EFAULT;									\
}

#define VHM_DEFINE_PUT(name, type)							\
static __always_inline int name(type value, u64 uaddr)					\
{											\
	type __user *to = port_pointer(uaddr);						\
											\
	if (vhm_fails(PORT_FAULT_COPY) ||						\
	    unlikely(!user_write_access_begin(to, sizeof(type))))			\
		return -EFAULT;								\
	unsafe_put_user(value, to, fault);						\
	user_write_access_end();							\
	return 0;									\
fault:											\
	user_write_access_end();							\
	return -EFAULT;									\
}

VHM_DEFINE_GET(port_get16, u16)
VHM_DEFINE_PUT(port_put16, u16)
VHM_DEFINE_PUT(port_put64, u64)

/* A descriptor: two words in one access, as there is one for every buffer. */
static __always_inline int port_get128(u64 to[2], u64 uaddr)
{
	const u64 __user *from = port_pointer(uaddr);

	if (vhm_fails(PORT_FAULT_COPY) || unlikely(!user_read_access_begin(from, 16)))
		return -EFAULT;
	unsafe_get_user(to[0], from, fault);
	unsafe_get_user(to[1], from + 1, fault);
	user_read_access_end();
	return 0;
fault:
	user_read_access_end();
	return -EFAULT;
}

static __always_inline int port_copy_in(void *to, u64 uaddr, size_t length)
{
	if (vhm_fails(PORT_FAULT_COPY) || copy_from_user(to, port_pointer(uaddr), length))
		return -EFAULT;
	return 0;
}

static inline int port_copy_out(u64 uaddr, const void *from, size_t length)
{
	if (vhm_fails(PORT_FAULT_COPY) || copy_to_user(port_pointer(uaddr), from, length))
		return -EFAULT;
	return 0;
}

static inline void port_mb(void)
{
	smp_mb(); /* the core says what for */
}

static inline void port_rmb(void)
{
	smp_rmb(); /* the core says what for */
}

static inline void port_wmb(void)
{
	smp_wmb(); /* the core says what for */
}

/* A macro, so that each place that initialises a lock makes a lockdep class. */
#define port_lock_init(lock) mutex_init(&(lock)->mutex)

static inline void port_lock(struct port_lock *lock)
{
	mutex_lock(&lock->mutex);
}

static inline void port_unlock(struct port_lock *lock)
{
	mutex_unlock(&lock->mutex);
}

static inline u64 port_clock(void)
{
	return local_clock() >> 10;
}

static inline void port_relax(void)
{
	cpu_relax();
}

static inline void port_trace_run(const struct vhm_queue *queue)
{
	trace_vhm_run(queue);
}

static inline void port_trace_chain(const struct vhm_queue *queue, u16 head, int out, int in)
{
	trace_vhm_chain(queue, head, out, in);
}

static inline void port_trace_used(const struct vhm_queue *queue, u16 count)
{
	trace_vhm_used(queue, count);
}

static inline void port_trace_signal(const struct vhm_queue *queue)
{
	trace_vhm_signal(queue);
}

static inline void port_trace_error(const struct vhm_queue *queue, int cause)
{
	trace_vhm_error(queue, cause);
}

#endif
