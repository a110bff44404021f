// SPDX-License-Identifier: GPL-2.0-or-later
#include "endpoint.h"

#include "pump.h"

#include <errno.h>
#include <linux/virtio_net.h>
#include <net/ethernet.h>
#include <netinet/icmp6.h>
#include <netinet/in.h>
#include <netinet/ip_icmp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BATCH 64u
#define ARP_SIZE 28u
#define ECHO_SIZE 8u
#define SOLICIT_SIZE 24u
#define ADVERT_SIZE 32u		/* with the one option that we send */
#define HOPS_OF_A_NEIGHBOUR 255u
#define ADVERT_FLAGS_AT 4u
#define ADVERT_SOLICITED 0x40u
#define ADVERT_OVERRIDE 0x20u

struct endpoint {
	struct endpoint_config config;
	struct pump pump;
	struct stream_check check;
	uint8_t check_port[2];
	struct stream_rule generate;
	struct inet_flow flow;
	uint64_t goal;
	uint64_t mark;
	struct endpoint_counters count;
	uint8_t frame[];	/* the one at hand, and room for the longest answer */
};

struct endpoint *endpoint_create(const struct endpoint_config *c)
{
	const uint32_t advert = INET_ETHERNET + INET_IPV6 + ADVERT_SIZE;
	struct endpoint *ep = calloc(1, sizeof(*ep) + c->rx->shape.limit + advert);

	if (!ep)
		return NULL;
	ep->config = *c;
	ep->pump = (struct pump){
		.rx = c->rx, .tx = c->tx, .stop = c->stop, .wake = c->wake, .fd = -1};
	return ep;
}

void endpoint_destroy(struct endpoint *ep)
{
	free(ep);
}

/* Check datagrams to `port` from now on, from the stream's first. */
void endpoint_expect(struct endpoint *ep, const struct stream_rule *rule, uint16_t port)
{
	ep->check = (struct stream_check){.rule = *rule};
	inet_write16(ep->check_port, port);
}

/* Send another stream from now on, from its first datagram up to the goal, which is 0 again. */
void endpoint_generate(struct endpoint *ep, const struct stream_rule *rule,
		       const struct inet_flow *flow)
{
	ep->generate = *rule;
	ep->flow = *flow;
	ep->count.sent = 0;
	endpoint_set_goal(ep, 0);
}

void endpoint_set_goal(struct endpoint *ep, uint64_t goal)
{
	__atomic_store_n(&ep->goal, goal, __ATOMIC_RELEASE);
}

/* Signal `done` once so many datagrams are received; 0: never. */
void endpoint_set_mark(struct endpoint *ep, uint64_t mark)
{
	__atomic_store_n(&ep->mark, mark, __ATOMIC_SEQ_CST);
	/* Pairs with check_mark(): it sees the mark, or the caller the count that reached it. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

void endpoint_read_counters(const struct endpoint *ep, struct endpoint_counters *out)
{
	const struct endpoint_counters *c = &ep->count;

	*out = (struct endpoint_counters){
		.arp = counter_read(&c->arp),
		.neighbour = counter_read(&c->neighbour),
		.ping = counter_read(&c->ping),
		.echo = counter_read(&c->echo),
		.sent = counter_read(&c->sent),
		.received = counter_read(&ep->check.received),
		.changed = counter_read(&ep->check.changed),
		.lost = counter_read(&ep->check.lost),
		.repeated = counter_read(&ep->check.repeated),
		.position = counter_read(&ep->check.position),
		.bad_checksum = counter_read(&c->bad_checksum),
		.ignored = counter_read(&c->ignored),
	};
}

/* Queue the first `len` bytes of the frame at hand and count it; the caller saw to the room. */
static void answer(struct endpoint *ep, uint32_t len, uint64_t *counter)
{
	bool sent = len <= ep->config.tx->shape.limit && net_put(ep->config.tx, ep->frame, len);

	counter_add(sent ? counter : &ep->count.ignored, 1);
}

static bool take_arp(struct endpoint *ep, uint32_t len)
{
	/* Ethernet, IPv4, 6- and 4-byte addresses, request */
	static const uint8_t request[8] = {0, 1, 8, 0, 6, 4, 0, 1};
	const uint8_t *mac = ep->config.mac;
	uint8_t *frame = ep->frame;
	uint8_t *arp = frame + INET_ETHERNET;
	uint8_t *sender = arp + sizeof(request);
	uint8_t *target = sender + INET_MAC + 4;

	if (len < INET_ETHERNET + ARP_SIZE || !ep->config.has_ipv4 ||
	    memcmp(arp, request, sizeof(request)) || memcmp(target + INET_MAC, ep->config.ipv4, 4))
		return false;
	arp[7] = 2;
	memcpy(target, sender, INET_MAC + 4);
	memcpy(sender, mac, INET_MAC);
	memcpy(sender + INET_MAC, ep->config.ipv4, 4);
	memcpy(frame, target, INET_MAC);
	memcpy(frame + INET_MAC, mac, INET_MAC);
	answer(ep, INET_ETHERNET + ARP_SIZE, &ep->count.arp);
	return true;
}

/* RFC 4861, 7.1.1 and 7.2.4. */
static bool take_solicitation(struct endpoint *ep, struct inet_packet *p)
{
	static const uint8_t nobody[16];
	static const uint8_t all_nodes[16] = {0xff, 2, [15] = 1};
	static const uint8_t all_nodes_mac[INET_MAC] = {0x33, 0x33, [5] = 1};
	uint8_t *target = p->payload + ECHO_SIZE;
	uint8_t *option = target + sizeof(ep->config.ipv6);
	bool probe = !memcmp(p->ip + 8, nobody, sizeof(nobody));

	if (p->payload_len < SOLICIT_SIZE || p->ip[7] != HOPS_OF_A_NEIGHBOUR || p->payload[1] ||
	    memcmp(target, ep->config.ipv6, sizeof(ep->config.ipv6)))
		return false;
	p->payload_len = ADVERT_SIZE;
	p->len = INET_ETHERNET + INET_IPV6 + ADVERT_SIZE;
	inet_turn(p, ep->config.mac, ep->config.ipv6);
	p->ip[7] = HOPS_OF_A_NEIGHBOUR;
	if (probe) {
		memcpy(p->ip + 24, all_nodes, sizeof(all_nodes));
		memcpy(p->frame, all_nodes_mac, sizeof(all_nodes_mac));
	}
	p->payload[0] = ND_NEIGHBOR_ADVERT;
	memset(p->payload + ADVERT_FLAGS_AT, 0, 4);
	p->payload[ADVERT_FLAGS_AT] = ADVERT_OVERRIDE | (probe ? 0 : ADVERT_SOLICITED);
	option[0] = ND_OPT_TARGET_LINKADDR;
	option[1] = 1;
	memcpy(option + 2, ep->config.mac, INET_MAC);
	inet_store_checksum(p, 2);
	answer(ep, p->len, &ep->count.neighbour);
	return true;
}

static const uint8_t *own_address(const struct endpoint *ep, const struct inet_packet *p)
{
	return p->version == 4 ? ep->config.ipv4 : ep->config.ipv6;
}

static bool is_ours(const struct endpoint *ep, const struct inet_packet *p)
{
	if (p->version == 4)
		return ep->config.has_ipv4 && !memcmp(inet_target(p), ep->config.ipv4, 4);
	return ep->config.has_ipv6 && !memcmp(inet_target(p), ep->config.ipv6, 16);
}

static bool take_icmp(struct endpoint *ep, struct inet_packet *p)
{
	uint8_t request = p->version == 4 ? ICMP_ECHO : ICMP6_ECHO_REQUEST;
	uint8_t reply = p->version == 4 ? ICMP_ECHOREPLY : ICMP6_ECHO_REPLY;

	if (inet_checksum(p)) {
		counter_add(&ep->count.bad_checksum, 1);
		return true;
	}
	if (p->version == 6 && ep->config.has_ipv6 && p->payload_len &&
	    p->payload[0] == ND_NEIGHBOR_SOLICIT)
		return take_solicitation(ep, p);
	if (!is_ours(ep, p) || p->payload_len < ECHO_SIZE || p->payload[0] != request ||
	    p->payload[1])
		return false;
	p->payload[0] = reply;
	inet_turn(p, ep->config.mac, own_address(ep, p));
	inet_store_checksum(p, 2);
	answer(ep, p->len, &ep->count.ping);
	return true;
}

/* Whether the checksum is right, or known or bound to be so by the device's word. */
static bool udp_is_whole(const struct inet_packet *p, uint8_t flags)
{
	static const uint8_t none[2];

	if (flags & (VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID))
		return true;
	if (!memcmp(p->payload + 6, none, sizeof(none)))
		return p->version == 4;
	return !inet_checksum(p);
}

static bool take_udp(struct endpoint *ep, struct inet_packet *p, uint8_t flags)
{
	uint8_t port[2];

	if (!is_ours(ep, p) || p->payload_len < INET_UDP ||
	    inet_read16(p->payload + 4) != p->payload_len)
		return false;
	if (!udp_is_whole(p, flags)) {
		counter_add(&ep->count.bad_checksum, 1);
		return true;
	}
	if (ep->check.rule.pattern && !memcmp(p->payload + 2, ep->check_port, sizeof(port))) {
		const struct stream_datagram d = {
			.payload = p->payload + INET_UDP,
			.size = p->payload_len - INET_UDP,
			.version = p->version,
		};

		stream_check(&ep->check, &d);
		return true;
	}
	if (!ep->config.echo)
		return false;
	inet_turn(p, ep->config.mac, own_address(ep, p));
	memcpy(port, p->payload, sizeof(port));
	memcpy(p->payload, p->payload + 2, sizeof(port));
	memcpy(p->payload + 2, port, sizeof(port));
	inet_store_checksum(p, 6);
	answer(ep, p->len, &ep->count.echo);
	return true;
}

static bool take_ip(struct endpoint *ep, uint32_t len, uint8_t flags)
{
	struct inet_packet p;

	if (!inet_parse(&p, ep->frame, len))
		return false;
	if (p.protocol == IPPROTO_UDP)
		return take_udp(ep, &p, flags);
	if (p.protocol == (p.version == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6))
		return take_icmp(ep, &p);
	return false;
}

static void take(struct endpoint *ep, const struct net_frame *f)
{
	uint32_t len = net_copy(f, ep->frame);
	bool known = false;

	if (len >= INET_ETHERNET &&
	    (ep->frame[0] & 1 || !memcmp(ep->frame, ep->config.mac, INET_MAC)))
		known = inet_read16(ep->frame + 2 * INET_MAC) == ETHERTYPE_ARP ?
				take_arp(ep, len) :
				take_ip(ep, len, f->header.flags);
	if (!known)
		counter_add(&ep->count.ignored, 1);
}

/* Whether any answer fits into the transmit ring: 1 or 0, or -EPROTO. */
static int has_room(struct net_queue *tx)
{
	int err;

	if (net_room(tx))
		return 1;
	err = net_reclaim(tx);
	return err ? err : net_room(tx) > 0;
}

/* Take a batch of frames while there is room to answer: how many, or -errno. */
static int receive(struct endpoint *ep)
{
	struct net_frame f;
	int n = 0;
	int err = 0;

	while (n < (int)BATCH && (err = has_room(ep->config.tx)) > 0 &&
	       (err = net_next(ep->config.rx, &f)) > 0) {
		take(ep, &f);
		n++;
	}
	if (err >= 0)
		err = net_refill(ep->config.rx);
	return err < 0 ? err : n;
}

static int check_mark(struct endpoint *ep)
{
	const uint64_t one = 1;
	uint64_t mark;

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	mark = __atomic_load_n(&ep->mark, __ATOMIC_SEQ_CST);
	if (!mark || ep->check.received < mark)
		return 0;
	/* A newer mark is left alone; its setter sees the count. */
	__atomic_compare_exchange_n(&ep->mark, &mark, 0, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
	return write(ep->config.done, &one, sizeof(one)) < 0 && errno != EAGAIN ? -errno : 0;
}

static bool is_behind(const struct endpoint *ep)
{
	return ep->count.sent < __atomic_load_n(&ep->goal, __ATOMIC_ACQUIRE);
}

/* Send up to a batch of the generated stream; returns 0 or -errno. */
static int generate(struct endpoint *ep)
{
	int err = 0;

	for (uint32_t n = 0; n < BATCH && is_behind(ep); n++) {
		struct stream_datagram d = stream_datagram(&ep->generate, ep->count.sent);
		uint32_t len;

		err = has_room(ep->config.tx);
		if (err <= 0)
			break;
		len = inet_udp(ep->frame, &ep->flow, d.version, d.payload, d.size);
		answer(ep, len, &ep->count.sent);
	}
	return err < 0 ? err : ring_publish(&ep->config.tx->ring);
}

/* Until stopped. */
int endpoint_run(struct endpoint *ep)
{
	struct pump *p = &ep->pump;

	p->stopped = false;
	do {
		int taken = receive(ep);
		int err = taken < 0 ? taken : check_mark(ep);
		bool room;

		if (!err)
			err = generate(ep);
		if (!err)
			err = has_room(p->tx);
		if (err < 0)
			return err;
		room = err > 0;
		err = pump_wait(p, room ? PUMP_RX : PUMP_TX,
				taken == (int)BATCH || (room && is_behind(ep)) ? 0 : PUMP_SLICE_US);
		if (err)
			return err;
	} while (!p->stopped);
	return 0;
}
