// SPDX-License-Identifier: GPL-2.0-only
/* Eventfds, held by duplicates: the owner may close its descriptors at any time. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kcmp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "user.h"

/* The number that the kernel gave the eventfd behind @fd, -1 if it does not say. */
static long eventfd_id(int fd)
{
	char path[40];
	char line[80];
	long id = -1;
	FILE *info;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	info = fopen(path, "re");
	if (!info)
		return -1;
	while (fgets(line, sizeof(line), info) && sscanf(line, "eventfd-id: %ld", &id) != 1)
		;
	fclose(info);
	return id;
}

bool same_file(int a, int b)
{
	long result = syscall(SYS_kcmp, getpid(), getpid(), KCMP_FILE, a, b);

	/* Some sandboxes forbid it, and some kernels lack it. */
	if (result < 0) {
		long id = eventfd_id(a);

		return id >= 0 && id == eventfd_id(b);
	}
	return result == 0;
}

/* A duplicate of the eventfd @fd, -EBADF, -EINVAL for another kind of file, or -EMFILE. */
static int duplicate(int fd)
{
	static const char kind[] = "anon_inode:[eventfd]";
	char path[40];
	char target[sizeof(kind)];
	ssize_t length;
	int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);

	if (copy < 0)
		return -errno;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", copy);
	length = readlink(path, target, sizeof(target));
	if (length == sizeof(kind) - 1 && !memcmp(target, kind, length))
		return copy;
	close(copy);
	return -EINVAL;
}

int port_event_get(int fd, struct port_event **event)
{
	int copy = duplicate(fd);

	if (copy < 0)
		return copy;
	*event = malloc(sizeof(**event));
	if (!*event) {
		close(copy);
		return -ENOMEM;
	}
	(*event)->fd = copy;
	(*event)->blocking = !(fcntl(copy, F_GETFL) & O_NONBLOCK);
	return 0;
}

void port_event_put(struct port_event *event)
{
	if (event)
		close(event->fd);
	free(event);
}

void port_event_signal(struct port_event *event)
{
	struct pollfd room = { .fd = event->fd, .events = POLLOUT };
	const u64 one = 1;

	/* If the counter is full whoever waits for it is awake, and we must not sleep. */
	if (event->blocking && poll(&room, 1, 0) != 1)
		return;
	if (write(event->fd, &one, sizeof(one)) < 0)
		return;
}

int port_kick_get(int fd, struct port_kick **kick)
{
	int copy = duplicate(fd);

	if (copy < 0)
		return copy;
	*kick = malloc(sizeof(**kick));
	if (!*kick) {
		close(copy);
		return -ENOMEM;
	}
	(*kick)->fd = copy;
	return 0;
}

void port_kick_put(struct port_kick *kick)
{
	if (kick)
		close(kick->fd);
	free(kick);
}

bool port_kick_same(const struct port_kick *a, const struct port_kick *b)
{
	return same_file(a->fd, b->fd);
}
