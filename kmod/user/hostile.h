/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The port to a process as an enemy of the core, for tests; built in by -DVHM_HOSTILE.
 *
 * It watches what a worker touches, changes memory between two reads of it, and lets
 * chosen operations fail. A socketpair of AF_UNIX datagrams is a backend to it, so that
 * no test needs a network of its own. Faults and flips are counted from the call that
 * orders them on, the first operation being number 1; number 0 orders none.
 */
#ifndef VHM_HOSTILE_H
#define VHM_HOSTILE_H

#define HOSTILE_RANGES	16

/* Forget everything that was ordered and counted. */
void hostile_reset(void);

/* Besides such ranges workers have no business anywhere: 0, or -ENOSPC for one too many. */
int hostile_allow(u64 uaddr, u64 length);

/* How often workers were somewhere else, and where they were last. */
unsigned long hostile_trespasses(u64 *uaddr);

/* Allocations of port_alloc() that port_free() did not get back. */
long hostile_allocated(void);

/* Let the @number-th operation at @site fail. */
void hostile_fail(enum port_site site, unsigned long number);

/* How many operations there were at @site. */
unsigned long hostile_operations(enum port_site site);

/* Exclusive-or the byte at @uaddr with @mask just before the @number-th read of a worker. */
void hostile_flip(u64 uaddr, u8 mask, unsigned long number);

/* How many reads of workers there were. */
unsigned long hostile_reads(void);

/* What the operations of the port ask: true if they are to fail. */
bool hostile_touch(u64 uaddr, u64 length, enum port_touch how);
bool hostile_fault(enum port_site site);
void hostile_count(int allocations);

#endif
