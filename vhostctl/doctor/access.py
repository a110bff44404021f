"""Who may open a file: mode, owner and access control list, as the kernel weighs them."""

from __future__ import annotations

import enum
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass

READ_WRITE = 6
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_VERSION = 2
_NAMED = {2: "user", 8: "group"}


class Tag(enum.IntEnum):
    """Whom an entry is for: linux/posix_acl.h."""

    USER_OBJ = 0x01
    USER = 0x02
    GROUP_OBJ = 0x04
    GROUP = 0x08
    MASK = 0x10
    OTHER = 0x20


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a list; `permissions` are 4 read, 2 write, 1 execute, `identity` -1 for none."""

    tag: Tag
    permissions: int
    identity: int = -1

    def __str__(self) -> str:
        letters = "".join(
            letter if self.permissions & bit else "-" for letter, bit in (("r", 4), ("w", 2))
        )
        whom = _NAMED.get(self.tag, self.tag.name.lower())
        return f"{whom}:{self.identity if self.identity >= 0 else ''}:{letters}"


@dataclass(frozen=True, slots=True)
class Node:
    """What stat(2) says of a file, and its access control list, empty if it has none.

    `number` is (major, minor) of a character device, None for anything else.
    """

    mode: int
    uid: int
    gid: int
    number: tuple[int, int] | None
    acl: tuple[Entry, ...] = ()


def parse_acl(value: bytes) -> tuple[Entry, ...]:
    """Return the entries of a system.posix_acl_access attribute (linux/posix_acl_xattr.h).

    A value of another version gives none.
    """
    if len(value) < _HEADER.size or _HEADER.unpack_from(value)[0] != _VERSION:
        return ()
    body = value[_HEADER.size :]
    whole = body[: len(body) // _ENTRY.size * _ENTRY.size]
    return tuple(
        Entry(Tag(tag), bits, who if tag in _NAMED else -1)
        for tag, bits, who in _ENTRY.iter_unpack(whole)
    )


def may_open(node: Node, uid: int, groups: Collection[int]) -> bool:
    """Return whether a process without capabilities may open `node` for reading and writing.

    The order is acl(5)'s: owner, named user, all groups, others; the first that fits decides.
    """
    entries = node.acl or _of_mode(node)
    mask = next((e.permissions for e in entries if e.tag is Tag.MASK), 7)
    if uid == node.uid:
        return _grants(e.permissions for e in entries if e.tag is Tag.USER_OBJ)
    named = [e for e in entries if e.tag is Tag.USER and e.identity == uid]
    if named:
        return _grants(e.permissions & mask for e in named)
    ours = [
        e
        for e in entries
        if (e.tag is Tag.GROUP_OBJ and node.gid in groups)
        or (e.tag is Tag.GROUP and e.identity in groups)
    ]
    if ours:
        return _grants(e.permissions & mask for e in ours)
    return _grants(e.permissions for e in entries if e.tag is Tag.OTHER)


def _grants(permissions: Iterable[int]) -> bool:
    return any(bits & READ_WRITE == READ_WRITE for bits in permissions)


def _of_mode(node: Node) -> tuple[Entry, ...]:
    return (
        Entry(Tag.USER_OBJ, node.mode >> 6 & 7),
        Entry(Tag.GROUP_OBJ, node.mode >> 3 & 7),
        Entry(Tag.OTHER, node.mode & 7),
    )
