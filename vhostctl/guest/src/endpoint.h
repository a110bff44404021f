/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * An end station on one queue pair: answers ARP, neighbour solicitation and echo requests, echoes
 * UDP, and sends and checks datagram streams.
 */
#ifndef VHOSTCTL_GUEST_ENDPOINT_H
#define VHOSTCTL_GUEST_ENDPOINT_H

#include "inet.h"
#include "net.h"
#include "stream.h"

struct endpoint_config {
	struct net_queue *rx, *tx;
	int stop, wake, done;	/* eventfds: end the loop, look at the goal, the mark was reached */
	uint8_t mac[INET_MAC];
	uint8_t ipv4[4], ipv6[16];
	bool has_ipv4, has_ipv6;
	bool echo;		/* send UDP that is no stream's back */
};

struct endpoint_counters {
	uint64_t arp, neighbour, ping, echo;	/* answers sent */
	uint64_t sent;				/* datagrams of the generated stream */
	uint64_t received, changed, lost, repeated, position;	/* of the checked stream */
	uint64_t bad_checksum, ignored;
};

struct endpoint;

struct endpoint *endpoint_create(const struct endpoint_config *c);
void endpoint_destroy(struct endpoint *ep);
int endpoint_run(struct endpoint *ep);

/* While the loop does not run. */
void endpoint_expect(struct endpoint *ep, const struct stream_rule *rule, uint16_t port);
void endpoint_generate(struct endpoint *ep, const struct stream_rule *rule,
		       const struct inet_flow *flow);

/* From any thread at any time. */
void endpoint_set_goal(struct endpoint *ep, uint64_t goal);
void endpoint_set_mark(struct endpoint *ep, uint64_t mark);
void endpoint_read_counters(const struct endpoint *ep, struct endpoint_counters *out);

#endif
