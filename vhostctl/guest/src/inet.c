// SPDX-License-Identifier: GPL-2.0-or-later
#include "inet.h"

#include <net/ethernet.h>
#include <netinet/in.h>
#include <string.h>

#define HOP_LIMIT 64u
#define MORE_FRAGMENTS_OR_OFFSET 0x3fffu

/* UDP says "none" with 0; for the others both zeros mean the same. */
#define NEGATIVE_ZERO 0xffffu

/* One's complement sum of native 16-bit words (RFC 1071): correct in any byte order. */
static uint64_t sum(const uint8_t *data, size_t len, uint64_t total)
{
	uint32_t word;
	uint16_t half;

	for (; len >= sizeof(word); len -= sizeof(word), data += sizeof(word)) {
		memcpy(&word, data, sizeof(word));
		total += word;
	}
	if (len & 2) {
		memcpy(&half, data, sizeof(half));
		total += half;
		data += sizeof(half);
	}
	if (len & 1) {
		half = 0;
		memcpy(&half, data, 1);
		total += half;
	}
	return total;
}

static uint16_t fold(uint64_t total)
{
	while (total >> 16)
		total = (total & 0xffff) + (total >> 16);
	return (uint16_t)~total;
}

static void store(uint8_t *at, uint16_t checksum)
{
	memcpy(at, &checksum, sizeof(checksum));
}

static bool parse4(struct inet_packet *p, uint32_t room)
{
	uint32_t header, total;

	if (room < INET_IPV4 || p->ip[0] >> 4 != 4)
		return false;
	header = (p->ip[0] & 15u) * 4;
	total = inet_read16(p->ip + 2);
	if (header < INET_IPV4 || total < header || total > room || fold(sum(p->ip, header, 0)) ||
	    inet_read16(p->ip + 6) & MORE_FRAGMENTS_OR_OFFSET)
		return false;
	p->version = 4;
	p->protocol = p->ip[9];
	p->payload = p->ip + header;
	p->payload_len = total - header;
	return true;
}

static bool parse6(struct inet_packet *p, uint32_t room)
{
	if (room < INET_IPV6 || p->ip[0] >> 4 != 6)
		return false;
	p->version = 6;
	p->protocol = p->ip[6];
	p->payload = p->ip + INET_IPV6;
	p->payload_len = inet_read16(p->ip + 4);
	return p->payload_len <= room - INET_IPV6;
}

/* False: not an IP packet, damaged, or a fragment. Extension headers are not looked through. */
bool inet_parse(struct inet_packet *p, uint8_t *frame, uint32_t len)
{
	uint16_t type = inet_read16(frame + 2 * INET_MAC);
	bool ok;

	*p = (struct inet_packet){.frame = frame, .ip = frame + INET_ETHERNET};
	if (type == ETHERTYPE_IP)
		ok = parse4(p, len - INET_ETHERNET);
	else
		ok = type == ETHERTYPE_IPV6 && parse6(p, len - INET_ETHERNET);
	if (ok)
		p->len = (uint32_t)(p->payload - frame) + p->payload_len;
	return ok;
}

static uint8_t *source(const struct inet_packet *p)
{
	return p->ip + (p->version == 4 ? 12 : 8);
}

static size_t address_size(const struct inet_packet *p)
{
	return p->version == 4 ? 4 : 16;
}

const uint8_t *inet_target(const struct inet_packet *p)
{
	return source(p) + address_size(p);
}

/* Of the payload as it is: 0 if the checksum in it is right. */
uint16_t inet_checksum(const struct inet_packet *p)
{
	uint64_t total = 0;

	if (p->protocol != IPPROTO_ICMP)
		total = sum(source(p), 2 * address_size(p), 0) + htons(p->protocol) +
			htons((uint16_t)p->payload_len);
	return fold(sum(p->payload, p->payload_len, total));
}

/*
 * Sum up from `start` on what the sender left to the device, its sum of the pseudo header
 * included, and put the result `offset` bytes further on. False: it would lie beyond the frame.
 */
bool inet_complete(uint8_t *frame, uint32_t len, uint32_t start, uint32_t offset)
{
	uint16_t checksum;

	if (start + offset + sizeof(checksum) > len)
		return false;
	checksum = fold(sum(frame + start, len - start, 0));
	store(frame + start + offset, checksum ? checksum : NEGATIVE_ZERO);
	return true;
}

/* Put the right checksum at `offset` of the payload. */
void inet_store_checksum(const struct inet_packet *p, uint32_t offset)
{
	uint16_t checksum;

	store(p->payload + offset, 0);
	checksum = inet_checksum(p);
	store(p->payload + offset, checksum ? checksum : NEGATIVE_ZERO);
}

/* Write the parts of the IP header that follow from the payload's length. */
static void finish_ip(const struct inet_packet *p)
{
	if (p->version == 6) {
		inet_write16(p->ip + 4, p->payload_len);
		p->ip[7] = HOP_LIMIT;
		return;
	}
	inet_write16(p->ip + 2, p->len - INET_ETHERNET);
	p->ip[8] = HOP_LIMIT;
	store(p->ip + 10, 0);
	store(p->ip + 10, fold(sum(p->ip, (size_t)(p->payload - p->ip), 0)));
}

/* Send the packet back to where it came from, as from `mac` and `address`. */
void inet_turn(const struct inet_packet *p, const uint8_t *mac, const uint8_t *address)
{
	size_t size = address_size(p);

	memcpy(p->frame, p->frame + INET_MAC, INET_MAC);
	memcpy(p->frame + INET_MAC, mac, INET_MAC);
	memcpy(source(p) + size, source(p), size);
	memcpy(source(p), address, size);
	finish_ip(p);
}

/* Build a frame with one UDP datagram; returns its length. */
uint32_t inet_udp(uint8_t *frame, const struct inet_flow *flow, uint8_t version,
		  const uint8_t *payload, uint32_t size)
{
	uint32_t header = version == 4 ? INET_IPV4 : INET_IPV6;
	const struct inet_packet p = {
		.frame = frame,
		.ip = frame + INET_ETHERNET,
		.payload = frame + INET_ETHERNET + header,
		.len = INET_ETHERNET + header + INET_UDP + size,
		.payload_len = INET_UDP + size,
		.version = version,
		.protocol = IPPROTO_UDP,
	};

	memcpy(frame, flow->target_mac, INET_MAC);
	memcpy(frame + INET_MAC, flow->source_mac, INET_MAC);
	inet_write16(frame + 2 * INET_MAC, version == 4 ? ETHERTYPE_IP : ETHERTYPE_IPV6);
	memset(p.ip, 0, header);
	p.ip[0] = version == 4 ? 0x45 : 0x60;
	p.ip[version == 4 ? 9 : 6] = IPPROTO_UDP;
	memcpy(source(&p), version == 4 ? flow->source4 : flow->source6, address_size(&p));
	memcpy(source(&p) + address_size(&p), version == 4 ? flow->target4 : flow->target6,
	       address_size(&p));
	finish_ip(&p);
	memcpy(p.payload, flow->source_port, 2);
	memcpy(p.payload + 2, flow->target_port, 2);
	inet_write16(p.payload + 4, p.payload_len);
	memcpy(p.payload + INET_UDP, payload, size);
	inet_store_checksum(&p, 6);
	return p.len;
}
