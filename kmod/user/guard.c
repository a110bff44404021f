// SPDX-License-Identifier: GPL-2.0-only
/* Accesses to memory that may not be there. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <ucontext.h>
#include <unistd.h>

#include "port.h"

#ifndef GUARD_BY_KERNEL

/* Offsets from the places where they stand. */
struct fixup {
	s32 instruction;
	s32 target;
};

extern const struct fixup __start_vhm_fixups[] __attribute__((visibility("hidden")));
extern const struct fixup __stop_vhm_fixups[] __attribute__((visibility("hidden")));

static const int signals[] = { SIGSEGV, SIGBUS };
static struct sigaction previous[2];
static pthread_mutex_t installing = PTHREAD_MUTEX_INITIALIZER;

/* Who came after us and calls us in turn must not be called for ever. */
static __thread bool chaining __attribute__((tls_model("initial-exec")));

static bool fix(ucontext_t *context)
{
	greg_t *ip = &context->uc_mcontext.gregs[REG_RIP];
	const struct fixup *fixup;

	for (fixup = __start_vhm_fixups; fixup != __stop_vhm_fixups; fixup++) {
		if (*ip == (greg_t)&fixup->instruction + fixup->instruction) {
			*ip = (greg_t)&fixup->target + fixup->target;
			return true;
		}
	}
	return false;
}

/* As if we had never been there. */
static void chain(const struct sigaction *action, int number, siginfo_t *info, void *context)
{
	const struct sigaction by_default = { .sa_handler = SIG_DFL };
	bool sent = info->si_code <= 0;

	if (!chaining && (action->sa_flags & SA_SIGINFO)) {
		chaining = true;
		action->sa_sigaction(number, info, context);
		chaining = false;
	} else if (!chaining && action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN) {
		chaining = true;
		action->sa_handler(number);
		chaining = false;
	} else if (action->sa_handler != SIG_IGN || !sent || chaining) {
		/* The instruction faults again when we return; a sent signal does not. */
		sigaction(number, &by_default, NULL);
		if (sent)
			raise(number);
	}
}

static void handle(int number, siginfo_t *info, void *context)
{
	int saved = errno;

	if (!fix(context))
		chain(&previous[number == SIGBUS], number, info, context);
	errno = saved;
}

int guard_install(void)
{
	struct sigaction action = {
		.sa_sigaction = handle,
		/* As Python's faulthandler: a fault in a chained handler must be seen. */
		.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER,
	};
	int error = 0;
	int i;

	sigemptyset(&action.sa_mask);
	pthread_mutex_lock(&installing);
	for (i = 0; i < 2 && !error; i++) {
		struct sigaction now;

		if (sigaction(signals[i], NULL, &now))
			error = -errno;
		else if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == handle)
			continue;
		else if (sigaction(signals[i], &action, &previous[i]))
			error = -errno;
	}
	pthread_mutex_unlock(&installing);
	return error;
}

#define GUARD_MOVE(load, store, scratch, to_, from_)		\
({								\
	int error_ = 0;						\
								\
	asm volatile("1:	" load "\n"			\
		     "4:	" store "\n2:\n" GUARD_FIXUP	\
		     ".pushsection vhm_fixups, \"a\"\n"		\
		     "	.long 4b - ., 3b - .\n"			\
		     ".popsection\n"				\
		     : [error] "+r" (error_)			\
		     : [to] "r" (to_), [from] "r" (from_), [fault] "i" (-EFAULT) \
		     : "memory", scratch);			\
	error_;							\
})

static inline int move1(void *to, const void *from)
{
	return GUARD_MOVE("movb (%[from]), %%al", "movb %%al, (%[to])", "rax", to, from);
}

static inline int move2(void *to, const void *from)
{
	return GUARD_MOVE("movw (%[from]), %%ax", "movw %%ax, (%[to])", "rax", to, from);
}

static inline int move4(void *to, const void *from)
{
	return GUARD_MOVE("movl (%[from]), %%eax", "movl %%eax, (%[to])", "rax", to, from);
}

static inline int move8(void *to, const void *from)
{
	return GUARD_MOVE("movq (%[from]), %%rax", "movq %%rax, (%[to])", "rax", to, from);
}

static inline int move16(void *to, const void *from)
{
	return GUARD_MOVE("movups (%[from]), %%xmm0", "movups %%xmm0, (%[to])", "xmm0", to, from);
}

static int move_long(void *to, const void *from, size_t length)
{
	int error = 0;

	asm volatile("1:	rep movsb\n2:\n" GUARD_FIXUP
		     : [error] "+r" (error), "+D" (to), "+S" (from), "+c" (length)
		     : [fault] "i" (-EFAULT)
		     : "memory");
	return error;
}

/* A last piece that overlaps the one before it is cheaper than a loop over bytes. */
#define MOVE_ENDS(move, size)	(move(to, from) ?: move(to + length - (size), from + length - (size)))

int guard_copy(void *to, const void *from, size_t length)
{
	size_t done;

	if (length >= 256)
		return move_long(to, from, length);
	if (length > 16) {
		for (done = 0; done + 16 < length; done += 16) {
			if (unlikely(move16(to + done, from + done)))
				return -EFAULT;
		}
		return move16(to + length - 16, from + length - 16);
	}
	if (length >= 8)
		return MOVE_ENDS(move8, 8);
	if (length >= 4)
		return MOVE_ENDS(move4, 4);
	if (length >= 2)
		return MOVE_ENDS(move2, 2);
	return length ? move1(to, from) : 0;
}

int port_set_bit(u64 uaddr, unsigned int bit)
{
	if (port_touch(uaddr, 1, PORT_WRITE))
		return -EFAULT;
	return GUARD_PUT("lock orb %b[value], (%[at])", (u8)(1 << bit), uaddr);
}

#else

int guard_install(void)
{
	return 0;
}

/* The kernel checks the remote side; one of the two is ours and always there. */
int guard_copy(void *to, const void *from, size_t length)
{
	char bounce[4096];

	while (length) {
		size_t part = min_t(size_t, length, sizeof(bounce));
		struct iovec local = { bounce, part };
		struct iovec source = { (void *)from, part };
		struct iovec target = { to, part };

		if (process_vm_readv(getpid(), &local, 1, &source, 1, 0) != (ssize_t)part ||
		    process_vm_writev(getpid(), &local, 1, &target, 1, 0) != (ssize_t)part)
			return -EFAULT;
		to += part;
		from += part;
		length -= part;
	}
	return 0;
}

/* Atomic among devices of this process only. */
int port_set_bit(u64 uaddr, unsigned int bit)
{
	static pthread_mutex_t setting = PTHREAD_MUTEX_INITIALIZER;
	u8 byte;
	int error;

	pthread_mutex_lock(&setting);
	error = port_copy_in(&byte, uaddr, sizeof(byte));
	if (!error) {
		byte |= 1 << bit;
		error = port_copy_out(uaddr, &byte, sizeof(byte));
	}
	pthread_mutex_unlock(&setting);
	return error;
}

#endif

void *port_alloc(size_t length)
{
	void *memory = hostile_fault(PORT_FAULT_ALLOC) ? NULL : calloc(1, length);

	if (memory)
		hostile_count(1);
	return memory;
}

void port_free(void *memory)
{
	if (memory)
		hostile_count(-1);
	free(memory);
}
