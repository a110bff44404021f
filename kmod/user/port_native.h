/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Native types and inline operations of the port to a process.
 *
 * The owner's memory is this process's own, where anything may be unmapped at any
 * time. So each instruction that touches it has an entry in the section vhm_fixups,
 * and the handler of SIGSEGV and SIGBUS in guard.c goes on at the entry's other
 * address. Other machines than x86-64 let the kernel do the access. -DVHM_PORTABLE
 * takes that way everywhere, -DVHM_HOSTILE adds what hostile.h declares.
 */
#ifndef VHM_PORT_NATIVE_H
#define VHM_PORT_NATIVE_H

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int32_t s32;
typedef int64_t s64;

#define __user
#define __force
#define likely(x)	__builtin_expect(!!(x), 1)
#define unlikely(x)	__builtin_expect(!!(x), 0)
#define container_of(pointer, type, member) \
	((type *)((char *)(pointer) - offsetof(type, member)))
#define min_t(type, a, b) \
	({ type a_ = (a), b_ = (b); a_ < b_ ? a_ : b_; })
#define min(a, b)	min_t(__typeof__((a) + 0), a, b)

struct port_lock {
	pthread_mutex_t mutex;
};

struct port_work {
	struct port_worker *worker;
	struct vhm_queue *queue;
	unsigned int bit;
};

struct port_poll {
	struct port_work *work;
	unsigned int state;	/* atomic, POLL_* of worker.c */
	int fd;			/* in the worker's epoll while it is watched */
	bool transmit;
};

#define PORT_WORKS	2

/* All zeroes is a worker that was never started. */
struct port_worker {
	struct port_work *work[PORT_WORKS];
	unsigned int works;
	unsigned int queued;	/* atomic: a bit for each work */
	pid_t owner;		/* process that started it, 0 if none */
	int tid;		/* atomic, 0 until the thread runs */
	int epoll;
	int wake;		/* eventfd that says: look at queued, asked and ending */
	pthread_t thread;
	pthread_mutex_t mutex;
	pthread_cond_t flushed;
	u64 asked;		/* atomic: flushes asked for */
	u64 done;		/* under the mutex: what of asked was served */
	bool ending;		/* atomic */
	u64 sleeps;		/* how often the thread had nothing to do; its own */
	struct port_backend *parked;	/* a detached backend with a frame that was read ahead */
};

enum port_touch { PORT_READ, PORT_WRITE };

#ifdef VHM_HOSTILE
#include "hostile.h"
#define port_touch(uaddr, length, how)	hostile_touch(uaddr, length, how)
#else
#define port_touch(uaddr, length, how)	false
#define hostile_fault(site)		false
#define hostile_count(allocations)	((void)0)
#endif

/* Copy where either side may fault: 0 or -EFAULT. */
int guard_copy(void *to, const void *from, size_t length);
/* Install the handlers of SIGSEGV and SIGBUS, unless they are there; 0 or -errno. */
int guard_install(void);

#if defined(__x86_64__) && !defined(VHM_PORTABLE)

/* From the instruction at label 1 execution goes on here, with @error set. */
#define GUARD_FIXUP						\
	".pushsection .text.vhm_fixup, \"ax\"\n"		\
	"3:	movl %[fault], %[error]\n"			\
	"	jmp 2b\n"					\
	".popsection\n"						\
	".pushsection vhm_fixups, \"a\"\n"			\
	"	.balign 4\n"					\
	"	.long 1b - ., 3b - .\n"				\
	".popsection\n"

#define GUARD_GET(instruction, to_, at_)			\
({								\
	int error_ = 0;						\
								\
	asm volatile("1:	" instruction "\n2:\n" GUARD_FIXUP	\
		     : [value] "=&r" (to_), [error] "+r" (error_)	\
		     : [at] "r" (at_), [fault] "i" (-EFAULT)	\
		     : "memory");				\
	error_;							\
})

#define GUARD_PUT(instruction, from_, at_)			\
({								\
	int error_ = 0;						\
								\
	asm volatile("1:	" instruction "\n2:\n" GUARD_FIXUP	\
		     : [error] "+r" (error_)			\
		     : [at] "r" (at_), [value] "q" (from_), [fault] "i" (-EFAULT) \
		     : "memory", "cc");				\
	error_;							\
})

static inline int port_get16(u16 *value, u64 uaddr)
{
	u32 got;
	int error;

	if (port_touch(uaddr, 2, PORT_READ))
		return -EFAULT;
	error = GUARD_GET("movzwl (%[at]), %[value]", got, uaddr);
	if (likely(!error))
		*value = got;
	return error;
}

static inline int guard_get64(u64 *value, u64 uaddr)
{
	u64 got;
	int error;

	if (port_touch(uaddr, 8, PORT_READ))
		return -EFAULT;
	error = GUARD_GET("movq (%[at]), %[value]", got, uaddr);
	if (likely(!error))
		*value = got;
	return error;
}

static inline int port_put16(u16 value, u64 uaddr)
{
	if (port_touch(uaddr, 2, PORT_WRITE))
		return -EFAULT;
	return GUARD_PUT("movw %w[value], (%[at])", value, uaddr);
}

static inline int port_put64(u64 value, u64 uaddr)
{
	if (port_touch(uaddr, 8, PORT_WRITE))
		return -EFAULT;
	return GUARD_PUT("movq %[value], (%[at])", value, uaddr);
}

/* Loads and stores of write-back memory pass each other in one way only here. */
static inline void port_mb(void)
{
	asm volatile("lock addl $0, (%%rsp)" ::: "memory", "cc");
}

static inline void port_rmb(void)
{
	asm volatile("" ::: "memory");
}

static inline void port_wmb(void)
{
	asm volatile("" ::: "memory");
}

static inline void port_relax(void)
{
	asm volatile("pause");
}

#else

#define GUARD_BY_KERNEL

static inline int port_get16(u16 *value, u64 uaddr)
{
	if (port_touch(uaddr, 2, PORT_READ))
		return -EFAULT;
	return guard_copy(value, (const void *)uaddr, sizeof(*value));
}

static inline int guard_get64(u64 *value, u64 uaddr)
{
	if (port_touch(uaddr, 8, PORT_READ))
		return -EFAULT;
	return guard_copy(value, (const void *)uaddr, sizeof(*value));
}

static inline int port_put16(u16 value, u64 uaddr)
{
	if (port_touch(uaddr, 2, PORT_WRITE))
		return -EFAULT;
	return guard_copy((void *)uaddr, &value, sizeof(value));
}

static inline int port_put64(u64 value, u64 uaddr)
{
	if (port_touch(uaddr, 8, PORT_WRITE))
		return -EFAULT;
	return guard_copy((void *)uaddr, &value, sizeof(value));
}

static inline void port_mb(void)
{
	__sync_synchronize();
}

static inline void port_rmb(void)
{
	__sync_synchronize();
}

static inline void port_wmb(void)
{
	__sync_synchronize();
}

static inline void port_relax(void)
{
}

#endif

static inline int port_get128(u64 value[2], u64 uaddr)
{
	int error = guard_get64(&value[0], uaddr);

	return likely(!error) ? guard_get64(&value[1], uaddr + 8) : error;
}

static inline int port_copy_in(void *to, u64 uaddr, size_t length)
{
	if (port_touch(uaddr, length, PORT_READ))
		return -EFAULT;
	return guard_copy(to, (const void *)uaddr, length);
}

static inline int port_copy_out(u64 uaddr, const void *from, size_t length)
{
	if (port_touch(uaddr, length, PORT_WRITE))
		return -EFAULT;
	return guard_copy((void *)uaddr, from, length);
}

/* What access_ok() of a kernel with four levels of page tables says. */
static inline bool port_range_ok(u64 uaddr, u64 length)
{
	const u64 end = 0x7ffffffff000;

	return length <= end && uaddr <= end - length;
}

static inline void __user *port_pointer(u64 uaddr)
{
	return (void __user *)uaddr;
}

static inline u64 port_uaddr(const void __user *pointer)
{
	return (u64)pointer;
}

static inline void port_lock_init(struct port_lock *lock)
{
	pthread_mutex_init(&lock->mutex, NULL);
}

static inline void port_lock(struct port_lock *lock)
{
	pthread_mutex_lock(&lock->mutex);
}

static inline void port_unlock(struct port_lock *lock)
{
	pthread_mutex_unlock(&lock->mutex);
}

static inline u64 port_clock(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return ((u64)now.tv_sec * 1000000000 + now.tv_nsec) >> 10;
}

/* The operations of this port ask for themselves. */
static inline void port_trace_run(const struct vhm_queue *queue)
{
	(void)queue;
}

static inline void port_trace_chain(const struct vhm_queue *queue, u16 head, int out, int in)
{
	(void)queue;
	(void)head;
	(void)out;
	(void)in;
}

static inline void port_trace_used(const struct vhm_queue *queue, u16 count)
{
	(void)queue;
	(void)count;
}

static inline void port_trace_signal(const struct vhm_queue *queue)
{
	(void)queue;
}

static inline void port_trace_error(const struct vhm_queue *queue, int cause)
{
	(void)queue;
	(void)cause;
}

#endif
