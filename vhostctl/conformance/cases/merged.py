"""Receive with MRG_RXBUF: one frame in several buffers (virtio 1.2, 5.1.6.4)."""

from __future__ import annotations

from vhostctl.conformance.case import case
from vhostctl.conformance.rig import MRG, V1, VHOST_HDR, Rig, Setup
from vhostctl.conformance.ring import Part
from vhostctl.conformance.target import Target
from vhostctl.conformance.wire import frame, name

_MRG = Setup(features=V1 | MRG)


def _num_buffers(data: bytes) -> int:
    return int.from_bytes(data[10:12], "little")


def _merged(target: Target, rig: Rig, sizes: list[int], size: int, lens: list[int]) -> None:
    """Receive one frame of `size` bytes into buffers of `sizes`; `lens` is what each gets."""
    rooms = [rig.room(size) for size in sizes]
    heads = rig.rx.offer(*[[room] for room in rooms])
    rig.wire.send(frame(1, size))
    used = rig.rx.wait(len(lens))
    target.check("used", used, list(zip(heads, lens, strict=False)))
    data = rig.filled(Part(room.addr, n) for room, n in zip(rooms, lens, strict=False))
    target.check("header", data[:10].hex(), bytes(10).hex())
    target.check("num_buffers", _num_buffers(data), len(lens))
    target.check("frame", name(data[12:]), f"1x{size}")
    target.check("base", rig.rx.base(), len(lens))


@case("With VHOST_NET_F_VIRTIO_NET_HDR and MRG_RXBUF its header has num_buffers as well.")
def own_header_of_12(target: Target) -> None:
    rig = Rig(target, Setup(features=VHOST_HDR | V1 | MRG, header=None))
    _merged(target, rig, [100, 100, 100], 250, [100, 100, 62])


@case("With MRG_RXBUF a frame that fits one buffer has num_buffers 1.")
def merged_1(target: Target) -> None:
    _merged(target, Rig(target, _MRG), [2000], 60, [72])


@case("With MRG_RXBUF alone the header is that of MRG_RXBUF.")
def merged_legacy(target: Target) -> None:
    _merged(target, Rig(target, Setup(features=MRG)), [100, 100], 120, [100, 32])


@case("With MRG_RXBUF a frame takes buffers in order: all but the last are full.")
def merged_3(target: Target) -> None:
    _merged(target, Rig(target, _MRG), [100, 120, 140], 300, [100, 120, 92])


@case("With MRG_RXBUF a frame may take more than 17 buffers.")
def merged_20(target: Target) -> None:
    _merged(target, Rig(target, _MRG), [64] * 30, 1250, [64] * 19 + [46])


@case("With MRG_RXBUF a frame that fills its buffers exactly takes no other one.")
def merged_exact(target: Target) -> None:
    _merged(target, Rig(target, _MRG), [100, 100, 100], 188, [100, 100])


@case("With MRG_RXBUF one byte more than fits takes another buffer, for one byte.")
def merged_one_more(target: Target) -> None:
    _merged(target, Rig(target, _MRG), [100, 100, 100], 189, [100, 100, 1])


@case("With MRG_RXBUF the header may be split over buffers.")
def merged_tiny(target: Target) -> None:
    _merged(target, Rig(target, _MRG), [5, 6, 7, 100], 60, [5, 6, 7, 54])


@case("With MRG_RXBUF each buffer may itself be a chain.")
def merged_chains(target: Target) -> None:
    rig = Rig(target, _MRG)
    rooms = [rig.room(size) for size in (12, 28, 30, 50)]
    heads = rig.rx.offer(rooms[:2], rooms[2:])
    rig.wire.send(frame(1, 100))
    target.check("used", rig.rx.wait(2), [(heads[0], 40), (heads[1], 72)])
    data = rig.filled(rooms)
    target.check("num_buffers", _num_buffers(data), 2)
    target.check("frame", name(data[12:112]), "1x100")


@case("With MRG_RXBUF num_buffers is written where it is split over two descriptors.")
def split_num_buffers(target: Target) -> None:
    rig = Rig(target, _MRG)
    rooms = [rig.room(size) for size in (11, 1, 100)]
    rig.rx.offer(rooms)
    rig.wire.send(frame(1))
    rig.rx.wait(1)
    data = rig.filled(rooms)
    target.check("num_buffers", _num_buffers(data), 1)
    target.check("frame", name(data[12:72]), "1x60")


@case("With too few mergeable buffers a frame waits, and the buffers stay the driver's.")
def too_few(target: Target) -> None:
    rig = Rig(target, _MRG)
    rooms = [rig.room(100) for _ in range(4)]
    rig.rx.offer(rooms[:1], rooms[1:2])
    rig.wire.send(frame(1, 300))
    target.settle()
    target.check("used index", rig.rx.used_idx, 0)
    target.check("base", rig.rx.base(), 0)
    rig.rx.offer(rooms[2:3], rooms[3:])
    target.check("used", rig.rx.wait(4), [(0, 100), (1, 100), (2, 100), (3, 12)])
    data = rig.filled(rooms)
    target.check("frame", name(data[12:312]), "1x300")
    target.check("num_buffers", _num_buffers(data), 4)
    target.check("errors", rig.rx.errors(), 0)


@case("With MRG_RXBUF a frame takes up to 1024 buffers.")
def merged_1024(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | MRG, nums=(2048, 64)))
    _merged(target, rig, [1] * 1030, 1012, [1] * 1024)


@case("With MRG_RXBUF a frame that needs more than 1024 buffers waits, without an error.")
def merged_1025(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | MRG, nums=(2048, 64)))
    rig.rx.offer(*[[rig.room(1, 1)] for _ in range(1030)])
    rig.wire.send(frame(1, 1013))
    target.settle()
    rig.rx.kick.signal()
    target.settle()
    target.check("used index", rig.rx.used_idx, 0)
    target.check("base", rig.rx.base(), 0)
    target.check("errors", rig.rx.errors(), 0)


@case("Avail and used index go on from 65535 to 0, in the middle of a merged frame.")
def index_wraps(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | MRG, bases=(65534, 0)))
    rooms = [rig.room(100) for _ in range(6)]
    heads = rig.rx.offer(*[[room] for room in rooms])
    rig.wire.send(frame(1, 400))
    lens = [100, 100, 100, 100, 12]
    target.check("used", rig.rx.wait(5), list(zip(heads, lens, strict=False)))
    target.check("used index", rig.rx.used_idx, 3)
    target.check("base", rig.rx.base(), 3)
    target.check("frame", name(rig.filled(rooms)[12:412]), "1x400")


@case("Behind good buffers a chain with a readable descriptor costs the first of them its place.")
def good_before_readable(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | MRG))
    rooms = [rig.room(100) for _ in range(5)]
    readable = rig.put(bytes(100))
    chains = [[rooms[0]], [rooms[1]], [readable], *([room] for room in rooms[2:])]
    rig.wire.send(frame(1, 250))
    target.settle()
    rig.rx.offer(*chains)
    rig.rx.wait_errors(1)
    target.check("base", rig.rx.base(), 1)
    target.check("used index", rig.rx.used_idx, 0)
    rig.rx.kick.signal()
    rig.rx.wait_errors(2, "errors after the next kick")
    target.check("base after the next kick", rig.rx.base(), 2)
