// SPDX-License-Identifier: GPL-2.0-only
/*
 * The worker: one thread that waits in epoll for kicks and backends and runs the
 * works that they queue. Everything is watched edge-triggered, so nothing is read to
 * be woken again, and what is queued on the thread itself costs no system call.
 *
 * After a fork() the child has neither the thread nor a right to the epoll: the
 * parent's watches are in it. There all of this does nothing but close descriptors.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "user.h"

/* States of a poll. */
enum {
	POLL_IDLE,	/* watches nothing */
	POLL_ON,
	POLL_OFF,	/* paused */
	POLL_MISSED,	/* paused, and something became ready since */
};

#define EVENTS	8	/* more than a worker watches, so that one call sees all */

static __thread struct port_worker *current;

#define load(place)		__atomic_load_n(place, __ATOMIC_ACQUIRE)
#define store(place, value)	__atomic_store_n(place, value, __ATOMIC_RELEASE)

static void wake(struct port_worker *worker)
{
	const u64 one = 1;

	/* The counter cannot come near its end, at which alone this would fail. */
	if (write(worker->wake, &one, sizeof(one)) < 0)
		return;
}

static void ready(struct port_poll *poll)
{
	unsigned int state = load(&poll->state);

	while (state == POLL_OFF) {
		if (__atomic_compare_exchange_n(&poll->state, &state, POLL_MISSED, false,
						__ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
			return;
	}
	if (state == POLL_ON)
		port_work_queue(poll->work);
}

static void collect(struct port_worker *worker, int timeout)
{
	struct epoll_event events[EVENTS];
	int count = epoll_wait(worker->epoll, events, EVENTS, timeout);

	while (count-- > 0) {
		if (events[count].data.ptr)
			ready(events[count].data.ptr);
	}
}

static void run(struct port_worker *worker)
{
	unsigned int queued = __atomic_exchange_n(&worker->queued, 0, __ATOMIC_ACQ_REL);
	unsigned int i;

	for (i = 0; i < worker->works; i++) {
		if (queued & worker->work[i]->bit)
			vhm_queue_run(worker->work[i]->queue);
	}
}

static void *work(void *argument)
{
	struct port_worker *worker = argument;
	bool ending = false;
	u64 done = 0;

	current = worker;
	store(&worker->tid, gettid());
	while (!ending) {
		/* What came before these were set is collected and run below. */
		u64 asked = load(&worker->asked);

		ending = load(&worker->ending);
		if (ending || asked != done || load(&worker->queued)) {
			collect(worker, 0);
		} else {
			collect(worker, -1);
			worker->sleeps++;
		}
		run(worker);
		if (asked != done) {
			done = asked;
			pthread_mutex_lock(&worker->mutex);
			worker->done = done;
			pthread_cond_broadcast(&worker->flushed);
			pthread_mutex_unlock(&worker->mutex);
		}
	}
	return NULL;
}

bool worker_is_current(void)
{
	return current;
}

static bool is_mine(const struct port_worker *worker)
{
	return worker->owner == getpid();
}

bool port_worker_choice(void)
{
	return false;
}

bool port_worker_owned(const struct port_worker *worker)
{
	return worker->owner;
}

bool port_worker_is_mine(const struct port_worker *worker)
{
	return is_mine(worker);
}

bool port_worker_busy(const struct port_worker *worker)
{
	if (worker == current)
		collect(current, 0);
	return load(&worker->queued) || load(&worker->ending) ||
	       load(&worker->asked) != worker->done;
}

/* The thread handles no signal but those that its own faults raise. */
static int start_thread(struct port_worker *worker)
{
	char name[16];
	sigset_t blocked, old;
	int error;

	sigfillset(&blocked);
	sigdelset(&blocked, SIGSEGV);
	sigdelset(&blocked, SIGBUS);
	sigdelset(&blocked, SIGILL);
	sigdelset(&blocked, SIGFPE);
	sigdelset(&blocked, SIGABRT);
	pthread_sigmask(SIG_SETMASK, &blocked, &old);
	error = pthread_create(&worker->thread, NULL, work, worker);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (error)
		return -error;
	snprintf(name, sizeof(name), "vhost-%d", gettid());
	pthread_setname_np(worker->thread, name);
	return 0;
}

static void close_both(struct port_worker *worker)
{
	close(worker->epoll);
	close(worker->wake);
}

int port_worker_start(struct port_worker *worker, bool as_task)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLET };
	int error = guard_install();

	(void)as_task;
	/* Somebody may have put a handler over ours since the device was opened. */
	if (error)
		return error;
	worker->queued = 0;
	worker->asked = 0;
	worker->done = 0;
	worker->ending = false;
	worker->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (worker->epoll < 0)
		return -errno;
	worker->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (worker->wake < 0) {
		error = -errno;
		close(worker->epoll);
		return error;
	}
	if (epoll_ctl(worker->epoll, EPOLL_CTL_ADD, worker->wake, &event)) {
		error = -errno;
		close_both(worker);
		return error;
	}
	pthread_mutex_init(&worker->mutex, NULL);
	pthread_cond_init(&worker->flushed, NULL);
	worker->owner = getpid();
	error = start_thread(worker);
	if (!error) {
		/* It has said by then which thread it is. */
		port_worker_flush(worker);
		return 0;
	}
	worker->owner = 0;
	close_both(worker);
	return error == -EAGAIN ? -ENOMEM : error;
}

void port_worker_stop(struct port_worker *worker)
{
	if (!worker->owner)
		return;
	if (is_mine(worker)) {
		store(&worker->ending, true);
		wake(worker);
		pthread_join(worker->thread, NULL);
		pthread_cond_destroy(&worker->flushed);
		pthread_mutex_destroy(&worker->mutex);
	}
	close_both(worker);
	backend_discard(worker->parked);
	worker->parked = NULL;
	worker->owner = 0;
	worker->tid = 0;
}

void port_worker_flush(struct port_worker *worker)
{
	u64 wanted;

	if (!is_mine(worker))
		return;
	wanted = __atomic_add_fetch(&worker->asked, 1, __ATOMIC_ACQ_REL);
	wake(worker);
	pthread_mutex_lock(&worker->mutex);
	while (worker->done < wanted)
		pthread_cond_wait(&worker->flushed, &worker->mutex);
	pthread_mutex_unlock(&worker->mutex);
}

void port_work_init(struct port_work *work, struct port_worker *worker, struct vhm_queue *queue)
{
	work->worker = worker;
	work->queue = queue;
	work->bit = 1U << worker->works;
	worker->work[worker->works++] = work;
}

void port_work_queue(struct port_work *work)
{
	struct port_worker *worker = work->worker;
	unsigned int before = __atomic_fetch_or(&worker->queued, work->bit, __ATOMIC_ACQ_REL);

	if (!(before & work->bit) && current != worker)
		wake(worker);
}

void port_poll_init(struct port_poll *poll, struct port_work *work)
{
	poll->work = work;
	poll->state = POLL_IDLE;
}

/* Such a descriptor never gets ready: a tun without its device. */
static bool is_broken(int fd)
{
	struct pollfd now = { .fd = fd };

	return poll(&now, 1, 0) < 0 || now.revents & (POLLERR | POLLNVAL);
}

static int watch(struct port_poll *poll, int fd, u32 events)
{
	struct epoll_event event = { .events = events | EPOLLET, .data.ptr = poll };

	if (is_broken(fd))
		return -EINVAL;
	store(&poll->state, POLL_ON);
	poll->fd = fd;
	if (!epoll_ctl(poll->work->worker->epoll, EPOLL_CTL_ADD, fd, &event))
		return 0;
	store(&poll->state, POLL_IDLE);
	return -EINVAL;
}

int port_poll_kick(struct port_poll *poll, struct port_kick *kick)
{
	return watch(poll, kick->fd, EPOLLIN);
}

int port_poll_backend(struct port_poll *poll, struct port_backend *backend, bool transmit)
{
	int error = watch(poll, backend->fd, transmit ? EPOLLOUT : EPOLLIN);

	if (error)
		return error;
	poll->transmit = transmit;
	backend->queue = poll->work->queue;
	if (!transmit && backend_adopt(backend))
		port_work_queue(poll->work);
	return 0;
}

/* What was missed before stays missed: the backend may know less than the poll. */
void port_poll_pause(struct port_poll *poll)
{
	unsigned int state = POLL_ON;

	__atomic_compare_exchange_n(&poll->state, &state, POLL_OFF, false, __ATOMIC_ACQ_REL,
				    __ATOMIC_ACQUIRE);
}

void port_poll_resume(struct port_poll *poll)
{
	struct epoll_event event = { .events = EPOLLOUT | EPOLLET, .data.ptr = poll };

	if (load(&poll->state) == POLL_IDLE)
		return;
	if (__atomic_exchange_n(&poll->state, POLL_ON, __ATOMIC_ACQ_REL) == POLL_MISSED)
		port_work_queue(poll->work);
	/* A socket tells that it has room again to those who looked when it had none. */
	if (poll->transmit)
		epoll_ctl(poll->work->worker->epoll, EPOLL_CTL_MOD, poll->fd, &event);
}

void port_poll_stop(struct port_poll *poll)
{
	if (load(&poll->state) == POLL_IDLE)
		return;
	store(&poll->state, POLL_IDLE);
	if (is_mine(poll->work->worker))
		epoll_ctl(poll->work->worker->epoll, EPOLL_CTL_DEL, poll->fd, NULL);
}
