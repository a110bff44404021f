// SPDX-License-Identifier: GPL-2.0-only
/*
 * Frames through the descriptor of a tap, macvtap or packet socket.
 *
 * A system call for each frame is what a frame costs here, so it is the cheapest one:
 * one buffer instead of a vector, whose import alone costs more than the copy of a small
 * frame, and no per-call flags where the descriptor has O_NONBLOCK. Calls follow each
 * other in bursts, between which the rings are worked on. io_uring was measured and is no
 * cheaper on a tap, where nothing ever waits.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

#include "user.h"

/* Linux 6.0 and newer */
#ifndef PACKET_VNET_HDR_SZ
#define PACKET_VNET_HDR_SZ 24
#endif

#define TUN_MAJOR	10
#define TUN_MINOR	200

/*
 * What the in-tree device copies into a page before it reaches the tap: up to here a
 * frame that none can be made of is the driver's error, beyond it is the network's.
 */
#define COPIED	3648

/* The largest GSO frame, its VLAN tag and every header before it. */
#define LONGEST	(65536 + 64)

/* Before each frame in the buffer, for a longer header than it came with. */
#define HEADROOM	64

/* macvtap and ipvtap have majors of their own, which are not fixed. */
static bool is_macvtap(unsigned int major)
{
	FILE *devices = fopen("/proc/devices", "re");
	bool found = false;
	char line[80];

	if (!devices)
		return false;
	while (!found && fgets(line, sizeof(line), devices)) {
		unsigned int number;
		char name[16];

		found = sscanf(line, "%u %15s", &number, name) == 2 && number == major &&
			(!strcmp(name, "macvtap") || !strcmp(name, "ipvtap"));
	}
	fclose(devices);
	return found;
}

static bool is_tap(const struct stat *status)
{
	unsigned int number = major(status->st_rdev);

	return S_ISCHR(status->st_mode) &&
	       ((number == TUN_MAJOR && minor(status->st_rdev) == TUN_MINOR) ||
		is_macvtap(number));
}

/* 0 if it has none. */
static int option(int fd, int level, int name)
{
	int value = 0;
	socklen_t length = sizeof(value);

	return getsockopt(fd, level, name, &value, &length) ? 0 : value;
}

static bool is_packet_socket(int fd, const struct stat *status)
{
	int domain = option(fd, SOL_SOCKET, SO_DOMAIN);
	int type = option(fd, SOL_SOCKET, SO_TYPE);

	if (!S_ISSOCK(status->st_mode))
		return false;
#ifdef VHM_HOSTILE
	if (domain == AF_UNIX && type == SOCK_DGRAM)
		return true;
#endif
	return domain == AF_PACKET && type == SOCK_RAW;
}

/* Others may change the file at any time, so it is asked again whenever the worker had slept. */
static void ask_header(struct port_backend *backend)
{
	int size;

	if (backend->queue) {
		u64 sleeps = backend->queue->dev->worker.sleeps;

		if (backend->asked == sleeps)
			return;
		backend->asked = sleeps;
	}
	backend->nonblocking = fcntl(backend->fd, F_GETFL) & O_NONBLOCK;
	if (backend->packet)
		return;
	backend->unlimited = !ioctl(backend->fd, TUNGETSNDBUF, &size) && size == INT_MAX;
	if (!backend->has_vnet || ioctl(backend->fd, TUNGETVNETHDRSZ, &size))
		return;
	backend->overhead += size - backend->vnet;
	backend->vnet = size;
}

/* A tun without its device tells nothing; it is refused when it is to be watched. */
static void ask_tap(struct port_backend *backend)
{
	struct ifreq request;

	memset(&request, 0, sizeof(request));
	if (ioctl(backend->fd, TUNGETIFF, &request))
		return;
	if (!(request.ifr_flags & IFF_NO_PI))
		backend->overhead = sizeof(struct tun_pi);
	backend->has_vnet = request.ifr_flags & IFF_VNET_HDR;
	ask_header(backend);
}

static void ask_socket(struct port_backend *backend)
{
	int size = option(backend->fd, SOL_PACKET, PACKET_VNET_HDR_SZ);

	if (!size && option(backend->fd, SOL_PACKET, PACKET_VNET_HDR))
		size = sizeof(struct virtio_net_hdr);
	backend->vnet = size;
	backend->overhead = size;
}

static int fill(struct port_backend *backend, int fd)
{
	struct stat status;

	backend->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	if (backend->fd < 0)
		return errno == EBADF ? -ENOTSOCK : -errno;
	if (fstat(backend->fd, &status))
		return -ENOTSOCK;
	backend->packet = is_packet_socket(backend->fd, &status);
	if (!backend->packet && !is_tap(&status))
		return -ENOTSOCK;
	if (backend->packet)
		ask_socket(backend);
	else
		ask_tap(backend);
	if (backend->packet)
		backend->nonblocking = fcntl(backend->fd, F_GETFL) & O_NONBLOCK;
	backend->buffer = malloc(BURST_BYTES);
	return backend->buffer ? 0 : -ENOMEM;
}

int port_backend_get(int fd, bool transmit, struct port_backend **backend)
{
	struct port_backend *new = calloc(1, sizeof(*new));
	int error;

	(void)transmit;
	if (!new)
		return -ENOMEM;
	error = fill(new, fd);
	if (error)
		backend_discard(new);
	else
		*backend = new;
	return error;
}

unsigned int backend_left(const struct port_backend *backend)
{
	return backend->count - backend->first;
}

void backend_discard(struct port_backend *backend)
{
	if (!backend)
		return;
	if (backend_left(backend)) {
		port_lock(&backend->queue->lock);
		backend->queue->stats.drops += backend_left(backend);
		port_unlock(&backend->queue->lock);
	}
	if (backend->fd >= 0)
		close(backend->fd);
	free(backend->buffer);
	free(backend);
}

/* Frames that were read ahead wait for the return of their file, as long as there is a worker. */
void port_backend_put(struct port_backend *backend)
{
	if (backend && backend_left(backend)) {
		struct port_worker *worker = &backend->queue->dev->worker;

		if (port_worker_is_mine(worker)) {
			struct port_backend *before = worker->parked;

			worker->parked = backend;
			backend = before;
		}
	}
	backend_discard(backend);
}

void backend_settle(struct port_backend *backend)
{
	backend->settling = true;
}

bool backend_unsettle(struct port_backend *backend)
{
	bool settling = backend->settling;

	backend->settling = false;
	/* What came meanwhile woke the worker then, and will not again. */
	backend->dry = false;
	return settling;
}

/*
 * Put what the tap has before a frame now in place of the @header bytes at @frame, before
 * which there is room. Returns where the frame begins now, NULL if there is not so much.
 */
static char *convert(const struct port_backend *backend, char *frame, size_t header)
{
	char old[HEADROOM];
	size_t kept = min_t(size_t, header, backend->vnet);

	if (kept > sizeof(old) || backend->overhead > header + HEADROOM)
		return NULL;
	memcpy(old, frame, kept);
	frame += header;
	frame -= backend->overhead;
	memset(frame, 0, backend->overhead);
	memcpy(frame + backend->overhead - backend->vnet, old, kept);
	return frame;
}

bool backend_adopt(struct port_backend *backend)
{
	struct port_worker *worker = &backend->queue->dev->worker;
	struct port_backend *parked = worker->parked;
	char *buffer = backend->buffer;
	unsigned int i;

	if (!parked || !same_file(parked->fd, backend->fd))
		return false;
	worker->parked = NULL;
	backend->buffer = parked->buffer;
	parked->buffer = buffer;
	for (i = parked->first; i < parked->count; i++) {
		char *start = parked->frame[i].start + parked->overhead - parked->vnet;

		start = convert(backend, start, parked->vnet);
		if (!start) {
			backend->queue->stats.drops++;
			continue;
		}
		backend->frame[backend->count].start = start;
		backend->frame[backend->count++].length =
			parked->frame[i].length - parked->overhead + backend->overhead;
	}
	parked->first = parked->count;
	backend_discard(parked);
	return backend->count;
}

bool port_backend_same(const struct port_backend *a, const struct port_backend *b)
{
	return same_file(a->fd, b->fd);
}

/* Copy the first @length bytes of the pieces: 0 or -EFAULT. */
static int gather(void *to, const struct iovec *iov, size_t length)
{
	for (; length; iov++) {
		size_t part = min_t(size_t, iov->iov_len, length);

		if (port_copy_in(to, port_uaddr(iov->iov_base), part))
			return -EFAULT;
		to += part;
		length -= part;
	}
	return 0;
}

static bool has_room(int fd)
{
	struct pollfd room = { .fd = fd, .events = POLLOUT };

	return poll(&room, 1, 0) == 1;
}

/*
 * Frames lie in the guest's memory, which whoever checks this process's accesses has to
 * leave alone: a sanitizer's write() would look at it. And syscall() is no place where a
 * thread is cancelled, which makes it the cheaper one.
 */
static long write_one(const struct port_backend *backend, const void *frame, size_t length)
{
	struct iovec whole = { (void *)frame, length };
	long done;

	if (backend->packet)
		return syscall(SYS_sendto, backend->fd, frame, length, MSG_DONTWAIT, NULL, 0);
	/* Without a limit there is nothing to wait for. */
	if (backend->nonblocking || backend->unlimited)
		return syscall(SYS_write, backend->fd, frame, length);
	done = syscall(SYS_pwritev2, backend->fd, &whole, 1, -1, -1, RWF_NOWAIT);
	if (done >= 0 || errno != EOPNOTSUPP)
		return done;
	if (has_room(backend->fd))
		return syscall(SYS_write, backend->fd, frame, length);
	errno = EAGAIN;
	return -1;
}

static long write_pieces(const struct port_backend *backend, const struct iovec *iov,
			 unsigned int count)
{
	struct msghdr message = { .msg_iov = (struct iovec *)iov, .msg_iovlen = count };
	long done;

	if (backend->packet)
		return syscall(SYS_sendmsg, backend->fd, &message, MSG_DONTWAIT);
	if (backend->nonblocking || backend->unlimited)
		return syscall(SYS_writev, backend->fd, iov, count);
	done = syscall(SYS_pwritev2, backend->fd, iov, count, -1, -1, RWF_NOWAIT);
	if (done >= 0 || errno != EOPNOTSUPP)
		return done;
	if (has_room(backend->fd))
		return syscall(SYS_writev, backend->fd, iov, count);
	errno = EAGAIN;
	return -1;
}

/* Whether a header asks for a checksum beyond its frame of @length bytes, itself included. */
static bool beyond(const struct virtio_net_hdr *header, size_t length)
{
	return header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM &&
	       (size_t)__le16_to_cpu(header->csum_start) + __le16_to_cpu(header->csum_offset) + 2 >
		       length;
}

/* Write what is kept: false if every frame found no device behind the tap. */
static bool write_kept(struct port_backend *backend)
{
	bool found = !backend->count;
	unsigned int i;

	for (i = 0; i < backend->count; i++) {
		long done = write_one(backend, backend->frame[i].start, backend->frame[i].length);

		/* Whatever else is wrong with a frame, the network dropped it. */
		if (likely(done >= 0) || errno != EBADFD)
			found = true;
	}
	backend->count = 0;
	backend->filled = 0;
	return found;
}

/* Keep a small frame as the tap wants it: 0, or -EFAULT or -EINVAL if none can be made of it. */
static int keep(struct port_backend *backend, const struct iovec *iov, size_t length,
		size_t header)
{
	char *start;

	if (length < header)
		return -EFAULT;
	if (backend->count == BURST || backend->filled + HEADROOM + COPIED > BURST_BYTES)
		write_kept(backend);
	if (!backend->count)
		ask_header(backend);
	start = backend->buffer + backend->filled + HEADROOM;
	if (gather(start, iov, length))
		return -EFAULT;
	if (header && beyond((struct virtio_net_hdr *)start, length))
		return -EINVAL;
	if (header != backend->overhead)
		start = convert(backend, start, header);
	if (!start)
		return 0;
	backend->frame[backend->count].start = start;
	backend->frame[backend->count++].length = length - header + backend->overhead;
	backend->filled += HEADROOM + ((length + 63) & ~63UL);
	return 0;
}

/* The system call that sends reads the pieces too; true if that is to fail. */
static bool touch(const struct iovec *iov, unsigned int count)
{
	bool fails = false;

	for (; count--; iov++)
		fails |= port_touch(port_uaddr(iov->iov_base), iov->iov_len, PORT_READ);
	return fails;
}

int port_send(struct port_backend *backend, const struct iovec *iov, unsigned int count,
	      size_t length, size_t header, bool more)
{
	long done;

	(void)more;
	if (hostile_fault(PORT_FAULT_SEND))
		return -EAGAIN;
	if (backend->unlimited && length <= COPIED)
		return keep(backend, iov, length, header);
	write_kept(backend);
	if (touch(iov, count))
		return 0;
	if (count == 1)
		done = write_one(backend, iov->iov_base, length);
	else
		done = write_pieces(backend, iov, count);
	return done < 0 && (errno == EAGAIN || errno == ENOMEM || errno == ENOBUFS) ? -EAGAIN : 0;
}

int port_send_flush(struct port_backend *backend)
{
	return write_kept(backend) ? 0 : -EBADFD;
}

static ssize_t read_frame(const struct port_backend *backend, char *to)
{
	struct iovec room = { to, LONGEST };
	struct pollfd now = { .fd = backend->fd, .events = POLLIN };
	ssize_t length;

	if (backend->packet)
		return recv(backend->fd, to, LONGEST, MSG_DONTWAIT);
	if (backend->nonblocking)
		return syscall(SYS_read, backend->fd, to, LONGEST);
	length = preadv2(backend->fd, &room, 1, -1, RWF_NOWAIT);
	if (length >= 0 || errno != EOPNOTSUPP || poll(&now, 1, 0) != 1)
		return length;
	return read(backend->fd, to, LONGEST);
}

/* Read what there is, within bounds: false if there is nothing. */
static bool read_burst(struct port_backend *backend)
{
	backend->first = 0;
	backend->count = 0;
	backend->filled = 0;
	if (backend->settling)
		return false;
	/* If anything came since the last look, that wakes the worker by itself. */
	if (backend->dry) {
		backend->dry = false;
		return false;
	}
	ask_header(backend);
	while (backend->count < BURST && backend->filled + HEADROOM + LONGEST <= BURST_BYTES) {
		char *start = backend->buffer + backend->filled + HEADROOM;
		ssize_t length = read_frame(backend, start);

		/* A socket tells of an error once, before the frames that it has. */
		if (length < 0 && errno != EAGAIN)
			length = read_frame(backend, start);
		if (length <= 0)
			break;
		/* A frame without a byte behind its header is none. */
		if ((size_t)length <= backend->overhead)
			continue;
		backend->frame[backend->count].start = start;
		backend->frame[backend->count++].length = length;
		backend->filled += HEADROOM + ((length + 63) & ~63UL);
	}
	/* After several more may have come by the time that they are worked on. */
	backend->dry = backend->count == 1;
	return backend->count;
}

size_t port_receive_peek(struct port_backend *backend)
{
	if (backend->first == backend->count && !read_burst(backend))
		return 0;
	return backend->frame[backend->first].length - backend->overhead;
}

long port_receive(struct port_backend *backend, const struct iovec *iov, unsigned int count,
		  size_t length, size_t header)
{
	size_t whole = backend->frame[backend->first].length;
	const char *from = backend->frame[backend->first++].start;
	size_t left = min_t(size_t, whole, length);

	(void)header;
	if (hostile_fault(PORT_FAULT_RECEIVE))
		return -EIO;
	for (; left && count; iov++, count--) {
		size_t part = min_t(size_t, iov->iov_len, left);

		if (port_copy_out(port_uaddr(iov->iov_base), from, part))
			return -EFAULT;
		from += part;
		left -= part;
	}
	return whole;
}

void port_receive_drop(struct port_backend *backend)
{
	backend->first++;
}
