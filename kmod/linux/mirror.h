/* SPDX-License-Identifier: GPL-2.0-only */
/* One open /dev/vhost-net-mirror, and what the module's parts tell each other of it. */
#ifndef VHM_MIRROR_H
#define VHM_MIRROR_H

#include <linux/wait.h>
#include "vhm.h"

struct dentry;
struct file;
struct ptr_ring;

struct mirror {
	struct vhm_dev dev;
	wait_queue_head_t readers;	/* of IOTLB messages */
	int number;			/* its directory in debugfs */
	struct dentry *directory;
};

static inline struct mirror *mirror_of(const struct vhm_dev *dev)
{
	return container_of(dev, struct mirror, dev);
}

static inline unsigned int vhm_number(const struct vhm_dev *dev)
{
	return mirror_of(dev)->number;
}

/*
 * Watch a file as port_poll_kick() watches an eventfd. With @ring, that says after a
 * pause whether there is something to read.
 */
int mirror_watch(struct port_poll *poll, struct file *file, struct ptr_ring *ring, __poll_t events);

/* debugfs: the module's directory, and a device's in it. */
void debug_init(void);
void debug_exit(void);
int debug_add(struct mirror *mirror);
void debug_remove(struct mirror *mirror);

#endif
