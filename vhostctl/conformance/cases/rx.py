"""Receive: what the host sends to the tap, in the guest's buffers (virtio 1.2, 5.1.6.3)."""

from __future__ import annotations

from vhostctl.abi import tun, virtio
from vhostctl.conformance.case import case
from vhostctl.conformance.rig import MRG, TUNNEL_GSO, UNTOUCHED, V1, VHOST_HDR, Rig, Setup
from vhostctl.conformance.target import Target
from vhostctl.conformance.wire import frame, name


def _num_buffers(data: bytes) -> int:
    return int.from_bytes(data[10:12], "little")


@case("A frame fills one buffer behind its header; the used length is the sum of the two.")
def one_buffer(target: Target) -> None:
    rig = Rig(target)
    room = rig.room(2000)
    (head,) = rig.rx.offer([room])
    rig.wire.send(frame(1))
    target.check("used", rig.rx.wait(1), [(head, 72)])
    data = rig.filled([room])
    target.check("header", data[:10].hex(), bytes(10).hex())
    target.check("frame", name(data[12:72]), "1x60")
    target.check("rest is untouched", data[72:].count(UNTOUCHED), 1928)
    target.check("errors", rig.rx.errors(), 0)


@case("With VERSION_1 and no MRG_RXBUF num_buffers is 1, or is not written at all.")
def num_buffers_v1(target: Target) -> None:
    rig = Rig(target)
    room = rig.room(2000)
    rig.rx.offer([room])
    rig.wire.send(frame(1))
    rig.rx.wait(1)
    found = _num_buffers(rig.filled([room]))
    target.check("num_buffers", found, found if found in (1, 0xAAAA) else 1)


def _behind_10(target: Target, setup: Setup) -> None:
    rig = Rig(target, setup)
    room = rig.room(2000)
    (head,) = rig.rx.offer([room])
    rig.wire.send(frame(1))
    target.check("used", rig.rx.wait(1), [(head, 70)])
    data = rig.filled([room])
    target.check("header", data[:10].hex(), bytes(10).hex())
    target.check("frame", name(data[10:70]), "1x60")


@case("Without VERSION_1 and MRG_RXBUF the frame comes behind 10 bytes.")
def header_of_10(target: Target) -> None:
    _behind_10(target, Setup(features=0, header=10))


@case("With VHOST_NET_F_VIRTIO_NET_HDR the device writes the 10 bytes of a legacy header itself.")
def own_header_of_10(target: Target) -> None:
    _behind_10(target, Setup(features=VHOST_HDR, header=None))


@case("A buffer may be a chain of many descriptors, the header split down to single bytes.")
def scattered(target: Target) -> None:
    rig = Rig(target)
    rooms = [rig.room(1) for _ in range(14)] + [rig.room(20) for _ in range(5)]
    (head,) = rig.rx.offer(rooms)
    rig.wire.send(frame(1))
    target.check("used", rig.rx.wait(1), [(head, 72)])
    data = rig.filled(rooms)
    target.check("header", data[:10].hex(), bytes(10).hex())
    target.check("frame", name(data[12:72]), "1x60")
    target.check("rest is untouched", data[72:].count(UNTOUCHED), len(data) - 72)


@case("A buffer may be an indirect table.")
def indirect(target: Target) -> None:
    rig = Rig(target)
    rooms = [rig.room(size) for size in (12, 30, 40)]
    (head,) = rig.rx.offer([rig.indirect(rooms)])
    rig.wire.send(frame(1))
    target.check("used", rig.rx.wait(1), [(head, 72)])
    target.check("frame", name(rig.filled(rooms)[12:72]), "1x60")


@case("Descriptors of length 0 in a receive chain take no data.")
def empty_descriptors(target: Target) -> None:
    rig = Rig(target)
    rooms = [rig.room(0), rig.room(12), rig.room(0), rig.room(100), rig.room(0)]
    (head,) = rig.rx.offer(rooms)
    rig.wire.send(frame(1))
    target.check("used", rig.rx.wait(1), [(head, 72)])
    target.check("frame", name(rig.filled(rooms)[12:72]), "1x60")


@case("Without MRG_RXBUF a frame that does not fit is dropped, and its buffer serves the next one.")
def too_small(target: Target) -> None:
    rig = Rig(target)
    room = rig.room(100)
    (head,) = rig.rx.offer([room])
    rig.wire.send(frame(1, 89))
    target.settle()
    target.check("used index", rig.rx.used_idx, 0)
    target.check("errors", rig.rx.errors(), 0)
    rig.wire.send(frame(2, 88))
    target.check("used", rig.rx.wait(1), [(head, 100)])
    target.check("frame", name(rig.filled([room])[12:]), "2x88")
    target.check("base", rig.rx.base(), 1)


@case("While a frame waits for buffers, neither more frames nor unkicked buffers wake the ring.")
def waits_for_a_kick(target: Target) -> None:
    rig = Rig(target)
    rig.wire.send(frame(1))
    target.settle()
    heads = [rig.rx.chain([rig.room(200)]) for _ in range(2)]
    rig.rx.publish(*heads)
    rig.wire.send(frame(2))
    target.settle()
    target.check("used index", rig.rx.used_idx, 0)
    rig.rx.kick.signal()
    target.check("used", rig.rx.wait(2), [(head, 72) for head in heads])


@case("Frames that came before the buffers are received in their order.")
def frames_first(target: Target) -> None:
    rig = Rig(target)
    for number in range(10):
        rig.wire.send(frame(number))
    rooms = [rig.room(100) for _ in range(10)]
    heads = rig.rx.offer(*[[room] for room in rooms])
    target.check("used", rig.rx.wait(10), [(head, 72) for head in heads])
    target.check("frames", [name(rig.filled([r])[12:72]) for r in rooms], _names(range(10)))


@case("Frames that came before the backend are received once it is there.")
def frames_before_the_backend(target: Target) -> None:
    rig = Rig(target, Setup(start=False))
    rooms = [rig.room(100) for _ in range(3)]
    rig.rx.publish(*[rig.rx.chain([room]) for room in rooms])
    for number in range(3):
        rig.wire.send(frame(number))
    rig.rx.start()
    target.check("used", rig.rx.wait(3), [(n, 72) for n in range(3)])
    target.check("frames", [name(rig.filled([r])[12:72]) for r in rooms], _names(range(3)))


@case("A backlog is given back with one call for every 64 buffers and more, and one at the end.")
def backlog_calls(target: Target) -> None:
    rig = Rig(target, Setup(nums=(256, 64), start=False))
    rooms = [rig.room(100) for _ in range(200)]
    rig.rx.publish(*[rig.rx.chain([room]) for room in rooms])
    for number in range(200):
        rig.wire.send(frame(number))
    rig.rx.start()
    target.check("used", len(rig.rx.wait(200)), 200)
    target.check("frames", [name(rig.filled([r])[12:72]) for r in rooms], _names(range(200)))
    target.check("calls", rig.rx.calls(), 4)


@case("A backlog of more packets than the device handles in one turn is received whole.")
def beyond_the_weight(target: Target) -> None:
    rig = Rig(target, Setup(nums=(512, 64), start=False))
    rooms = [rig.room(100) for _ in range(400)]
    rig.rx.publish(*[rig.rx.chain([room]) for room in rooms])
    for number in range(400):
        rig.wire.send(frame(number))
    rig.rx.start()
    target.check("used", len(rig.rx.wait(400)), 400)
    target.check("frames", [name(rig.filled([r])[12:72]) for r in rooms], _names(range(400)))


@case("With UDP tunnel offload the header has 24 bytes.", needs=("features_array",))
def header_of_24(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | MRG | TUNNEL_GSO, header=24))
    rooms = [rig.room(50), rig.room(50)]
    rig.rx.offer(*[[room] for room in rooms])
    rig.wire.send(frame(1))
    target.check("used", rig.rx.wait(2), [(0, 50), (1, 34)])
    data = rig.filled(rooms)
    target.check("num_buffers", _num_buffers(data), 2)
    target.check("frame", name(data[24:84]), "1x60")


@case("Every frame is received once and in order through a small ring.")
def small_ring(target: Target) -> None:
    rig = Rig(target, Setup(nums=(4, 64)))
    rooms = [rig.room(100) for _ in range(4)]
    found = []
    for start in range(0, 40, 4):
        rig.rx.offer(*[[room] for room in rooms])
        for number in range(start, start + 4):
            rig.wire.send(frame(number))
        rig.rx.wait(4, f"from {start}")
        found += [name(rig.filled([room])[12:72]) for room in rooms]
    target.check("frames", found, _names(range(40)))
    target.check("errors", rig.rx.errors(), 0)


@case("If the tap's header is not as long as the guest's, the frame is dropped, its buffer kept.")
def header_mismatch(target: Target) -> None:
    rig = Rig(target, Setup(header=10))
    rig.rx.offer([rig.room(200)])
    rig.wire.send(frame(1))
    target.settle()
    target.check("used index", rig.rx.used_idx, 0)
    target.check("base", rig.rx.base(), 0)
    target.check("errors", rig.rx.errors(), 0)
    rig.wire.queues[0].set_vnet_hdr_size(12)
    rig.wire.send(frame(2))
    target.check("used", rig.rx.wait(1), [(0, 72)])


@case("The tag of a VLAN frame stands in the frame.")
def vlan(target: Target) -> None:
    rig = Rig(target)
    room = rig.room(200)
    rig.rx.offer([room])
    data = frame(1)
    rig.wire.send_tagged(data, 5)
    target.check("used", rig.rx.wait(1), [(0, 76)])
    got = rig.filled([room])[12:76]
    target.check("tag", got[12:16].hex(), "81000005")
    target.check("frame", name(got[:12] + got[16:]), "1x60")


@case("A frame that waits for buffers survives a stop and a start.")
def survives_restart(target: Target) -> None:
    rig = Rig(target)
    rooms = [rig.room(100) for _ in range(4)]
    rig.rx.offer(rooms[:1])
    for number in range(4):
        rig.wire.send(frame(number))
    rig.rx.wait(1)
    target.check("base", rig.rx.stop(), 1)
    rig.rx.start()
    rig.rx.offer(rooms[1:2], rooms[2:3], rooms[3:])
    target.check("used", rig.rx.wait(3), [(n, 72) for n in (1, 2, 3)])
    target.check("frames", [name(rig.filled([r])[12:72]) for r in rooms], _names(range(4)))


@case("A large frame is received whole into one large buffer.")
def large(target: Target) -> None:
    rig = Rig(target)
    room = rig.room(16384)
    rig.rx.offer([room])
    rig.wire.send(frame(1, 9000))
    target.check("used", rig.rx.wait(1), [(0, 9012)])
    target.check("frame", name(rig.filled([room])[12:9012]), "1x9000")


@case("What the tap says of an unfinished checksum reaches the guest in the header.")
def checksum_offload(target: Target) -> None:
    rig = Rig(target)
    rig.wire.queues[0].set_offload(tun.TUN_F_CSUM)
    room = rig.room(200)
    rig.rx.offer([room])
    asks = virtio.virtio_net_hdr(
        flags=virtio.VIRTIO_NET_HDR_F_NEEDS_CSUM, csum_start=34, csum_offset=6
    )
    rig.wire.send_with_header(bytes(asks), frame(1))
    target.check("used", rig.rx.wait(1), [(0, 72)])
    got = virtio.virtio_net_hdr.from_buffer_copy(rig.filled([room]))
    target.check("flags", got.flags, virtio.VIRTIO_NET_HDR_F_NEEDS_CSUM)
    target.check("csum_start and csum_offset", [got.csum_start, got.csum_offset], [34, 6])


def _names(numbers: range) -> list[str]:
    return [f"{number}x60" for number in numbers]
