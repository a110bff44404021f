// SPDX-License-Identifier: GPL-2.0-or-later
#include "stream.h"

#include "vring.h"

#include <string.h>

struct stream_datagram stream_datagram(const struct stream_rule *rule, uint64_t k)
{
	uint64_t start = (k % STREAM_STARTS * STREAM_STEP + rule->stream) % STREAM_STARTS;
	bool both = rule->max4 && rule->max6;
	bool ipv4 = both ? k % 2 == 0 : rule->max4 > 0;
	uint32_t max = ipv4 ? rule->max4 : rule->max6;
	uint64_t stride = max % STREAM_STRIDE ? STREAM_STRIDE : STREAM_OTHER_STRIDE;
	uint64_t n = both ? k / 2 : k;

	return (struct stream_datagram){
		.payload = rule->pattern + start,
		.size = 1 + (uint32_t)((n % max * stride + rule->stream) % max),
		.version = ipv4 ? 4 : 6,
	};
}

static bool matches(const struct stream_check *c, const struct stream_datagram *d, uint64_t k)
{
	struct stream_datagram expected = stream_datagram(&c->rule, k);

	return d->version == expected.version && d->size == expected.size &&
	       !memcmp(d->payload, expected.payload, d->size);
}

static void advance(struct stream_check *c, uint64_t lost)
{
	counter_add(&c->lost, lost);
	counter_add(&c->position, lost + 1);
	counter_add(&c->received, 1);
}

/* Count an arrival: the datagram that is due, one of the next, one of the last, or changed. */
void stream_check(struct stream_check *c, const struct stream_datagram *d)
{
	for (uint64_t ahead = 0; ahead <= STREAM_WINDOW; ahead++)
		if (matches(c, d, c->position + ahead)) {
			advance(c, ahead);
			return;
		}
	for (uint64_t back = 1; back <= STREAM_WINDOW && back <= c->position; back++)
		if (matches(c, d, c->position - back)) {
			counter_add(&c->repeated, 1);
			return;
		}
	counter_add(&c->changed, 1);
	advance(c, 0);
}
