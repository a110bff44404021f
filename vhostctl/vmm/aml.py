"""As much of ACPI's machine language as a small DSDT takes.

Every function returns encoded bytes. Sections are those of the ACPI specification 6.4.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_ZERO, _ONE, _BYTE, _WORD, _DWORD = b"\x00", b"\x01", b"\x0a", b"\x0b", b"\x0c"
_NAME, _SCOPE, _BUFFER, _PACKAGE, _DEVICE = b"\x08", b"\x10", b"\x11", b"\x12", b"\x5b\x82"

_MEMORY_RANGE, _IO_RANGE, _BUS_RANGE = 0, 1, 2


def integer(value: int) -> bytes:
    """Return an integer below 2^32 in its shortest form (20.2.3)."""
    if value < 2:
        return _ONE if value else _ZERO
    if value < 1 << 8:
        return _BYTE + struct.pack("<B", value)
    if value < 1 << 16:
        return _WORD + struct.pack("<H", value)
    return _DWORD + struct.pack("<I", value)


def eisa_id(name: str) -> bytes:
    """Return a compressed EISA identifier such as ``PNP0A03`` (19.6.37)."""
    letters = 0
    for letter in name[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return _DWORD + struct.pack(">I", letters << 16 | int(name[3:], 16))


def name(path: str, value: bytes) -> bytes:
    """Return Name (path, value); `path` is one segment of four characters, or ``\\`` and one."""
    return _NAME + path.encode() + value


def scope(path: str, *body: bytes) -> bytes:
    """Return Scope (path) { body }."""
    return _SCOPE + _with_length(path.encode() + b"".join(body))


def device(path: str, *body: bytes) -> bytes:
    """Return Device (path) { body }."""
    return _DEVICE + _with_length(path.encode() + b"".join(body))


def package(elements: Sequence[bytes]) -> bytes:
    """Return Package () { elements }, of which there are fewer than 256."""
    return _PACKAGE + _with_length(struct.pack("<B", len(elements)) + b"".join(elements))


def resources(*descriptors: bytes) -> bytes:
    """Return ResourceTemplate () { descriptors }, ended by an end tag (6.4.2.9)."""
    data = b"".join(descriptors) + b"\x79\x00"
    return _BUFFER + _with_length(integer(len(data)) + data)


def io_ports(ports: range) -> bytes:
    """Return the descriptor of I/O ports that a device itself takes (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, ports.start, ports.start, 1, len(ports))


def bus_window(buses: range) -> bytes:
    """Return the descriptor of the PCI buses behind a bridge (6.4.3.5.3)."""
    return _window("H", 0x88, _BUS_RANGE, 0, buses)


def io_window(ports: range) -> bytes:
    """Return the descriptor of the I/O ports that a bridge hands on."""
    return _window("H", 0x88, _IO_RANGE, 0x03, ports)  # the whole range


def memory_window(addresses: range) -> bytes:
    """Return the descriptor of addresses below 4 GiB that a bridge hands on (6.4.3.5.2)."""
    return _window("I", 0x87, _MEMORY_RANGE, 0x01, addresses)  # writable, not cacheable


def _window(word: str, tag: int, kind: int, type_flags: int, span: range) -> bytes:
    fixed_producer = 0x0C  # both ends are fixed
    values = struct.pack(f"<5{word}", 0, span.start, span.stop - 1, 0, len(span) & 0xFFFF_FFFF)
    body = struct.pack("<BBB", kind, fixed_producer, type_flags) + values
    return struct.pack("<BH", tag, len(body)) + body


def _with_length(body: bytes) -> bytes:
    """Return `body` behind its PkgLength, which counts itself too (20.2.4)."""
    if len(body) + 1 < 1 << 6:
        return bytes((len(body) + 1,)) + body
    for extra in (1, 2, 3):
        total = len(body) + 1 + extra
        if total < 1 << 4 + 8 * extra:
            lead = extra << 6 | total & 0xF
            return bytes((lead,)) + (total >> 4).to_bytes(extra, "little") + body
    raise OverflowError(f"{len(body)} bytes of AML in one package")
