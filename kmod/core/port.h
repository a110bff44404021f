/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The contract of the device core with the world around it.
 *
 * The core in this folder is the whole of a vhost-net device: requests, memory
 * table, rings, notification, transmit, receive, log. It does nothing by itself
 * but compute; memory, threads, descriptors and packets are reached through
 * the operations below. Two ports implement them: ../linux in the kernel, where
 * a backend is a tun or packet socket, and ../user in a process, where it is a
 * descriptor of the same things.
 *
 * "port_native.h" is the port's own and comes first, because the core embeds
 * its types and cannot pay a call for every ring access. It provides
 *
 *	u8 u16 u32 u64 bool size_t NULL, the errno values, container_of(),
 *	likely(), unlikely(), min(), memset(), memcpy(), memmove(),
 *	struct iovec, __user
 *	struct port_lock	a sleeping lock
 *	struct port_work	something for the worker to run
 *	struct port_poll	wakes a work when a descriptor becomes ready
 *	struct port_worker	the one thread that runs a device's work
 *
 * and, inline, every operation that is marked so below.
 *
 * Addresses that belong to the owner of the device travel as u64 and are called
 * uaddr. Nothing at a uaddr can be trusted, nor be there: operations that touch
 * it return -EFAULT and have no other effect.
 */
#ifndef VHM_PORT_H
#define VHM_PORT_H

#include <linux/types.h>
#include <asm/byteorder.h>

struct vhm_dev;
struct vhm_queue;

/* Where a port may be told to fail: port_alloc(), the copies, port_send(), port_receive(). */
enum port_site {
	PORT_FAULT_ALLOC,
	PORT_FAULT_COPY,
	PORT_FAULT_SEND,
	PORT_FAULT_RECEIVE,
	PORT_FAULT_SITES,
};

#include "port_native.h"

/* An eventfd that the core signals. */
struct port_event;
/* An eventfd that the core is woken by. */
struct port_kick;
/* What frames are sent to and come from. */
struct port_backend;

/*
 * Memory of the owner. All of these are inline and return 0 or -EFAULT.
 *
 * port_get16(), port_put16() and port_put64() are single accesses as the guest's
 * CPU sees them; port_get128() is a descriptor, in two.
 *
 *	int port_get16(u16 *value, u64 uaddr);
 *	int port_get128(u64 value[2], u64 uaddr);
 *	int port_put16(u16 value, u64 uaddr);
 *	int port_put64(u64 value, u64 uaddr);
 *
 * The 16-bit ones are aligned. The others may not be: descriptor tables may have any
 * alignment, and entries of the used ring have 4.
 *
 *	int port_copy_in(void *to, u64 uaddr, size_t length);
 *	int port_copy_out(u64 uaddr, const void *from, size_t length);
 *
 * True if [uaddr, uaddr + length) can be memory of a process at all; says
 * nothing about what is mapped there:
 *
 *	bool port_range_ok(u64 uaddr, u64 length);
 *
 * A uaddr as a pointer that struct iovec takes, and back:
 *
 *	void __user *port_pointer(u64 uaddr);
 *	u64 port_uaddr(const void __user *pointer);
 *
 * The access_ok() of a range is checked when the memory table or an IOTLB entry
 * is set and when a ring starts, so the ports need not repeat it.
 *
 * Barriers, inline, between what the guest's CPUs and this one do:
 *
 *	void port_mb(void);	both ways
 *	void port_rmb(void);	between reads
 *	void port_wmb(void);	between writes
 *
 * The sleeping lock, inline. Taken in the order device, receive ring, transmit
 * ring, messages.
 *
 *	void port_lock_init(struct port_lock *lock);
 *	void port_lock(struct port_lock *lock);
 *	void port_unlock(struct port_lock *lock);
 *
 * A point in time in units of 1024 ns, and a breath while polling; inline:
 *
 *	u64 port_clock(void);
 *	void port_relax(void);
 *
 * Fault injection: ports can be told to let their operations at one of the
 * sites of enum port_site fail, as they may by themselves.
 *
 * Tracing, inline; does nothing unless somebody listens:
 *
 *	void port_trace_run(const struct vhm_queue *queue);
 *	void port_trace_chain(const struct vhm_queue *queue, u16 head, int out, int in);
 *	void port_trace_used(const struct vhm_queue *queue, u16 count);
 *	void port_trace_signal(const struct vhm_queue *queue);
 *	void port_trace_error(const struct vhm_queue *queue, int cause);
 *
 * where @cause counts from bad_rings on through struct vhm_stats.
 */

/* Atomically set bit @bit (0..7) of the byte at @uaddr, for the dirty log. */
int port_set_bit(u64 uaddr, unsigned int bit);

/* Zeroed memory of any size that may sleep, or NULL; port_free() takes NULL. */
void *port_alloc(size_t length);
void port_free(void *memory);

/*
 * Owner and worker.
 *
 * port_worker_start() makes the calling process the owner and starts a thread
 * that runs works with the owner's memory at hand. Returns 0, -ENOMEM, or what
 * else the start of a thread gives. @as_task asks for a thread of the owner
 * where port_worker_choice() says that there is a choice.
 * port_worker_stop() runs what is queued, ends the thread, forgets the owner.
 * port_worker_flush() returns when everything queued before it has run. Both
 * take a worker that was never started, and one that died with its owner.
 */
bool port_worker_choice(void);
int port_worker_start(struct port_worker *worker, bool as_task);
void port_worker_stop(struct port_worker *worker);
void port_worker_flush(struct port_worker *worker);

/* Whether @worker has an owner, and whether the caller is it. */
bool port_worker_owned(const struct port_worker *worker);
bool port_worker_is_mine(const struct port_worker *worker);

/* Whether @worker has anything else to do, so that polling must end. */
bool port_worker_busy(const struct port_worker *worker);

/*
 * @work calls vhm_queue_run(@queue) on @worker. Queuing twice before it runs is
 * queuing once; queuing while it runs makes it run again.
 */
void port_work_init(struct port_work *work, struct port_worker *worker, struct vhm_queue *queue);
void port_work_queue(struct port_work *work);

/*
 * A poll queues @work whenever what it watches becomes ready, and at once if it
 * is ready when the watch begins. Edges count: what is ready and stays ready
 * wakes once.
 *
 * port_poll_kick() begins to watch a kick and port_poll_backend() a backend, for
 * frames to receive or for room to transmit: 0 or -EINVAL if it cannot be
 * watched. port_poll_pause() and port_poll_resume() switch a watched backend off
 * and on; what became ready in between is not lost. port_poll_stop() ends a watch
 * and takes a poll that watches nothing. After it no new work is queued; work
 * queued before may still run.
 */
void port_poll_init(struct port_poll *poll, struct port_work *work);
int port_poll_kick(struct port_poll *poll, struct port_kick *kick);
int port_poll_backend(struct port_poll *poll, struct port_backend *backend, bool transmit);
void port_poll_pause(struct port_poll *poll);
void port_poll_resume(struct port_poll *poll);
void port_poll_stop(struct port_poll *poll);

/*
 * Eventfds by descriptor number: 0, -EBADF, or -EINVAL for another kind of file.
 * The reference is the core's until it is put; put takes NULL.
 */
int port_event_get(int fd, struct port_event **event);
void port_event_put(struct port_event *event);
void port_event_signal(struct port_event *event);
int port_kick_get(int fd, struct port_kick **kick);
void port_kick_put(struct port_kick *kick);
bool port_kick_same(const struct port_kick *a, const struct port_kick *b);

/* The unread IOTLB messages changed: vhm_dev_readable() says whether one waits. */
void port_message_ready(struct vhm_dev *dev);

/*
 * Backends: the descriptor of a tun, tap, macvtap or AF_PACKET raw socket, for
 * one direction. -ENOTSOCK for anything else. put takes NULL. Frames that were
 * read ahead of the device are given back, or kept for the same file's return.
 */
int port_backend_get(int fd, bool transmit, struct port_backend **backend);
void port_backend_put(struct port_backend *backend);
bool port_backend_same(const struct port_backend *a, const struct port_backend *b);

/*
 * Send one frame: @count pieces, @length bytes, the first @header of them a
 * virtio_net_hdr that the backend wants too. @more says that another follows.
 *
 *	0		sent, refused for good by the network, or kept for the flush
 *	-EAGAIN		no room: nothing was done, a transmit poll will tell
 *	-EINVAL -EFAULT	no frame can be made of this: nothing was done
 *
 * The pieces may be reused when this returns.
 */
int port_send(struct port_backend *backend, const struct iovec *iov, unsigned int count,
	      size_t length, size_t header, bool more);

/* Hand over what port_send() kept: 0, or an error when none of it was taken. */
int port_send_flush(struct port_backend *backend);

/*
 * Length of the next frame, without any header that the backend puts before
 * it, but with a VLAN tag that it will put into it; 0 if there is none.
 */
size_t port_receive_peek(struct port_backend *backend);

/*
 * Move the next frame into @count pieces that hold @length bytes together, with
 * the backend's header of @header bytes before it. Returns the bytes that the
 * whole would have taken, or an error; the frame is gone either way.
 */
long port_receive(struct port_backend *backend, const struct iovec *iov, unsigned int count,
		  size_t length, size_t header);

/* Throw the next frame away. */
void port_receive_drop(struct port_backend *backend);

#endif
