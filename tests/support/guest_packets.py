"""Ethernet, ARP, IPv4, IPv6, ICMP and UDP built and read by the books, apart from the C half."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

HOST_MAC = bytes.fromhex("02005e000001")
MAC = bytes.fromhex("02005e0000fe")
HOST4, IPV4 = "192.0.2.1", "192.0.2.2"
HOST6, IPV6 = "2001:db8::1", "2001:db8::beef:cafe"
ARP, IP4, IP6 = 0x0806, 0x0800, 0x86DD
ICMP, UDP, ICMP6 = 1, 17, 58


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def address(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def ethernet(kind: int, payload: bytes, *, to: bytes = MAC, source: bytes = HOST_MAC) -> bytes:
    return to + source + kind.to_bytes(2, "big") + payload


def arp(operation: int, sender: str, target: str, *, sender_mac: bytes = HOST_MAC) -> bytes:
    return (
        struct.pack(">HHBBH", 1, IP4, 6, 4, operation)
        + sender_mac
        + address(sender)
        + bytes(6)
        + address(target)
    )


def ipv4(
    protocol: int, payload: bytes, *, to: str = IPV4, options: bytes = b"", fragment: int = 0x4000
) -> bytes:
    header = struct.pack(
        ">BBHHHBBH4s4s",
        0x45 + len(options) // 4,
        0,
        20 + len(options) + len(payload),
        7,
        fragment,
        9,
        protocol,
        0,
        address(HOST4),
        address(to),
    )
    header += options
    return header[:10] + checksum(header).to_bytes(2, "big") + header[12:] + payload


def ipv6(
    protocol: int, payload: bytes, *, to: str = IPV6, source: str = HOST6, hops: int = 9
) -> bytes:
    return struct.pack(">IHBB", 6 << 28, len(payload), protocol, hops) + (
        address(source) + address(to) + payload
    )


def pseudo(source: str, to: str, protocol: int, length: int) -> bytes:
    if ":" in to:
        return address(source) + address(to) + struct.pack(">II", length, protocol)
    return address(source) + address(to) + struct.pack(">HH", protocol, length)


def summed(before: bytes, body: bytes, at: int) -> bytes:
    """Return `body` with the checksum of pseudo header and body at offset `at`."""
    value = checksum(before + body)
    return body[:at] + value.to_bytes(2, "big") + body[at + 2 :]


def echo_request(version: int, data: bytes) -> bytes:
    """An echo request frame."""
    body = struct.pack(">BBHHH", 8 if version == 4 else 128, 0, 0, 0x1234, 7) + data
    if version == 4:
        return ethernet(IP4, ipv4(ICMP, summed(b"", body, 2)))
    return ethernet(IP6, ipv6(ICMP6, summed(pseudo(HOST6, IPV6, ICMP6, len(body)), body, 2)))


def udp(version: int, data: bytes, *, source: int = 4000, to: int = 7, csum: bool = True) -> bytes:
    """A UDP frame; without `csum` the checksum is 0."""
    body = struct.pack(">HHHH", source, to, 8 + len(data), 0) + data
    ends = (HOST4, IPV4) if version == 4 else (HOST6, IPV6)
    if csum:
        body = summed(pseudo(*ends, UDP, len(body)), body, 6)
        if body[6:8] == b"\0\0":
            body = body[:6] + b"\xff\xff" + body[8:]
    return ethernet(IP4, ipv4(UDP, body)) if version == 4 else ethernet(IP6, ipv6(UDP, body))


def solicitation(*, source: str = HOST6, to: str, target: str = IPV6, hops: int = 255) -> bytes:
    """A neighbour solicitation frame, sent to the multicast address of `to` if it is one."""
    body = struct.pack(">BBHI", 135, 0, 0, 0) + address(target)
    if source != "::":
        body += bytes([1, 1]) + HOST_MAC
    packet = ipv6(
        ICMP6,
        summed(pseudo(source, to, ICMP6, len(body)), body, 2),
        to=to,
        source=source,
        hops=hops,
    )
    multicast = to.startswith("ff")
    return ethernet(IP6, packet, to=b"\x33\x33" + address(to)[-4:] if multicast else MAC)


@dataclass
class Packet:
    """A frame taken apart; both checksums were right."""

    to: bytes
    source: bytes
    version: int
    source_ip: str
    to_ip: str
    protocol: int
    hops: int
    body: bytes


def parse(frame: bytes) -> Packet:
    """Take a frame with an IP packet apart and check lengths and checksums."""
    kind = int.from_bytes(frame[12:14], "big")
    ip = frame[14:]
    if kind == IP4:
        assert ip[0] == 0x45
        assert int.from_bytes(ip[2:4], "big") == len(ip)
        assert checksum(ip[:20]) == 0
        protocol, hops, body = ip[9], ip[8], ip[20:]
        source, to = (str(ipaddress.ip_address(part)) for part in (ip[12:16], ip[16:20]))
    else:
        assert kind == IP6
        assert ip[0] >> 4 == 6
        assert int.from_bytes(ip[4:6], "big") == len(ip) - 40
        protocol, hops, body = ip[6], ip[7], ip[40:]
        source, to = (str(ipaddress.ip_address(part)) for part in (ip[8:24], ip[24:40]))
    before = b"" if protocol == ICMP else pseudo(source, to, protocol, len(body))
    assert checksum(before + body) == 0
    if protocol == UDP:
        assert int.from_bytes(body[4:6], "big") == len(body)
        assert body[6:8] != b"\0\0"
    version = 4 if kind == IP4 else 6
    return Packet(frame[:6], frame[6:12], version, source, to, protocol, hops, body)
