"""Transmit: what leaves the guest, whole and in order (virtio 1.2, 2.7 and 5.1.6.2)."""

from __future__ import annotations

from vhostctl.conformance.case import case
from vhostctl.conformance.rig import GPA, HEADER, MRG, TUNNEL_GSO, V1, VHOST_HDR, Rig, Setup
from vhostctl.conformance.ring import Part
from vhostctl.conformance.target import Target
from vhostctl.conformance.wire import frame


def _one(target: Target, rig: Rig, chain: list[Part], name: str = "1x60") -> None:
    """Transmit one chain and expect one frame, one used element and no error."""
    heads = rig.tx.offer(chain)
    target.check("used", rig.tx.wait(1), [(heads[0], 0)])
    target.check("frames", rig.sent(1), [name])
    target.check("errors", rig.tx.errors(), 0)
    target.check("base", rig.tx.base(), 1)


@case("A chain of one descriptor is one frame, and the used length is 0.")
def one_descriptor(target: Target) -> None:
    rig = Rig(target)
    _one(target, rig, rig.outgoing(1))


@case("A chain of two descriptors, header and data, is one frame.")
def two_descriptors(target: Target) -> None:
    rig = Rig(target)
    _one(target, rig, rig.cut(rig.packet(1), 12))


@case("A chain of 17 descriptors is one frame.")
def many_descriptors(target: Target) -> None:
    rig = Rig(target)
    _one(target, rig, rig.cut(rig.packet(1, 500), *[12, *[30] * 15]), "1x500")


@case("A chain may be as long as the ring.")
def whole_ring(target: Target) -> None:
    rig = Rig(target, Setup(nums=(64, 16)))
    _one(target, rig, rig.cut(rig.packet(1, 300), *[12, *[20] * 14]), "1x300")


@case("A header may be split over descriptors, down to single bytes.")
def split_header(target: Target) -> None:
    rig = Rig(target)
    _one(target, rig, rig.cut(rig.packet(1), *[1] * 12))


@case("Header and frame may be cut anywhere, also inside a descriptor that holds both.")
def odd_cuts(target: Target) -> None:
    rig = Rig(target)
    _one(target, rig, rig.cut(rig.packet(1), 5, 20, 1))


@case("Descriptors of length 0 anywhere in a chain add nothing to the frame.")
def empty_descriptors(target: Target) -> None:
    rig = Rig(target)
    header, data = rig.cut(rig.packet(1), 12)
    empty = Part(rig.alloc(64), 0)
    _one(target, rig, [empty, header, empty, empty, data, empty])


@case("A descriptor of length 0 is not looked up: its address may be anything.")
def empty_anywhere(target: Target) -> None:
    rig = Rig(target)
    _one(target, rig, [Part(0xDEAD_0000_0000, 0), *rig.outgoing(1)])


@case("The descriptors of a chain need not follow one another in the table.")
def scattered(target: Target) -> None:
    rig = Rig(target)
    header, data, rest = rig.cut(rig.packet(1), 12, 30)
    rig.tx.describe(40, header, 3)
    rig.tx.describe(3, data, 63)
    rig.tx.describe(63, rest)
    rig.tx.publish(40)
    rig.tx.kick.signal()
    target.check("used", rig.tx.wait(1), [(40, 0)])
    target.check("frames", rig.sent(1), ["1x60"])


@case("A chain whose last descriptor has a next field, but no NEXT flag, ends there.")
def next_without_flag(target: Target) -> None:
    rig = Rig(target)
    rig.tx.describe(0, Part(*rig.outgoing(1)[0][:2]))
    rig.write(rig.gpa(rig.tx.desc) + 14, b"\xff\xff")
    rig.tx.publish(0)
    rig.tx.kick.signal()
    target.check("used", rig.tx.wait(1), [(0, 0)])
    target.check("frames", rig.sent(1), ["1x60"])


@case("Without VERSION_1 and MRG_RXBUF the header has 10 bytes.")
def header_of_10(target: Target) -> None:
    rig = Rig(target, Setup(features=0, header=10))
    _one(target, rig, [rig.put(bytes(10) + frame(1))])


@case("With MRG_RXBUF alone the header has 12 bytes.")
def header_of_12(target: Target) -> None:
    rig = Rig(target, Setup(features=MRG))
    _one(target, rig, [rig.put(HEADER + frame(1))])


@case("With VHOST_NET_F_VIRTIO_NET_HDR a legacy header of 10 bytes is stripped.")
def stripped_10(target: Target) -> None:
    rig = Rig(target, Setup(features=VHOST_HDR, header=None))
    _one(target, rig, [rig.put(bytes(10) + frame(1))])


@case("With VHOST_NET_F_VIRTIO_NET_HDR the 12 bytes of VERSION_1 are stripped, whatever they say.")
def stripped_12(target: Target) -> None:
    rig = Rig(target, Setup(features=VHOST_HDR | V1, header=None))
    _one(target, rig, rig.cut(b"\xff" * 12 + frame(1), 5, 20))


@case("With UDP tunnel offload the header has 24 bytes.", needs=("features_array",))
def header_of_24(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | TUNNEL_GSO, header=24))
    _one(target, rig, [rig.put(bytes(24) + frame(1))])


@case("A large frame goes out whole, between small ones and in their order.")
def large(target: Target) -> None:
    rig = Rig(target)
    sizes = [60, 9000, 61, 3600, 3900, 62]
    heads = rig.tx.offer(*[rig.outgoing(number, size) for number, size in enumerate(sizes)])
    target.check("used", rig.tx.wait(6), [(head, 0) for head in heads])
    target.check("frames", rig.sent(6), [f"{n}x{size}" for n, size in enumerate(sizes)])


@case("Every size of frame from 14 bytes on goes out as it is.")
def sizes(target: Target) -> None:
    rig = Rig(target, Setup(nums=(64, 256)))
    wanted = [18, 19, 59, 60, 61, 63, 64, 65, 127, 128, 129, 511, 512, 1514, 2047, 2048, 4095, 4096]
    rig.tx.offer(*[rig.outgoing(1, size) for size in wanted])
    target.check("frames", rig.sent(len(wanted)), [f"1x{size}" for size in wanted])


@case("64 buffers published at once are given back with one call.")
def one_batch(target: Target) -> None:
    rig = Rig(target)
    heads = rig.tx.offer(*[rig.outgoing(n) for n in range(64)])
    target.check("used", rig.tx.wait(64), [(head, 0) for head in heads])
    target.check("frames", rig.sent(64), [f"{n}x60" for n in range(64)])
    target.check("calls", rig.tx.calls(), 1)


@case("200 buffers published at once are given back with four calls, one for each batch of 64.")
def four_batches(target: Target) -> None:
    rig = Rig(target, Setup(nums=(64, 256)))
    heads = rig.tx.offer(*[rig.outgoing(n) for n in range(200)])
    target.check("used", rig.tx.wait(200), [(head, 0) for head in heads])
    target.check("frames", rig.sent(200), [f"{n}x60" for n in range(200)])
    target.check("calls", rig.tx.calls(), 4)


@case("One kick is enough for more packets than the device handles in one turn.")
def beyond_the_weight(target: Target) -> None:
    rig = Rig(target, Setup(nums=(64, 1024)))
    rig.tx.offer(*[rig.outgoing(n, 20) for n in range(700)])
    target.check("used", len(rig.tx.wait(700)), 700)
    target.check("base", rig.tx.base(), 700)


@case("One kick is enough for more bytes than the device handles in one turn.")
def beyond_the_byte_weight(target: Target) -> None:
    rig = Rig(target, Setup(nums=(64, 128), regions=((GPA, 16 << 20),)))
    rig.tx.offer(*[rig.outgoing(n, 9000) for n in range(120)])
    target.check("used", len(rig.tx.wait(120)), 120)
    target.check("base", rig.tx.base(), 120)


@case("Avail and used index go on from 65535 to 0.")
def index_wraps(target: Target) -> None:
    rig = Rig(target, Setup(bases=(0, 65530)))
    heads = rig.tx.offer(*[rig.outgoing(n) for n in range(12)])
    target.check("used", rig.tx.wait(12), [(head, 0) for head in heads])
    target.check("used index", rig.tx.used_idx, 6)
    target.check("base", rig.tx.base(), 6)
    target.check("frames", rig.sent(12), [f"{n}x60" for n in range(12)])


@case("The used index is read from memory when the ring starts.")
def used_index_from_memory(target: Target) -> None:
    rig = Rig(target, Setup(start=False))
    rig.write(rig.gpa(rig.tx.used) + 2, b"\x05\0")
    rig.start()
    (head,) = rig.tx.offer(rig.outgoing(1))
    rig.tx.reach(6)
    target.check("element", rig.tx.element(5), (head, 0))
    target.check("base", rig.tx.base(), 1)


@case("SET_VRING_BASE skips what was published before it.")
def base_skips(target: Target) -> None:
    rig = Rig(target, Setup(start=False))
    rig.tx.publish(*[rig.tx.chain(rig.outgoing(n)) for n in range(4)])
    rig.device.set_vring_base(1, 2)
    rig.start()
    target.check("frames", rig.sent(2), ["2x60", "3x60"])
    target.check("used index", rig.tx.used_idx, 2)
    target.check("base", rig.tx.base(), 4)


@case("Buffers published before SET_BACKEND go out without a kick.")
def before_the_backend(target: Target) -> None:
    rig = Rig(target, Setup(start=False))
    rig.tx.publish(*[rig.tx.chain(rig.outgoing(n)) for n in range(3)])
    rig.start()
    target.check("frames", rig.sent(3), ["0x60", "1x60", "2x60"])
    target.check("used", len(rig.tx.wait(3)), 3)


@case("With a limited send buffer every frame still goes out, in order.")
def limited_sndbuf(target: Target) -> None:
    rig = Rig(target, Setup(sndbuf=65536))
    heads = rig.tx.offer(*[rig.outgoing(n) for n in range(40)])
    target.check("used", rig.tx.wait(40), [(head, 0) for head in heads])
    target.check("frames", rig.sent(40), [f"{n}x60" for n in range(40)])


@case("A small ring is used round and round.")
def round_and_round(target: Target) -> None:
    rig = Rig(target, Setup(nums=(64, 4)))
    used = []
    for number in range(0, 40, 4):
        rig.tx.offer(*[rig.outgoing(number + n) for n in range(4)])
        used += rig.tx.wait(4, f"from {number}")
    target.check("used", used, [(n % 4, 0) for n in range(40)])
    target.check("frames", rig.sent(40), [f"{n}x60" for n in range(40)])


@case("A ring of one descriptor works.")
def ring_of_one(target: Target) -> None:
    rig = Rig(target, Setup(nums=(64, 1)))
    for number in range(3):
        rig.tx.offer(rig.outgoing(number))
        target.check(f"used {number}", rig.tx.wait(1, f"{number}"), [(0, 0)])
    target.check("frames", rig.sent(3), ["0x60", "1x60", "2x60"])


@case("A ring of 32768 descriptors works.")
def ring_of_32768(target: Target) -> None:
    rig = Rig(target, Setup(nums=(64, 32768)))
    rig.tx.filled = 32766
    heads = rig.tx.offer(rig.cut(rig.packet(1), 12, 20, 20), rig.outgoing(2))
    target.check("heads", heads, [32766, 2])
    target.check("used", rig.tx.wait(2), [(32766, 0), (2, 0)])
    target.check("frames", rig.sent(2), ["1x60", "2x60"])


@case("A head that is published twice is sent twice.")
def same_head_twice(target: Target) -> None:
    rig = Rig(target)
    head = rig.tx.chain(rig.outgoing(1))
    rig.tx.publish(head, head)
    rig.tx.kick.signal()
    target.check("used", rig.tx.wait(2), [(head, 0), (head, 0)])
    target.check("frames", rig.sent(2), ["1x60", "1x60"])
