// SPDX-License-Identifier: GPL-2.0-only
/* What a device counted and where its rings stand: vhost_net_mirror/N in debugfs. */
#include <linux/debugfs.h>
#include <linux/idr.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include "mirror.h"

static struct dentry *root;
static DEFINE_IDA(numbers);

static void show_place(struct seq_file *file, struct vhm_queue *queue)
{
	seq_printf(file, "num %u\n", queue->num);
	seq_printf(file, "descriptors 0x%llx\n", queue->place.part[VHM_DESC]);
	seq_printf(file, "avail 0x%llx\n", queue->place.part[VHM_AVAIL]);
	seq_printf(file, "used 0x%llx\n", queue->place.part[VHM_USED]);
	seq_printf(file, "features 0x%llx\n", queue->features);
	seq_printf(file, "features_high 0x%llx\n", queue->features_high);
	seq_printf(file, "log_base 0x%llx\n", queue->log_base);
	seq_printf(file, "busyloop %u\n", queue->busyloop);
	seq_printf(file, "backend %d\n", !!queue->backend);
	seq_printf(file, "kick_bound %d\n", !!queue->kick);
	seq_printf(file, "call_bound %d\n", !!queue->call);
	seq_printf(file, "err_bound %d\n", !!queue->err);
}

static void show_state(struct seq_file *file, struct vhm_queue *queue)
{
	seq_printf(file, "avail_seen %u\n", queue->avail_seen);
	seq_printf(file, "last_avail %u\n", queue->last_avail);
	seq_printf(file, "last_used %u\n", queue->last_used);
	seq_printf(file, "used_flags %u\n", queue->used_flags);
	seq_printf(file, "signalled %u\n", queue->signalled);
	seq_printf(file, "signalled_valid %d\n", queue->signalled_valid);
}

static void show_stats(struct seq_file *file, const struct vhm_queue *queue)
{
	const struct vhm_stats *stats = &queue->stats;

	seq_printf(file, "kicks %lu\n", queue->kick_poll.wakes);
	seq_printf(file, "runs %llu\n", stats->runs);
	seq_printf(file, "frames %llu\n", stats->frames);
	seq_printf(file, "bytes %llu\n", stats->bytes);
	seq_printf(file, "signals %llu\n", stats->signals);
	seq_printf(file, "drops %llu\n", stats->drops);
	seq_printf(file, "bad_rings %llu\n", stats->bad_rings);
	seq_printf(file, "bad_chains %llu\n", stats->bad_chains);
	seq_printf(file, "bad_addresses %llu\n", stats->bad_addresses);
	seq_printf(file, "bad_buffers %llu\n", stats->bad_buffers);
	seq_printf(file, "bad_frames %llu\n", stats->bad_frames);
	seq_printf(file, "bad_used %llu\n", stats->bad_used);
	seq_printf(file, "misses %llu\n", stats->misses);
}

static int ring_show(struct seq_file *file, void *unused)
{
	struct vhm_queue *queue = file->private;

	port_lock(&queue->lock);
	show_place(file, queue);
	show_state(file, queue);
	show_stats(file, queue);
	port_unlock(&queue->lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(ring);

static int device_show(struct seq_file *file, void *unused)
{
	struct vhm_dev *dev = file->private;
	const struct port_worker *worker = &dev->worker;

	port_lock(&dev->lock);
	seq_printf(file, "owned %d\n", port_worker_owned(worker));
	seq_printf(file, "worker %d\n", worker->task ? task_pid_nr(worker->task) : 0);
	seq_printf(file, "worker_kind %s\n",
		   worker->vtask ? "task" : worker->task ? "kthread" : "none");
	seq_printf(file, "worker_dead %d\n", worker->dead);
	seq_printf(file, "as_task %d\n", dev->as_task);
	seq_printf(file, "regions %u\n", dev->memory ? dev->memory->count : 0);
	seq_printf(file, "iotlb_entries %u\n", dev->iotlb ? dev->iotlb->count : 0);
	seq_printf(file, "backend_features 0x%llx\n", dev->backend_features);
	port_unlock(&dev->lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(device);

void debug_init(void)
{
	root = debugfs_create_dir(KBUILD_MODNAME, NULL);
}

void debug_exit(void)
{
	debugfs_remove_recursive(root);
	ida_destroy(&numbers);
}

int debug_add(struct mirror *mirror)
{
	struct vhm_dev *dev = &mirror->dev;
	char name[16];
	int number = ida_alloc(&numbers, GFP_KERNEL);

	if (number < 0)
		return number;
	mirror->number = number;
	snprintf(name, sizeof(name), "%d", number);
	mirror->directory = debugfs_create_dir(name, root);
	debugfs_create_file("device", 0400, mirror->directory, dev, &device_fops);
	debugfs_create_file("rx", 0400, mirror->directory, &dev->queue[VHM_RX], &ring_fops);
	debugfs_create_file("tx", 0400, mirror->directory, &dev->queue[VHM_TX], &ring_fops);
	return 0;
}

void debug_remove(struct mirror *mirror)
{
	debugfs_remove_recursive(mirror->directory);
	ida_free(&numbers, mirror->number);
}
