/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A vhost-net device: what a port embeds, creates, asks and runs.
 *
 * A device has two rings: 0 receives (the device writes into the guest's
 * buffers), 1 transmits. Requests come from any thread; vhm_queue_run() comes
 * from the device's one worker.
 */
#ifndef VHM_H
#define VHM_H

#include "port.h"

enum {
	VHM_RX,
	VHM_TX,
	VHM_QUEUES,
};

#define VHM_SEGMENTS	1024	/* pieces of memory in one request of a ring */
#define VHM_BATCH	64	/* completions that are published together */
#define VHM_HEADS	(VHM_SEGMENTS + VHM_BATCH)
#define VHM_NUM_MAX	0x8000	/* descriptors of a ring */
#define VHM_TABLE_PARTS	64	/* pieces of memory that an indirect table may lie in */
#define VHM_TABLE_MAX	0x10000	/* descriptors of all the tables of a chain */
#define VHM_MESSAGE	72	/* bytes of an IOTLB message */

/* What a device allows; the module's parameters set it. */
struct vhm_limits {
	unsigned int mem_regions;
	int iotlb_entries;
	bool fork_from_owner;
};

/* [first, last] of guest physical or I/O virtual addresses, and what is behind it. */
struct vhm_map {
	u64 first;
	u64 last;
	u64 uaddr;
	u64 reach;	/* highest last of this map and those before it */
	u64 age;
	u32 access;	/* VHOST_ACCESS_* */
};

/* Maps in the order of their first address; equal ones in the order of arrival. */
struct vhm_table {
	struct vhm_map *maps;
	unsigned int count;
	unsigned int room;
	u64 arrivals;
};

/* Pieces of a chain of descriptors, in the queue's iov: first those to read. */
struct vhm_chain {
	unsigned int out;
	unsigned int in;
	unsigned int logs;
	u16 head;
	u16 descriptors;	/* that it takes of the ring */
	u32 visited;		/* descriptors that were read, those of tables too */
};

struct vhm_log {
	u64 gpa;
	u64 length;
};

/* An entry of the used ring, in the guest's byte order. */
union vhm_used {
	struct {
		__u32 id;
		__u32 length;
	};
	u64 raw;
};

/* Counted under the queue's lock since the device was opened; bad_ring to bad_used are causes. */
struct vhm_stats {
	u64 runs;
	u64 frames;
	u64 bytes;
	u64 signals;
	u64 drops;		/* frames that no buffer was right for, or read ahead in vain */
	u64 bad_rings;		/* avail index or head out of range, ring unreadable */
	u64 bad_chains;		/* descriptors that make no chain */
	u64 bad_addresses;	/* descriptors that point outside memory */
	u64 bad_buffers;	/* chains of the wrong direction or without length */
	u64 bad_frames;		/* transmitted bytes that make no frame */
	u64 bad_used;		/* used ring that could not be written */
	u64 misses;		/* IOTLB messages asked for */
};

enum vhm_part { VHM_DESC, VHM_AVAIL, VHM_USED, VHM_PARTS };

/* Where a ring lies; part holds a uaddr each, or I/O virtual addresses with an IOTLB. */
struct vhm_place {
	u64 part[VHM_PARTS];
	u64 used_log;		/* guest physical address of the used ring */
	bool log_used;
};

struct vhm_queue {
	struct port_lock lock;
	struct vhm_dev *dev;
	unsigned int index;

	/* Set by requests; valid while the ring runs. */
	u32 num;
	struct vhm_place place;
	u64 direct[VHM_PARTS];	/* uaddr of the whole part, 0 if it is in pieces */
	u64 log_base;
	bool little_endian;
	u32 busyloop;		/* units of 1024 ns */

	u64 features;
	u64 features_high;	/* bits 64 to 127 */
	unsigned int header_own;	/* bytes of vnet header that the device serves */
	unsigned int header_backend;	/* bytes of it that the backend serves */

	/* Where the ring stands. */
	u16 avail_seen;
	u16 last_avail;
	u16 last_used;
	u16 signalled;		/* used index at the last decision to signal */
	u16 in_order_head;
	u16 used_flags;
	bool signalled_valid;

	struct port_work work;
	struct port_poll kick_poll;
	struct port_poll backend_poll;
	struct port_kick *kick;
	struct port_event *call;
	struct port_event *err;
	struct port_backend *backend;

	/* Owned by the worker while it runs the ring; there from SET_OWNER on. */
	struct iovec *iov;		/* VHM_SEGMENTS */
	struct iovec *table_iov;	/* VHM_TABLE_PARTS */
	struct vhm_log *log;		/* VHM_HEADS */
	union vhm_used *heads;		/* VHM_HEADS */
	u16 *head_buffers;		/* VHM_HEADS: buffers that a head stands for, in order */
	unsigned int done;		/* heads that wait to be published */
	unsigned int hint;		/* map that the last lookup found */

	unsigned int messages;	/* under the device's message_lock: misses not answered yet */

	struct vhm_stats stats;
};

struct vhm_message;

struct vhm_dev {
	struct port_lock lock;
	struct port_worker worker;
	const struct vhm_limits *limits;
	struct vhm_queue queue[VHM_QUEUES];
	struct vhm_table *memory;	/* NULL until there is one */
	struct vhm_table *iotlb;	/* NULL unless ACCESS_PLATFORM */
	struct port_event *log_event;
	u64 backend_features;
	bool as_task;

	struct port_lock message_lock;
	struct vhm_message *unread, **unread_end;
	struct vhm_message *pending;
	unsigned int clears;	/* how often both lists were emptied */
};

/* Make @dev usable; @limits must outlive it. The memory of @dev is the caller's. */
void vhm_dev_init(struct vhm_dev *dev, const struct vhm_limits *limits);

/* Stop and forget everything; for the last close. */
void vhm_dev_release(struct vhm_dev *dev);

/*
 * Answer a request as ioctl(2) on /dev/vhost-net does: 0 or a negative errno,
 * -ENOTTY for what is unknown. @uaddr is in the caller's memory.
 */
long vhm_dev_ioctl(struct vhm_dev *dev, unsigned int request, u64 uaddr);

/* One IOTLB message in: the bytes that are to be reported as written, or -errno. */
long vhm_dev_write(struct vhm_dev *dev, u64 uaddr, size_t length);

/*
 * One IOTLB message out: bytes read, 0 if @length is too short for one,
 * -EAGAIN if there is none; blocking is the port's business.
 */
long vhm_dev_read(struct vhm_dev *dev, u64 uaddr, size_t length);

/* Whether a message waits, and whether there can be any. */
bool vhm_dev_readable(struct vhm_dev *dev);
bool vhm_dev_translates(struct vhm_dev *dev);

/* Work on a ring until it has nothing more to do or had its turn. */
void vhm_queue_run(struct vhm_queue *queue);

#endif
