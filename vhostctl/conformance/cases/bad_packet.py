"""Well-formed chains that are no packet: given back unsent, lost, or tried again.

Given back: used with length 0, no error. Lost: the index goes on, ERR is signalled and the
head never comes back. Tried again: nothing changes until the driver mends the chain; the
in-tree device tries at once, for ever, and others may wait for a kick.
"""

from __future__ import annotations

from vhostctl.abi import virtio
from vhostctl.conformance.case import case
from vhostctl.conformance.rig import HEADER, MRG, PAGE, V1, VHOST_HDR, Queue, Rig, Setup
from vhostctl.conformance.ring import Part
from vhostctl.conformance.target import Target
from vhostctl.conformance.wire import frame, name

_NEEDS_CSUM = virtio.VIRTIO_NET_HDR_F_NEEDS_CSUM
_LIMITED = Setup(sndbuf=1 << 20)


def _given_back(target: Target, rig: Rig, *parts: Part) -> None:
    heads = rig.tx.offer(parts, rig.outgoing(7))
    target.check("used", rig.tx.wait(2), [(head, 0) for head in heads])
    target.check("frames", rig.sent(1), ["7x60"])
    target.check("errors", rig.tx.errors(), 0)


def _lost(target: Target, queue: Queue) -> None:
    """Expect that the chain at index 0 is lost, and that nothing behind it is looked at."""
    queue.wait_errors(1)
    target.check("errors", queue.errors(), 1)
    target.check("base", queue.base(), 1)
    target.check("used index", queue.used_idx, 0)


def _lost_tx(target: Target, rig: Rig, *parts: Part) -> None:
    _, head = rig.tx.offer(parts, [rig.put(bytes(rig.setup.header_size) + frame(7))])
    _lost(target, rig.tx)
    target.check("frames", rig.wire.received(), [])
    rig.tx.kick.signal()
    target.check("used after the next kick", rig.tx.wait(1), [(head, 0)])
    target.check("frames after the next kick", rig.sent(1), ["7x60"])


def _lost_rx(target: Target, rig: Rig, *parts: Part) -> None:
    rig.wire.send(frame(1))
    target.settle()
    room = rig.room(200)
    _, head = rig.rx.offer(parts, [room])
    _lost(target, rig.rx)
    rig.rx.kick.signal()
    target.check("used after the next kick", rig.rx.wait(1), [(head, 72)])
    target.check("frame", name(rig.filled([room])[12:72]), "1x60")


def _tried_again(target: Target, rig: Rig, *parts: Part) -> None:
    rig.tx.offer(parts)
    target.settle()
    target.check("used index", rig.tx.used_idx, 0)
    target.check("base", rig.tx.stop(), 0)
    target.check("errors", rig.tx.errors(), 0)
    target.check("calls", rig.tx.calls(), 0)
    target.check("frames", rig.wire.received(), [])


@case("A header without a frame is given back.")
def header_only(target: Target) -> None:
    rig = Rig(target)
    _given_back(target, rig, rig.put(HEADER))


@case("A frame of 13 bytes, less than an Ethernet header, is given back.")
def short_frame(target: Target) -> None:
    rig = Rig(target)
    _given_back(target, rig, rig.put(rig.packet(1)[:25]))


@case("A frame of one byte is given back.")
def one_byte(target: Target) -> None:
    rig = Rig(target)
    _given_back(target, rig, rig.put(rig.packet(1)[:13]))


@case("A frame with a gso_type that nobody knows is given back.")
def bad_gso(target: Target) -> None:
    rig = Rig(target)
    header = virtio.virtio_net_hdr(gso_type=0x0F, gso_size=100, hdr_len=14)
    _given_back(target, rig, rig.put(bytes(header) + b"\0\0" + frame(1)))


@case("A frame with a limited send buffer and a gso_type that nobody knows is given back.")
def bad_gso_limited(target: Target) -> None:
    rig = Rig(target, _LIMITED)
    header = virtio.virtio_net_hdr(gso_type=0x0F, gso_size=100, hdr_len=14)
    _given_back(target, rig, rig.put(bytes(header) + b"\0\0" + frame(1)))


@case("A frame that is sent while the tap is down is given back.")
def tap_down(target: Target) -> None:
    rig = Rig(target)
    rig.wire.set_up(False)
    (head,) = rig.tx.offer(rig.outgoing(1))
    target.check("used", rig.tx.wait(1), [(head, 0)])
    target.check("errors", rig.tx.errors(), 0)
    rig.wire.set_up(True)
    target.check("frames", rig.wire.received(), [])


@case("A packet shorter than the header is given back if the send buffer is limited.")
def short_header_limited(target: Target) -> None:
    rig = Rig(target, _LIMITED)
    _given_back(target, rig, rig.put(bytes(11)))


@case("A checksum behind the end of the packet: given back if the send buffer is limited.")
def bad_checksum_limited(target: Target) -> None:
    rig = Rig(target, _LIMITED)
    header = virtio.virtio_net_hdr(flags=_NEEDS_CSUM, csum_start=60, csum_offset=0)
    _given_back(target, rig, rig.put(bytes(header) + b"\0\0" + frame(1)))


@case("A packet that wants its checksum filled in goes out.")
def good_checksum(target: Target) -> None:
    rig = Rig(target)
    header = virtio.virtio_net_hdr(flags=_NEEDS_CSUM, csum_start=34, csum_offset=6)
    (head,) = rig.tx.offer([rig.put(bytes(header) + b"\0\0" + frame(1))])
    target.check("used", rig.tx.wait(1), [(head, 0)])
    target.check("frames", rig.sent(1), ["1x60"])
    target.check("errors", rig.tx.errors(), 0)


@case("A transmit chain that ends with a writable descriptor is lost.")
def writable(target: Target) -> None:
    rig = Rig(target)
    _lost_tx(target, rig, *rig.outgoing(1), rig.room(10))


@case("A transmit chain with only writable descriptors is lost.")
def only_writable(target: Target) -> None:
    rig = Rig(target)
    _lost_tx(target, rig, rig.room(100))


@case("A transmit chain with a writable descriptor in its indirect table is lost.")
def writable_in_table(target: Target) -> None:
    rig = Rig(target)
    _lost_tx(target, rig, rig.indirect([*rig.outgoing(1), rig.room(10)]))


@case("A transmit chain with only descriptors of length 0 is lost.")
def nothing(target: Target) -> None:
    rig = Rig(target)
    _lost_tx(target, rig, Part(rig.alloc(16), 0), Part(rig.alloc(16), 0))


@case("With VHOST_NET_F_VIRTIO_NET_HDR a packet that is only a header is lost.")
def stripped_to_nothing(target: Target) -> None:
    rig = Rig(target, Setup(features=VHOST_HDR | V1, header=None))
    _lost_tx(target, rig, rig.put(HEADER))


@case("With VHOST_NET_F_VIRTIO_NET_HDR a packet shorter than its header is lost.")
def stripped_below_nothing(target: Target) -> None:
    rig = Rig(target, Setup(features=VHOST_HDR | V1, header=None))
    _lost_tx(target, rig, rig.put(HEADER[:5]))


@case("A receive chain with a readable descriptor is lost, and the frame takes the next one.")
def readable(target: Target) -> None:
    rig = Rig(target)
    _lost_rx(target, rig, rig.put(bytes(12)), rig.room(200))


@case("A receive chain with only readable descriptors is lost.")
def only_readable(target: Target) -> None:
    rig = Rig(target)
    _lost_rx(target, rig, rig.put(bytes(200)))


@case("A receive chain with only descriptors of length 0 is lost.")
def no_room(target: Target) -> None:
    rig = Rig(target)
    _lost_rx(target, rig, rig.room(0), rig.room(0))


@case("With MRG_RXBUF a receive chain with a readable descriptor is lost too.")
def readable_merged(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | MRG))
    _lost_rx(target, rig, rig.put(bytes(12)), rig.room(200))


@case("A packet shorter than the header stays in the ring.")
def short_header(target: Target) -> None:
    rig = Rig(target)
    _tried_again(target, rig, rig.put(bytes(11)))


@case("A packet whose checksum lies behind its end stays in the ring.")
def bad_checksum(target: Target) -> None:
    rig = Rig(target)
    header = virtio.virtio_net_hdr(flags=_NEEDS_CSUM, csum_start=71, csum_offset=0)
    _tried_again(target, rig, rig.put(bytes(header) + b"\0\0" + frame(1)))


@case("A packet that cannot be read stays in the ring.")
def not_readable(target: Target) -> None:
    rig = Rig(target)
    room = rig.room(72, PAGE)
    rig.protect(room.addr, PAGE, read=False, write=False)
    _tried_again(target, rig, Part(room.addr, 72))


@case("A packet that stays in the ring goes out once it is mended.")
def mended(target: Target) -> None:
    rig = Rig(target)
    (data,) = rig.outgoing(1)
    rig.tx.offer([data._replace(len=5)])
    target.settle()
    target.check("used index", rig.tx.used_idx, 0)
    rig.tx.describe(0, data)
    rig.tx.kick.signal()
    target.check("used", rig.tx.wait(1), [(0, 0)])
    target.check("frames", rig.sent(1), ["1x60"])


@case("A packet that stays in the ring is tried again without a kick.")
def tried_without_kick(target: Target) -> None:
    rig = Rig(target)
    (data,) = rig.outgoing(1)
    rig.tx.offer([data._replace(len=5)])
    target.settle()
    rig.tx.describe(0, data)
    target.settle()  # the turn that was on may have seen what the ring was before
    target.settle()
    target.check("used index", rig.tx.used_idx, 1)


@case("Packets before one that stays in the ring are sent and given back.")
def good_ones_before(target: Target) -> None:
    rig = Rig(target)
    rig.tx.offer(rig.outgoing(1), rig.outgoing(2), [rig.put(bytes(5))], rig.outgoing(3))
    target.check("used", rig.tx.wait(2), [(0, 0), (1, 0)])
    target.check("frames", rig.sent(2), ["1x60", "2x60"])
    target.check("base", rig.tx.stop(), 2)
