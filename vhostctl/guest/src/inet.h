/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * As much of Ethernet, IPv4, IPv6, ICMP and UDP as an end station needs. Everything works on
 * private copies of frames: memory that the device can write is never parsed in place.
 */
#ifndef VHOSTCTL_GUEST_INET_H
#define VHOSTCTL_GUEST_INET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define INET_MAC 6u
#define INET_ETHERNET 14u
#define INET_IPV4 20u
#define INET_IPV6 40u
#define INET_UDP 8u

/* A whole, unfragmented IP packet inside its frame. */
struct inet_packet {
	uint8_t *frame;
	uint8_t *ip;
	uint8_t *payload;
	uint32_t len;		/* of the frame, without padding */
	uint32_t payload_len;
	uint8_t version;	/* 4 or 6 */
	uint8_t protocol;
};

/* Both ends of a UDP conversation, in network byte order. */
struct inet_flow {
	uint8_t source_mac[INET_MAC], target_mac[INET_MAC];
	uint8_t source4[4], target4[4];
	uint8_t source6[16], target6[16];
	uint8_t source_port[2], target_port[2];
};

static inline uint16_t inet_read16(const uint8_t *at)
{
	return (uint16_t)(at[0] << 8 | at[1]);
}

static inline void inet_write16(uint8_t *at, uint32_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

bool inet_parse(struct inet_packet *p, uint8_t *frame, uint32_t len);
const uint8_t *inet_target(const struct inet_packet *p);
uint16_t inet_checksum(const struct inet_packet *p);
bool inet_complete(uint8_t *frame, uint32_t len, uint32_t start, uint32_t offset);
void inet_store_checksum(const struct inet_packet *p, uint32_t offset);
void inet_turn(const struct inet_packet *p, const uint8_t *mac, const uint8_t *address);
uint32_t inet_udp(uint8_t *frame, const struct inet_flow *flow, uint8_t version,
		  const uint8_t *payload, uint32_t size);

#endif
