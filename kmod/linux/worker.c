// SPDX-License-Identifier: GPL-2.0-only
/*
 * The one thread that works on a device's rings with the owner's memory at hand.
 *
 * It is a thread of the owner's process where the kernel has those, so that it
 * counts, is limited and is killed with it; or a kernel thread that borrows the
 * owner's memory and joins its cgroups, which outlives the owner until the last
 * descriptor of the device is closed.
 */
#include <linux/cgroup.h>
#include <linux/completion.h>
#include <linux/err.h>
#include <linux/kthread.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include "vhm.h"

struct marker {
	struct port_work work;
	struct completion passed;
};

/* What a kernel thread is told before it works. */
struct start {
	struct port_worker *worker;
	struct task_struct *owner;
	struct completion done;
	int error;
};

void port_work_init(struct port_work *work, struct port_worker *worker, struct vhm_queue *queue)
{
	work->queued = 0;
	work->worker = worker;
	work->queue = queue;
}

/*
 * Whoever finds the list empty wakes the worker; who comes later finds it awake.
 * The worker itself looks at the list once more before it sleeps.
 */
void port_work_queue(struct port_work *work)
{
	struct port_worker *worker = work->worker;
	struct task_struct *task = worker->task;

	if (!task || test_and_set_bit(0, &work->queued))
		return;
	if (llist_add(&work->node, &worker->works) && task != current)
		wake_up_process(task);
}

/* Take what is queued off the list; run it, or forget all but the flushes. */
static bool take_works(struct port_worker *worker, bool run)
{
	struct llist_node *list = llist_del_all(&worker->works);
	struct port_work *work, *next;

	if (!list)
		return false;
	__set_current_state(TASK_RUNNING);
	llist_for_each_entry_safe(work, next, llist_reverse_order(list), node) {
		if (!work->queue) {
			complete(&container_of(work, struct marker, work)->passed);
			continue;
		}
		clear_bit(0, &work->queued);
		/* Before the ring is read: what comes later queues the work again. */
		smp_mb__after_atomic();
		if (run) {
			vhm_queue_run(work->queue);
			cond_resched();
		}
	}
	return true;
}

/* If the worker dies, it or we see the other's write; it does not matter if both empty the list. */
void port_worker_flush(struct port_worker *worker)
{
	struct marker marker;

	if (!worker->task)
		return;
	port_work_init(&marker.work, worker, NULL);
	init_completion(&marker.passed);
	port_work_queue(&marker.work);
	if (READ_ONCE(worker->dead))
		take_works(worker, false);
	wait_for_completion(&marker.passed);
}

static int run_kthread(void *data)
{
	struct start *start = data;
	struct port_worker *worker = start->worker;

	/* From in here, since a new kernel thread chooses its CPUs when it first runs. */
	start->error = cgroup_attach_task_all(start->owner, current);
	complete(&start->done);
	kthread_use_mm(worker->mm);
	for (;;) {
		set_current_state(TASK_INTERRUPTIBLE);
		if (kthread_should_stop())
			break;
		if (!take_works(worker, true))
			schedule();
	}
	__set_current_state(TASK_RUNNING);
	kthread_unuse_mm(worker->mm);
	return 0;
}

static int start_kthread(struct port_worker *worker)
{
	struct start start = { .worker = worker, .owner = current };
	struct task_struct *task;

	init_completion(&start.done);
	task = kthread_create(run_kthread, &start, "vhost-%d", task_pid_nr(current));
	if (IS_ERR(task))
		return PTR_ERR(task);
	wake_up_process(task);
	wait_for_completion(&start.done);
	if (start.error) {
		kthread_stop(task);
		return start.error;
	}
	worker->task = get_task_struct(task);
	return 0;
}

#if VHM_HAVE_TASK
/* It is woken by whoever has the device open, and may be dead and gone by then. */
static void know_task(struct port_worker *worker)
{
	if (unlikely(!worker->task))
		worker->task = get_task_struct(current);
}

static bool run_task(void *data)
{
	struct port_worker *worker = data;

	know_task(worker);
	return take_works(worker, true);
}

static void task_killed(void *data)
{
	struct port_worker *worker = data;

	know_task(worker);
	WRITE_ONCE(worker->dead, true);
	/* Before the list is read, as port_worker_flush() adds to it and then reads this. */
	smp_mb();
	take_works(worker, false);
}

static int start_task(struct port_worker *worker)
{
	char name[TASK_COMM_LEN];
	struct marker marker;

	snprintf(name, sizeof(name), "vhost-%d", task_pid_nr(current));
	worker->vtask = vhost_task_create(run_task, task_killed, worker, name);
	if (IS_ERR_OR_NULL(worker->vtask)) {
		worker->vtask = NULL;
		return -ENOMEM;
	}
	/* Passes when the thread has said who it is, be it that it is killed. */
	port_work_init(&marker.work, worker, NULL);
	init_completion(&marker.passed);
	llist_add(&marker.work.node, &worker->works);
	vhost_task_start(worker->vtask);
	wait_for_completion(&marker.passed);
	return 0;
}

static void stop_task(struct port_worker *worker)
{
	vhost_task_stop(worker->vtask);
}
#else
static int start_task(struct port_worker *worker)
{
	return -ENOMEM;
}

static void stop_task(struct port_worker *worker)
{
}
#endif

bool port_worker_choice(void)
{
	return VHM_HAVE_TASK;
}

/* A kernel thread keeps the owner's memory alive, a thread of the owner needs not. */
static void forget_owner(struct port_worker *worker, bool as_task)
{
	if (worker->task)
		put_task_struct(worker->task);
	if (as_task)
		mmdrop(worker->mm);
	else
		mmput(worker->mm);
	memset(worker, 0, sizeof(*worker));
}

int port_worker_start(struct port_worker *worker, bool as_task)
{
	int error;

	as_task = as_task && VHM_HAVE_TASK;
	init_llist_head(&worker->works);
	if (as_task)
		mmgrab(current->mm);
	else
		mmget(current->mm);
	worker->mm = current->mm;
	error = as_task ? start_task(worker) : start_kthread(worker);
	if (!error)
		return 0;
	forget_owner(worker, as_task);
	/* The kernels that have tasks give one reason only, of either kind of worker. */
	return VHM_HAVE_TASK ? -ENOMEM : error;
}

void port_worker_stop(struct port_worker *worker)
{
	bool as_task = worker->vtask;

	if (!worker->task)
		return;
	port_worker_flush(worker);
	if (as_task)
		stop_task(worker);
	else
		kthread_stop(worker->task);
	take_works(worker, false);
	forget_owner(worker, as_task);
}

bool port_worker_owned(const struct port_worker *worker)
{
	return worker->mm;
}

bool port_worker_is_mine(const struct port_worker *worker)
{
	return worker->mm && worker->mm == current->mm;
}

bool port_worker_busy(const struct port_worker *worker)
{
	return !llist_empty(&worker->works) || need_resched() || signal_pending(current);
}
