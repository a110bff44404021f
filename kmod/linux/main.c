// SPDX-License-Identifier: GPL-2.0-only
/* The module and its node: each open file is a device of its own. */
#include <linux/compat.h>
#include <linux/fs.h>
#include <linux/lockdep.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include "mirror.h"

static ushort max_mem_regions = 64;
module_param(max_mem_regions, ushort, 0444);
MODULE_PARM_DESC(max_mem_regions, "Most regions of a memory table (default 64)");

static int max_iotlb_entries = 2048;
module_param(max_iotlb_entries, int, 0444);
MODULE_PARM_DESC(max_iotlb_entries, "Most entries of an IOTLB (default 2048)");

static bool fork_from_owner_default = VHM_HAVE_TASK;
#if VHM_HAVE_TASK
module_param(fork_from_owner_default, bool, 0444);
MODULE_PARM_DESC(fork_from_owner_default, "Workers are threads of the owner (default Y)");
#endif

static struct vhm_limits limits;

/* The two rings are locked one inside the other. */
static struct lock_class_key ring_classes[VHM_QUEUES];

static int mirror_open(struct inode *inode, struct file *file)
{
	struct mirror *mirror = kvzalloc(sizeof(*mirror), GFP_KERNEL_ACCOUNT);
	unsigned int i;
	int error;

	if (!mirror)
		return -ENOMEM;
	vhm_dev_init(&mirror->dev, &limits);
	for (i = 0; i < VHM_QUEUES; i++)
		lockdep_set_class(&mirror->dev.queue[i].lock.mutex, &ring_classes[i]);
	init_waitqueue_head(&mirror->readers);
	error = debug_add(mirror);
	if (error) {
		kvfree(mirror);
		return error;
	}
	file->private_data = mirror;
	return 0;
}

static int mirror_release(struct inode *inode, struct file *file)
{
	struct mirror *mirror = file->private_data;

	debug_remove(mirror);
	vhm_dev_release(&mirror->dev);
	kvfree(mirror);
	return 0;
}

static long mirror_ioctl(struct file *file, unsigned int request, unsigned long argument)
{
	struct mirror *mirror = file->private_data;

	return vhm_dev_ioctl(&mirror->dev, request, argument);
}

static ssize_t mirror_read(struct file *file, char __user *to, size_t length, loff_t *offset)
{
	struct mirror *mirror = file->private_data;
	DEFINE_WAIT_FUNC(wait, woken_wake_function);
	long result;

	add_wait_queue(&mirror->readers, &wait);
	for (;;) {
		result = vhm_dev_read(&mirror->dev, port_uaddr(to), length);
		if (result != -EAGAIN || file->f_flags & O_NONBLOCK)
			break;
		if (signal_pending(current)) {
			result = -ERESTARTSYS;
			break;
		}
		if (!vhm_dev_translates(&mirror->dev)) {
			result = -EBADFD;
			break;
		}
		wait_woken(&wait, TASK_INTERRUPTIBLE, MAX_SCHEDULE_TIMEOUT);
	}
	remove_wait_queue(&mirror->readers, &wait);
	return result;
}

static ssize_t mirror_write(struct file *file, const char __user *from, size_t length,
			    loff_t *offset)
{
	struct mirror *mirror = file->private_data;

	return vhm_dev_write(&mirror->dev, port_uaddr(from), length);
}

static __poll_t mirror_poll(struct file *file, poll_table *table)
{
	struct mirror *mirror = file->private_data;

	poll_wait(file, &mirror->readers, table);
	return vhm_dev_readable(&mirror->dev) ? EPOLLIN | EPOLLRDNORM : 0;
}

void port_message_ready(struct vhm_dev *dev)
{
	wake_up_interruptible_poll(&mirror_of(dev)->readers, EPOLLIN | EPOLLRDNORM);
}

static const struct file_operations mirror_fops = {
	.owner = THIS_MODULE,
	.open = mirror_open,
	.release = mirror_release,
	.unlocked_ioctl = mirror_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.read = mirror_read,
	.write = mirror_write,
	.poll = mirror_poll,
	.llseek = noop_llseek,
};

static struct miscdevice node = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "vhost-net-mirror",
	.fops = &mirror_fops,
};

static int __init mirror_init(void)
{
	int error;

	limits.mem_regions = max_mem_regions;
	limits.iotlb_entries = max_iotlb_entries;
	limits.fork_from_owner = fork_from_owner_default;
	debug_init();
	error = misc_register(&node);
	if (error)
		debug_exit();
	return error;
}
module_init(mirror_init);

static void __exit mirror_exit(void)
{
	misc_deregister(&node);
	debug_exit();
}
module_exit(mirror_exit);

MODULE_DESCRIPTION("A vhost-net of its own beside the kernel's");
MODULE_AUTHOR("The vhostctl authors");
MODULE_LICENSE("GPL");
