// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "patch.h"

#include "inet.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>

/* Frames of one direction before the other has its turn. */
#define BATCH 64u

/* Linux 6.2 and newer */
#ifndef VIRTIO_NET_F_HOST_USO
#define VIRTIO_NET_F_HOST_USO 56
#endif
#ifndef VIRTIO_NET_HDR_GSO_UDP_L4
#define VIRTIO_NET_HDR_GSO_UDP_L4 5
#endif

/* From the receive queue of one side to the transmit queue of the other. */
struct lane {
	struct net_queue *rx, *tx;
	uint32_t types;			/* bit n: packets of GSO type n may leave */
	bool ecn, csum;			/* so may their ECN variants, and partial checksums */
	uint8_t *scratch;		/* room for a frame that has to be changed */
	struct patch_stats stats;
};

struct patch {
	struct lane lanes[PATCH_LANES];
	int stop;
	unsigned int busy;		/* rounds without a look at the files */
	bool stopped;
};

static uint32_t type_bit(unsigned int type)
{
	return UINT32_C(1) << type;
}

/* The GSO types whose feature bits, as they follow here, are among `features`. */
static uint32_t types_of(uint64_t features)
{
	static const struct {
		unsigned int feature, type;
	} map[] = {
		{VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_HDR_GSO_TCPV4},
		{VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_HDR_GSO_UDP},
		{VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_HDR_GSO_TCPV6},
		{VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_GSO_UDP_L4},
	};
	uint32_t types = 0;

	for (size_t i = 0; i < sizeof(map) / sizeof(*map); i++)
		if (features >> map[i].feature & 1)
			types |= type_bit(map[i].type);
	return types;
}

static bool lane_init(struct lane *l, struct net_queue *rx, struct net_queue *tx)
{
	*l = (struct lane){
		.rx = rx,
		.tx = tx,
		.csum = tx->features >> VIRTIO_NET_F_CSUM & 1,
		.ecn = tx->features >> VIRTIO_NET_F_HOST_ECN & 1,
	};
	if (l->csum)
		l->types = types_of(tx->features);
	else
		l->scratch = malloc(rx->shape.limit);
	return l->csum || l->scratch;
}

struct patch *patch_create(struct net_queue *rx0, struct net_queue *tx0, struct net_queue *rx1,
			   struct net_queue *tx1, int stop)
{
	struct patch *p = calloc(1, sizeof(*p));

	if (!p)
		return NULL;
	p->stop = stop;
	if (!lane_init(&p->lanes[0], rx0, tx1) || !lane_init(&p->lanes[1], rx1, tx0)) {
		patch_destroy(p);
		return NULL;
	}
	return p;
}

void patch_destroy(struct patch *p)
{
	for (int i = 0; i < PATCH_LANES; i++)
		free(p->lanes[i].scratch);
	free(p);
}

/* Counters of the direction that begins at side `from`, 0 or 1. */
void patch_read_stats(const struct patch *p, unsigned int from, struct patch_stats *s)
{
	const struct patch_stats *now = &p->lanes[from].stats;

	*s = (struct patch_stats){
		.frames = counter_read(&now->frames),
		.bytes = counter_read(&now->bytes),
		.gso = counter_read(&now->gso),
		.completed = counter_read(&now->completed),
		.greatest = counter_read(&now->greatest),
		.malformed = counter_read(&now->malformed),
		.refused = counter_read(&now->refused),
	};
}

static bool is_partial(const struct virtio_net_hdr *h)
{
	return h->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM;
}

static unsigned int gso_type(const struct virtio_net_hdr *h)
{
	return h->gso_type & ~VIRTIO_NET_HDR_GSO_ECN;
}

/* Whether a header can be true for `len` bytes (virtio 1.2, 5.1.6.2 and 5.1.6.4). */
static bool is_sound(const struct virtio_net_hdr *h, uint32_t len)
{
	const uint32_t known = type_bit(VIRTIO_NET_HDR_GSO_TCPV4) |
			       type_bit(VIRTIO_NET_HDR_GSO_UDP) |
			       type_bit(VIRTIO_NET_HDR_GSO_TCPV6) |
			       type_bit(VIRTIO_NET_HDR_GSO_UDP_L4);

	if (is_partial(h) && h->csum_start + h->csum_offset + sizeof(uint16_t) > len)
		return false;
	if (h->gso_type == VIRTIO_NET_HDR_GSO_NONE)
		return true;
	return gso_type(h) < 32 && known & type_bit(gso_type(h)) && is_partial(h) && h->gso_size &&
	       h->hdr_len <= len;
}

static bool is_taken(const struct lane *l, const struct virtio_net_hdr *h)
{
	if (h->gso_type == VIRTIO_NET_HDR_GSO_NONE)
		return true;
	return l->types & type_bit(gso_type(h)) &&
	       (l->ecn || !(h->gso_type & VIRTIO_NET_HDR_GSO_ECN));
}

/* What a driver may say of what a device said; fields that mean nothing are zero. */
static struct virtio_net_hdr outgoing(const struct virtio_net_hdr *h)
{
	struct virtio_net_hdr out = {0};

	if (!is_partial(h))
		return out;
	out.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
	out.csum_start = h->csum_start;
	out.csum_offset = h->csum_offset;
	if (h->gso_type != VIRTIO_NET_HDR_GSO_NONE) {
		out.gso_type = h->gso_type;
		out.hdr_len = h->hdr_len;
		out.gso_size = h->gso_size;
	}
	return out;
}

/* Queue a frame whose header is good; there is room for it. */
static void carry(struct lane *l, const struct net_frame *f)
{
	const struct virtio_net_hdr h = outgoing(&f->header);
	struct patch_stats *s = &l->stats;

	if (is_partial(&h) && !l->csum) {
		net_copy(f, l->scratch);
		inet_complete(l->scratch, f->len, h.csum_start, h.csum_offset);
		net_put(l->tx, l->scratch, f->len);
		counter_add(&s->completed, 1);
	} else {
		net_put_received(l->tx, f, &h);
	}
	counter_add(&s->frames, 1);
	counter_add(&s->bytes, f->len);
	if (h.gso_type != VIRTIO_NET_HDR_GSO_NONE)
		counter_add(&s->gso, 1);
	if (f->len > s->greatest)
		counter_add(&s->greatest, f->len - s->greatest);
}

static void take(struct lane *l, const struct net_frame *f)
{
	if (!is_sound(&f->header, f->len))
		counter_add(&l->stats.malformed, 1);
	else if (!is_taken(l, &f->header))
		counter_add(&l->stats.refused, 1);
	else
		carry(l, f);
}

/* Move up to a batch, as far as there is room for frames of any length. Returns 0 or -errno. */
static int move(struct lane *l)
{
	struct net_frame f;
	int shown, err = net_reclaim(l->tx);

	if (err)
		return err;
	for (uint32_t n = 0; n < BATCH && net_room(l->tx); n++) {
		err = net_next(l->rx, &f);
		if (err <= 0)
			break;
		take(l, &f);
	}
	/* What came before a fault is still good. */
	shown = ring_publish(&l->tx->ring);
	if (err < 0 || shown)
		return err < 0 ? err : shown;
	return net_refill(l->rx);
}

/* Sleep until one direction can go on, or look at `stop` only; as pump_wait(). */
static int look(struct patch *p, struct pollfd *files, int64_t timeout_us)
{
	const struct timespec timeout = {
		.tv_sec = timeout_us / 1000000,
		.tv_nsec = timeout_us % 1000000 * 1000,
	};
	int n;

	files[PATCH_LANES] = (struct pollfd){.fd = p->stop, .events = POLLIN};
	n = ppoll(files, PATCH_LANES + 1, &timeout, NULL);
	if (n < 0)
		return -errno;
	if (!n)
		return timeout_us ? -EINTR : 0;
	for (int i = 0; i <= PATCH_LANES; i++)
		if (files[i].revents & ~POLLIN)
			return -EBADF;
	p->stopped |= files[PATCH_LANES].revents != 0;
	return 0;
}

static int wait(struct patch *p)
{
	struct driver_ring *rings[PATCH_LANES];
	struct pollfd files[PATCH_LANES + 1];
	int64_t timeout_us = PUMP_SLICE_US;
	int err = 0;

	for (int i = 0; i < PATCH_LANES; i++) {
		struct lane *l = &p->lanes[i];
		bool blocked = !net_room(l->tx);

		rings[i] = blocked ? &l->tx->ring : &l->rx->ring;
		files[i] = (struct pollfd){.fd = rings[i]->call, .events = POLLIN};
		if (ring_arm(rings[i], blocked ? net_batch(l->tx) : 1))
			timeout_us = 0;
	}
	if (timeout_us || ++p->busy % PUMP_LOOK_EVERY == 0)
		err = look(p, files, timeout_us);
	else
		files[0].revents = files[1].revents = 0;
	for (int i = 0; i < PATCH_LANES; i++) {
		if (!err && files[i].revents)
			ring_ack_call(rings[i]);
		ring_disarm(rings[i]);
	}
	return err;
}

/* Move frames both ways until stopped. */
int patch_run(struct patch *p)
{
	int err;

	p->stopped = false;
	do {
		err = move(&p->lanes[0]);
		if (!err)
			err = move(&p->lanes[1]);
		if (!err)
			err = wait(p);
	} while (!err && !p->stopped);
	return err;
}
