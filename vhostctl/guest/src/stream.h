/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Checked datagram streams: both ends know what datagram k looks like.
 *
 * With both families, datagram k is IPv4 where k is even and IPv6 where it is odd, and it is the
 * one with n = k / 2 of its family; with one family only, n = k. With max being the greatest
 * payload of the family, its payload is
 *	1 + (n * stride + stream) mod max bytes long, and
 *	the slice of the pattern that starts at (k * 7919 + stream) mod 65521.
 * The stride is 787, or 797 where max is a multiple of 787. It is a prime that does not divide
 * max, so `max` datagrams of a family in a row have every size once, and the first few of them
 * have short and long ones. (A multiple of both primes would be no UDP payload any more.)
 */
#ifndef VHOSTCTL_GUEST_STREAM_H
#define VHOSTCTL_GUEST_STREAM_H

#include <stdbool.h>
#include <stdint.h>

#define STREAM_STEP 7919u
#define STREAM_STARTS 65521u	/* a prime, so that every start is used */
#define STREAM_STRIDE 787u
#define STREAM_OTHER_STRIDE 797u
#define STREAM_WINDOW 64u	/* how far a datagram may be off and still be known */

struct stream_rule {
	const uint8_t *pattern;	/* STREAM_STARTS - 1 + the greater of max4 and max6 bytes */
	uint32_t max4, max6;	/* greatest payload; 0: none of this family */
	uint32_t stream;
};

struct stream_datagram {
	const uint8_t *payload;
	uint32_t size;
	uint8_t version;	/* 4 or 6 */
};

struct stream_check {
	struct stream_rule rule;
	uint64_t passed[2];	/* datagrams of IPv4, IPv6 that are settled: received or lost */
	uint64_t position;	/* both together */
	uint64_t received;	/* as expected, or changed */
	uint64_t changed;
	uint64_t lost;
	uint64_t repeated;	/* seen before, or counted lost before */
};

struct stream_datagram stream_datagram(const struct stream_rule *rule, uint64_t k);
void stream_check(struct stream_check *c, const struct stream_datagram *d);

#endif
