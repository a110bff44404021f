/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A vhost-net device inside a process, as a descriptor of /dev/vhost-net would be.
 *
 * Calls may come from any thread, but not while engine_close() runs. A child made by
 * fork() has a copy of the device that it does not own: it may close it.
 */
#ifndef VHM_ENGINE_H
#define VHM_ENGINE_H

#include <stddef.h>
#include <stdint.h>

struct engine;
struct vhm_stats;

/* A new device: 0 or -errno. */
int engine_open(struct engine **engine);
void engine_close(struct engine *engine);

/*
 * As ioctl(2), read(2) and write(2) of a node that was opened with O_NONBLOCK, with
 * -errno for errors. Addresses are of this process and need not be valid.
 */
long engine_ioctl(struct engine *engine, unsigned int request, uint64_t address);
long engine_read(struct engine *engine, uint64_t address, size_t length);
long engine_write(struct engine *engine, uint64_t address, size_t length);

/* A descriptor to poll: readable while an IOTLB message waits. It stays the engine's. */
int engine_fileno(struct engine *engine);

/* The worker's thread, 0 if there is none. */
int engine_worker(const struct engine *engine);

/*
 * Prepare the ring @index for another reader of its backend: from now on it reads no more
 * frames, until a backend is set. Returns how many that it has read wait for buffers (those
 * of a ring that was stopped wait for its backend), -ENOBUFS if there is no such ring, or
 * -EPERM if the caller is not the owner. After 0 the backend has all the frames.
 */
int engine_settle(struct engine *engine, unsigned int index);

/* What a ring counted since the device was opened: 0, or -ENOBUFS if there is no such ring. */
int engine_stats(struct engine *engine, unsigned int queue, struct vhm_stats *stats);

#endif
