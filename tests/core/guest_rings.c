// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Driver rings against a device in another thread, at full speed: what the sanitizers and the
 * memory model make of them. Frame k carries k, so loss, repetition and disorder are seen at
 * once; a lost notification leaves both threads asleep.
 */
#include "pump.h"

#include <linux/virtio_config.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define CHECK(condition)                                                                      \
	do {                                                                                  \
		if (!(condition)) {                                                           \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);       \
			abort();                                                              \
		}                                                                             \
	} while (0)

#define GPA 0x100000000ull
#define BUFFER 256u
#define MAX_FRAME 1000u
#define PATIENCE_MS 60000	/* a sleep that ends by itself is a failure */

struct scenario {
	uint64_t features;
	uint16_t size, base;
	uint32_t frames;
};

/* One ring as the device has it. */
struct device {
	const struct scenario *scenario;
	struct vring vring;
	uint8_t *arena;
	int kick, call;
	uint16_t last_avail, used_idx, signalled;
	uint32_t header;
	bool receive, merge;
	uint64_t calls;
};

static uint32_t length_of(uint32_t k)
{
	return 8 + k * 37 % (MAX_FRAME - 8);
}

static void make_frame(uint8_t *frame, uint32_t k)
{
	memset(frame, (int)(k & 0xff), length_of(k));
	memcpy(frame, &k, sizeof(k));
}

static void check_frame(const uint8_t *frame, uint32_t len, uint32_t k)
{
	uint8_t expected[MAX_FRAME];

	make_frame(expected, k);
	CHECK(len == length_of(k));
	CHECK(!memcmp(frame, expected, len));
}

static bool event_idx(const struct device *d)
{
	return d->scenario->features >> VIRTIO_RING_F_EVENT_IDX & 1;
}

static bool has_avail(const struct device *d, uint16_t chains)
{
	uint16_t idx = __atomic_load_n(&d->vring.avail->idx, __ATOMIC_ACQUIRE);

	return (uint16_t)(idx - d->last_avail) >= chains;
}

/* Ask for a kick once so many chains are available; 0: for none. */
static void set_notify(struct device *d, uint16_t chains)
{
	if (!event_idx(d))
		__atomic_store_n(&d->vring.used->flags, chains ? 0 : VRING_USED_F_NO_NOTIFY,
				 __ATOMIC_RELAXED);
	else if (chains)
		__atomic_store_n(&vring_avail_event(&d->vring),
				 (uint16_t)(d->last_avail + chains - 1), __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static void signal_used(struct device *d)
{
	const uint64_t one = 1;
	uint16_t old = d->signalled;
	bool wanted;

	__atomic_store_n(&d->vring.used->idx, d->used_idx, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (event_idx(d))
		wanted = vring_need_event(
			__atomic_load_n(&vring_used_event(&d->vring), __ATOMIC_RELAXED),
			d->used_idx, old);
	else
		wanted = !(__atomic_load_n(&d->vring.avail->flags, __ATOMIC_RELAXED) &
			   VRING_AVAIL_F_NO_INTERRUPT);
	d->signalled = d->used_idx;
	if (wanted) {
		d->calls++;
		CHECK(write(d->call, &one, sizeof(one)) == sizeof(one));
	}
}

/* Sleep until so many chains are available, with nothing kept back from the driver. */
static void wait_avail(struct device *d, uint16_t chains)
{
	struct pollfd file = {.fd = d->kick, .events = POLLIN};
	uint64_t kicks;

	if (has_avail(d, chains))
		return;
	signal_used(d);
	while (!has_avail(d, chains)) {
		set_notify(d, chains);
		if (!has_avail(d, chains)) {
			CHECK(poll(&file, 1, -1) == 1);
			CHECK(read(d->kick, &kicks, sizeof(kicks)) == sizeof(kicks));
		}
		set_notify(d, 0);
	}
}

static void use(struct device *d, uint16_t head, uint32_t len)
{
	d->vring.used->ring[d->used_idx++ % d->vring.num] =
		(struct vring_used_elem){.id = head, .len = len};
}

/* Copy between `data` and the next chain, as far as it goes; returns its head. */
static uint16_t walk(struct device *d, uint8_t *data, uint32_t *len)
{
	uint16_t head = d->vring.avail->ring[d->last_avail++ % d->vring.num];
	const struct vring_desc *desc = &d->vring.desc[head];
	const struct vring_desc *table = d->vring.desc;
	uint32_t done = 0;

	CHECK(head < d->vring.num);
	if (desc->flags & VRING_DESC_F_INDIRECT) {
		table = (const void *)(d->arena + (desc->addr - GPA));
		desc = table;
	}
	for (;; desc = &table[desc->next]) {
		uint8_t *at = d->arena + (desc->addr - GPA);
		uint32_t n = desc->len;

		CHECK(!!(desc->flags & VRING_DESC_F_WRITE) == d->receive);
		if (d->receive) {
			n = n < *len - done ? n : *len - done;
			memcpy(at, data + done, n);
		} else {
			CHECK(done + n <= BUFFER + MAX_FRAME);
			memcpy(data + done, at, n);
		}
		done += n;
		if (!(desc->flags & VRING_DESC_F_NEXT))
			break;
	}
	*len = done;
	return head;
}

static void *consume(void *arg)
{
	struct device *d = arg;
	uint8_t data[BUFFER + MAX_FRAME];

	for (uint32_t k = 0; k < d->scenario->frames; k++) {
		uint32_t len;

		wait_avail(d, 1);
		use(d, walk(d, data, &len), 0);
		check_frame(data + d->header, len - d->header, k);
		if (k % 64 == 63)
			signal_used(d);
	}
	signal_used(d);
	return NULL;
}

static void *produce(void *arg)
{
	struct device *d = arg;
	uint8_t data[12 + MAX_FRAME];

	for (uint32_t k = 0; k < d->scenario->frames; k++) {
		uint32_t left = d->header + length_of(k);
		uint16_t buffers = (uint16_t)((left + BUFFER - 1) / BUFFER);
		uint8_t *from = data;

		memset(data, 0, d->header);
		if (d->merge)
			memcpy(data + 10, &buffers, sizeof(buffers));
		make_frame(data + d->header, k);
		wait_avail(d, d->merge ? buffers : 1);
		while (left) {
			uint32_t len = left;
			uint16_t head = walk(d, from, &len);

			use(d, head, len);
			from += len;
			left -= len;
		}
		if (k % 8 == 7)
			signal_used(d);
	}
	signal_used(d);
	return NULL;
}

static struct net_queue *make_queue(struct device *d, const struct scenario *s, bool receive)
{
	struct net_queue_config c = {
		.features = s->features,
		.buffer_size = BUFFER,
		.max_frame = MAX_FRAME,
		.size = s->size,
		.base = s->base,
		.receive = receive,
		.kick = eventfd(0, EFD_NONBLOCK),
		.call = eventfd(0, EFD_NONBLOCK),
		.desc = aligned_alloc(16, 16u * s->size),
		.avail = malloc(6 + 2u * s->size),
		.used = malloc(6 + 8u * s->size),
		.arena_gpa = GPA,
	};
	struct net_shape shape;

	net_shape(&shape, s->features, BUFFER, MAX_FRAME, receive);
	c.arena = aligned_alloc(64, ring_arena(s->size, shape.segments, BUFFER));
	*d = (struct device){
		.scenario = s,
		.vring = {.num = s->size, .desc = c.desc, .avail = c.avail, .used = c.used},
		.arena = c.arena,
		.kick = c.kick,
		.call = c.call,
		.last_avail = s->base,
		.used_idx = s->base,
		.signalled = s->base,
		.header = shape.header,
		.receive = receive,
		.merge = shape.mergeable,
	};
	return net_queue_create(&c);
}

static void free_queue(struct net_queue *q, struct device *d)
{
	net_queue_destroy(q);
	close(d->kick);
	close(d->call);
	free(d->vring.desc);
	free(d->vring.avail);
	free(d->vring.used);
	free(d->arena);
}

/* Two threads in step, so that what they do next happens at the same moment. */
struct race {
	struct device device;
	unsigned int driver_steps, device_steps;
	bool device_saw;
};

static void meet(unsigned int *mine, const unsigned int *other)
{
	unsigned int step = *mine + 1;

	__atomic_store_n(mine, step, __ATOMIC_RELEASE);
	for (unsigned int spins = 1; __atomic_load_n(other, __ATOMIC_ACQUIRE) < step; spins++)
		if (spins % 4096 == 0)
			sched_yield();
}

static void *race_device(void *arg)
{
	struct race *race = arg;
	struct device *d = &race->device;
	uint8_t data[BUFFER + MAX_FRAME];

	for (uint32_t k = 0; k < d->scenario->frames; k++) {
		uint32_t len;

		meet(&race->device_steps, &race->driver_steps);
		set_notify(d, 1);
		race->device_saw = has_avail(d, 1);
		meet(&race->device_steps, &race->driver_steps);
		set_notify(d, 0);
		CHECK(has_avail(d, 1));
		use(d, walk(d, data, &len), 0);
		meet(&race->device_steps, &race->driver_steps);
		signal_used(d);
		meet(&race->device_steps, &race->driver_steps);
	}
	return NULL;
}

/*
 * The driver publishes while the device asks for kicks, and asks for an interrupt while the device
 * publishes: one of both must see what the other did, or both would sleep.
 */
static void race_notifications(const struct scenario *s)
{
	struct race race = {0};
	struct net_queue *q = make_queue(&race.device, s, false);
	uint8_t frame[MAX_FRAME];
	pthread_t thread;

	make_frame(frame, 0);
	CHECK(!pthread_create(&thread, NULL, race_device, &race));
	for (uint32_t k = 0; k < s->frames; k++) {
		uint64_t kicks = q->ring.kicks;
		uint64_t calls = race.device.calls;
		bool there;

		CHECK(net_put(q, frame, length_of(0)));
		meet(&race.driver_steps, &race.device_steps);
		CHECK(!ring_publish(&q->ring));
		meet(&race.driver_steps, &race.device_steps);
		CHECK(race.device_saw || q->ring.kicks > kicks);
		meet(&race.driver_steps, &race.device_steps);
		there = ring_arm(&q->ring, 1);
		meet(&race.driver_steps, &race.device_steps);
		CHECK(there || race.device.calls > calls);
		ring_disarm(&q->ring);
		CHECK(!net_reclaim(q));
	}
	pthread_join(thread, NULL);
	printf("races: %u\n", s->frames);
	free_queue(q, &race.device);
}

static void transmit(const struct scenario *s)
{
	struct device d;
	struct net_queue *q = make_queue(&d, s, false);
	uint8_t frame[MAX_FRAME];
	struct net_stats stats;
	pthread_t thread;
	uint32_t k = 0;

	CHECK(!pthread_create(&thread, NULL, consume, &d));
	while (k < s->frames) {
		uint32_t len = length_of(k);
		int sent;

		make_frame(frame, k);
		sent = pump_send(q, frame, &len, 1);
		CHECK(sent >= 0);
		k += (uint32_t)sent;
		if (!sent)
			CHECK(pump_ready(NULL, q, PATIENCE_MS) >= 0);
	}
	pthread_join(thread, NULL);
	net_queue_stats(q, &stats);
	CHECK(stats.frames == s->frames && stats.completed == s->frames && !stats.in_flight);
	printf("tx: %u frames, %llu kicks, %llu calls\n", k, (unsigned long long)stats.kicks,
	       (unsigned long long)d.calls);
	free_queue(q, &d);
}

static void receive(const struct scenario *s)
{
	struct device d;
	struct net_queue *q = make_queue(&d, s, true);
	uint8_t data[8 * MAX_FRAME];
	struct net_stats stats;
	uint32_t lengths[64];
	pthread_t thread;
	uint32_t k = 0;

	CHECK(!net_start(q));
	CHECK(!pthread_create(&thread, NULL, produce, &d));
	while (k < s->frames) {
		int n = pump_receive(q, data, sizeof(data), lengths, 64);
		uint8_t *at = data;

		CHECK(n >= 0);
		for (int i = 0; i < n; at += lengths[i++])
			check_frame(at, lengths[i], k++);
		if (!n)
			CHECK(pump_ready(q, NULL, PATIENCE_MS) >= 0);
	}
	pthread_join(thread, NULL);
	net_queue_stats(q, &stats);
	CHECK(stats.frames == s->frames && !stats.errors);
	printf("rx: %u frames, %llu kicks, %llu calls\n", k, (unsigned long long)stats.kicks,
	       (unsigned long long)d.calls);
	free_queue(q, &d);
}

int main(int argc, char **argv)
{
	const uint64_t modern = 1ull << VIRTIO_F_VERSION_1, merge = 1ull << VIRTIO_NET_F_MRG_RXBUF;
	const uint64_t event = 1ull << VIRTIO_RING_F_EVENT_IDX;
	const uint64_t indirect = 1ull << VIRTIO_RING_F_INDIRECT_DESC;
	const uint64_t features[] = {0, modern, modern | event, modern | merge | event,
				     modern | indirect, modern | indirect | event, merge | indirect};
	uint32_t frames = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 20000;

	alarm(120);
	for (size_t i = 0; i < sizeof(features) / sizeof(*features); i++)
		for (uint16_t size = 8; size <= 256; size *= 4) {
			const struct scenario s = {
				.features = features[i],
				.size = size,
				.base = (uint16_t)(65500 + i),
				.frames = frames,
			};

			transmit(&s);
			receive(&s);
			race_notifications(&s);
		}
	return 0;
}
