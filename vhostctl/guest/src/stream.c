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

/* Datagrams of one family are `step` numbers apart; `first` is the number of the earliest. */
struct family {
	uint64_t *passed;
	uint64_t first, step;
};

static struct family family_of(struct stream_check *c, const struct stream_datagram *d)
{
	bool both = c->rule.max4 && c->rule.max6;
	bool ipv6 = d->version == 6;

	return (struct family){
		.passed = &c->passed[ipv6],
		.first = both && ipv6,
		.step = both ? 2 : 1,
	};
}

static void advance(struct stream_check *c, const struct family *f, uint64_t lost)
{
	*f->passed += lost + 1;
	counter_add(&c->lost, lost);
	counter_add(&c->position, lost + 1);
	counter_add(&c->received, 1);
}

/*
 * Count an arrival: the datagram of its family that is due, one of the next, one of the last, or
 * changed. The families are flows of their own, and nothing keeps one in step with the other.
 */
void stream_check(struct stream_check *c, const struct stream_datagram *d)
{
	const struct family f = family_of(c, d);
	const uint64_t due = *f.passed;

	for (uint64_t ahead = 0; ahead <= STREAM_WINDOW; ahead++)
		if (matches(c, d, f.first + (due + ahead) * f.step)) {
			advance(c, &f, ahead);
			return;
		}
	for (uint64_t back = 1; back <= STREAM_WINDOW && back <= due; back++)
		if (matches(c, d, f.first + (due - back) * f.step)) {
			counter_add(&c->repeated, 1);
			return;
		}
	counter_add(&c->changed, 1);
	advance(c, &f, 0);
}
