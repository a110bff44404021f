// SPDX-License-Identifier: GPL-2.0-or-later
/* What the engine is measured against: write(2) and read(2) on a tap, and nothing else. */
#include <linux/if_packet.h>
#include <poll.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define ROUND 256 /* calls between looks at the clock */

static atomic_int flooding;

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

/* Frames a second. */
double bare_write(int fd, const void *frame, size_t length, double seconds)
{
	double start = now();
	long frames = 0;

	do {
		for (int i = 0; i < ROUND; i++)
			frames += write(fd, frame, length) == (ssize_t)length;
	} while (now() < start + seconds);
	return frames / (now() - start);
}

double bare_read(int fd, double seconds)
{
	struct pollfd readable = { fd, POLLIN, 0 };
	static char frame[65600];
	double start = now();
	long frames = 0;

	do {
		for (int i = 0; i < ROUND; i++) {
			if (read(fd, frame, sizeof(frame)) > 0)
				frames++;
			else
				poll(&readable, 1, 10);
		}
	} while (now() < start + seconds);
	return frames / (now() - start);
}

/* Send the frame out of an interface until flood_end(). */
void flood(int packet_socket, int interface, const void *frame, size_t length)
{
	struct sockaddr_ll to = {
		.sll_family = AF_PACKET,
		.sll_ifindex = interface,
		.sll_halen = 6,
	};

	flooding = 1;
	while (flooding)
		sendto(packet_socket, frame, length, 0, (void *)&to, sizeof(to));
}

void flood_end(void)
{
	flooding = 0;
}
