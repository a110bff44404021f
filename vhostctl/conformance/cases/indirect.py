"""Indirect descriptor tables (virtio 1.2, 2.7.5.3), and how much of their rules is enforced."""

from __future__ import annotations

import struct

from vhostctl.conformance.case import case
from vhostctl.conformance.rig import EVENT_IDX, INDIRECT_DESC, V1, Rig, Setup
from vhostctl.conformance.ring import INDIRECT, NEXT, WRITE, Part
from vhostctl.conformance.target import Target

_ACKED = Setup(features=V1 | INDIRECT_DESC)


def _one(target: Target, rig: Rig, *parts: Part, sent: str = "1x60") -> None:
    heads = rig.tx.offer(parts)
    target.check("used", rig.tx.wait(1), [(heads[0], 0)])
    target.check("frames", rig.sent(1), [sent])
    target.check("errors", rig.tx.errors(), 0)


@case("A table of one descriptor is one frame.")
def of_one(target: Target) -> None:
    rig = Rig(target, _ACKED)
    _one(target, rig, rig.indirect(rig.outgoing(1)))


@case("A table of several descriptors is one frame.")
def of_several(target: Target) -> None:
    rig = Rig(target, _ACKED)
    _one(target, rig, rig.indirect(rig.cut(rig.packet(1), 1, 11, 30)))


@case("A table is taken whether INDIRECT_DESC was acknowledged or not.")
def not_acknowledged(target: Target) -> None:
    rig = Rig(target)
    _one(target, rig, rig.indirect(rig.cut(rig.packet(1), 12)))


@case("A table may have more descriptors than the ring.")
def longer_than_the_ring(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | INDIRECT_DESC, nums=(64, 4)))
    _one(target, rig, rig.indirect(rig.cut(rig.packet(1, 300), *[10] * 29)), sent="1x300")


@case("A chain of 1024 segments is one frame.")
def of_1024(target: Target) -> None:
    rig = Rig(target, _ACKED)
    (data,) = rig.outgoing(1, 1012)
    _one(target, rig, rig.indirect([Part(data.addr + n, 1) for n in range(1024)]), sent="1x1012")


@case("Descriptors of length 0 in a table do not count among the 1024 segments.")
def empty_ones(target: Target) -> None:
    rig = Rig(target, _ACKED)
    empty = Part(rig.alloc(16), 0)
    _one(target, rig, rig.indirect([*[empty] * 1500, *rig.outgoing(1), *[empty] * 1500]))


@case("The next fields of a table are not used: its descriptors are taken one after the other.")
def scrambled_next(target: Target) -> None:
    rig = Rig(target, _ACKED)
    parts = rig.cut(rig.packet(1), 12, 20)
    entries = [
        struct.pack("<QIHH", part.addr, part.len, flags, following)
        for part, flags, following in zip(parts, (NEXT, NEXT, 0), (0, 0xFFFF, 1), strict=True)
    ]
    _one(target, rig, rig.put(b"".join(entries))._replace(flags=INDIRECT))


@case("A table ends at the first descriptor that does not continue.")
def early_end(target: Target) -> None:
    rig = Rig(target, _ACKED)
    held = rig.put(
        struct.pack("<QIHH", *rig.outgoing(1)[0][:2], 0, 0)
        + struct.pack("<QIHH", *rig.outgoing(2)[0][:2], 0, 0)
    )
    _one(target, rig, held._replace(flags=INDIRECT))


@case("WRITE on the descriptor of a table is ignored.")
def write_flag(target: Target) -> None:
    rig = Rig(target, _ACKED)
    held = rig.indirect(rig.outgoing(1))
    _one(target, rig, held._replace(flags=INDIRECT | WRITE))


@case("A chain goes on behind the descriptor of a table.")
def chain_goes_on(target: Target) -> None:
    rig = Rig(target, _ACKED)
    header, first, second = rig.cut(rig.packet(1), 12, 20)
    _one(target, rig, rig.indirect([header, first]), second)


@case("A table may come after plain descriptors, and several tables in one chain.")
def several_tables(target: Target) -> None:
    rig = Rig(target, _ACKED)
    a, b, c, d = rig.cut(rig.packet(1), 12, 20, 20)
    _one(target, rig, a, rig.indirect([b]), rig.indirect([c, d]))


@case("A table takes one descriptor of the ring: a full ring of tables is as many frames.")
def full_ring(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | INDIRECT_DESC | EVENT_IDX, nums=(64, 16)))
    heads = rig.tx.offer(*[[rig.indirect(rig.cut(rig.packet(n), 12, 10, 10))] for n in range(16)])
    target.check("used", rig.tx.wait(16), [(head, 0) for head in heads])
    target.check("frames", rig.sent(16), [f"{n}x60" for n in range(16)])


@case("A table need not be aligned.")
def not_aligned(target: Target) -> None:
    rig = Rig(target, _ACKED)
    held = rig.indirect(rig.cut(rig.packet(1), 12))
    moved = rig.alloc(64) + 3
    rig.write(moved, rig.read(held.addr, held.len))
    _one(target, rig, held._replace(addr=moved))


@case("Tables of 131,072 empty descriptors in one chain are read to their end.")
def many_empty_ones(target: Target) -> None:
    rig = Rig(target, _ACKED)
    full = rig.indirect([Part(0, 0)] * 65536)
    rig.tx.offer([full, full])
    rig.tx.wait_errors(1)
    target.check("base", rig.tx.base(), 1)
    target.check("errors", rig.tx.errors(), 1)
