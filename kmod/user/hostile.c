// SPDX-License-Identifier: GPL-2.0-only
/* See hostile.h; nothing of this is in a build without VHM_HOSTILE. */
#include "user.h"

#ifdef VHM_HOSTILE

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct {
	struct { u64 from, length; } ranges[HOSTILE_RANGES];
	unsigned int range_count;
	unsigned long trespasses;
	u64 trespass;
	unsigned long reads, flip_at;
	u64 flip_uaddr;
	u8 flip_mask;
	unsigned long operations[PORT_FAULT_SITES];
	unsigned long fail_at[PORT_FAULT_SITES];
} state;

static long allocated;	/* atomic */

void hostile_reset(void)
{
	pthread_mutex_lock(&lock);
	memset(&state, 0, sizeof(state));
	pthread_mutex_unlock(&lock);
}

int hostile_allow(u64 uaddr, u64 length)
{
	int error = -ENOSPC;

	pthread_mutex_lock(&lock);
	if (state.range_count < HOSTILE_RANGES) {
		state.ranges[state.range_count].from = uaddr;
		state.ranges[state.range_count++].length = length;
		error = 0;
	}
	pthread_mutex_unlock(&lock);
	return error;
}

unsigned long hostile_trespasses(u64 *uaddr)
{
	unsigned long trespasses;

	pthread_mutex_lock(&lock);
	trespasses = state.trespasses;
	*uaddr = state.trespass;
	pthread_mutex_unlock(&lock);
	return trespasses;
}

void hostile_fail(enum port_site site, unsigned long number)
{
	pthread_mutex_lock(&lock);
	state.operations[site] = 0;
	state.fail_at[site] = number;
	pthread_mutex_unlock(&lock);
}

unsigned long hostile_operations(enum port_site site)
{
	unsigned long operations;

	pthread_mutex_lock(&lock);
	operations = state.operations[site];
	pthread_mutex_unlock(&lock);
	return operations;
}

void hostile_flip(u64 uaddr, u8 mask, unsigned long number)
{
	pthread_mutex_lock(&lock);
	state.reads = 0;
	state.flip_uaddr = uaddr;
	state.flip_mask = mask;
	state.flip_at = number;
	pthread_mutex_unlock(&lock);
}

unsigned long hostile_reads(void)
{
	unsigned long reads;

	pthread_mutex_lock(&lock);
	reads = state.reads;
	pthread_mutex_unlock(&lock);
	return reads;
}

static bool is_allowed(u64 uaddr, u64 length)
{
	unsigned int i;

	for (i = 0; i < state.range_count; i++) {
		u64 offset = uaddr - state.ranges[i].from;

		if (length <= state.ranges[i].length && offset <= state.ranges[i].length - length)
			return true;
	}
	return false;
}

void hostile_count(int allocations)
{
	__atomic_add_fetch(&allocated, allocations, __ATOMIC_RELAXED);
}

long hostile_allocated(void)
{
	return __atomic_load_n(&allocated, __ATOMIC_RELAXED);
}

static bool count(enum port_site site)
{
	return ++state.operations[site] == state.fail_at[site];
}

static void watch(u64 uaddr, u64 length, enum port_touch how)
{
	u8 byte;

	if (!is_allowed(uaddr, length)) {
		state.trespasses++;
		state.trespass = uaddr;
	}
	if (how != PORT_READ || ++state.reads != state.flip_at)
		return;
	if (guard_copy(&byte, (void *)state.flip_uaddr, 1))
		return;
	byte ^= state.flip_mask;
	guard_copy((void *)state.flip_uaddr, &byte, 1);
}

bool hostile_touch(u64 uaddr, u64 length, enum port_touch how)
{
	bool fails;

	pthread_mutex_lock(&lock);
	/* Requests have their arguments anywhere. */
	if (worker_is_current())
		watch(uaddr, length, how);
	fails = count(PORT_FAULT_COPY);
	pthread_mutex_unlock(&lock);
	return fails;
}

bool hostile_fault(enum port_site site)
{
	bool fails;

	pthread_mutex_lock(&lock);
	fails = count(site);
	pthread_mutex_unlock(&lock);
	return fails;
}

#endif
