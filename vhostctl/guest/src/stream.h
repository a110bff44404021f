/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Checked datagram streams: both ends know what datagram k looks like.
 *
 * With period = max4 + max6 and r = k mod period, datagram k is
 *	r < max4:  IPv4 with r + 1 bytes of payload
 *	else:      IPv6 with r - max4 + 1 bytes of payload
 * so that laps of all IPv4 sizes and of all IPv6 sizes take turns. Its payload is the slice of the
 * pattern that starts at (k * 7919 + stream) mod 65521.
 */
#ifndef VHOSTCTL_GUEST_STREAM_H
#define VHOSTCTL_GUEST_STREAM_H

#include <stdbool.h>
#include <stdint.h>

#define STREAM_STEP 7919u
#define STREAM_STARTS 65521u	/* a prime, so that every start is used */
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
	uint64_t position;	/* the datagram that comes next */
	uint64_t received;	/* as expected, or changed */
	uint64_t changed;
	uint64_t lost;
	uint64_t repeated;	/* seen before, or counted lost before */
};

struct stream_datagram stream_datagram(const struct stream_rule *rule, uint64_t k);
void stream_check(struct stream_check *c, const struct stream_datagram *d);

#endif
