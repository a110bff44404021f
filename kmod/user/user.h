/* SPDX-License-Identifier: GPL-2.0-only */
/* What the files of the port to a process share. */
#ifndef VHM_USER_H
#define VHM_USER_H

#include "vhm.h"

struct port_kick {
	int fd;
};

struct port_event {
	int fd;
	bool blocking;		/* without O_NONBLOCK */
};

/* Frames pass through a backend's buffer in bursts, one direction for each backend. */
#define BURST		64
#define BURST_BYTES	(256 * 1024)

/* A descriptor of a tap or packet socket, our own duplicate of it. */
struct port_backend {
	int fd;
	bool packet;		/* a packet socket, else a tap */
	bool nonblocking;	/* O_NONBLOCK when it was attached */
	bool unlimited;		/* a tap whose send buffer has no limit */
	bool has_vnet;
	unsigned int vnet;	/* bytes of virtio_net_hdr before a frame, either way */
	unsigned int overhead;	/* those, and a struct tun_pi before them if there is one */
	u64 asked;		/* the worker's sleeps when that was last asked for */

	/* Sent and not yet written, or read and not yet received, from @first to @count. */
	char *buffer;
	struct {
		char *start;
		size_t length;
	} frame[BURST];
	unsigned int first, count;
	size_t filled;		/* bytes of the buffer */
	bool dry;		/* there was nothing behind the frame that was read */
	bool settling;		/* reads nothing any more */

	struct vhm_queue *queue;	/* whose lock guards all of this, from the first watch on */
};

/* Whether the calling thread is a worker. */
bool worker_is_current(void);

/* Two descriptors of one open file. */
bool same_file(int a, int b);

/* Let go of @backend; frames that it still has are counted as drops. The lock is not held. */
void backend_discard(struct port_backend *backend);

/*
 * Take over what the worker had read ahead when it served the same file before; true if
 * there is anything.
 */
bool backend_adopt(struct port_backend *backend);

/* Frames that were read and not yet received. */
unsigned int backend_left(const struct port_backend *backend);

/* Read nothing more, and read again; the latter is true if that is a change. */
void backend_settle(struct port_backend *backend);
bool backend_unsettle(struct port_backend *backend);

#endif
