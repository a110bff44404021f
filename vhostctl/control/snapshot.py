"""A suspended session as a document: what another process needs to go on from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import msgspec

from vhostctl.abi import virtio
from vhostctl.control.features import Policy, mask
from vhostctl.control.rings import RingPlacement, check_size
from vhostctl.control.tapside import TapSettings
from vhostctl.control.wiring import SessionConfig, Wiring
from vhostctl.errors import InvalidArgument

VERSION = 1


class RegionSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A region of guest memory: bytes; its content is moved by whoever owns it."""

    gpa: int
    size: int
    name: str = ""


class RingSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ring: guest physical addresses (I/O virtual ones in translating mode), and its state.

    `base` is the avail index that the device reads next, `pending` whether a call came while
    they were masked, `stopped` whether it was stopped alone.
    """

    size: int
    desc: int
    avail: int
    used: int
    base: int
    masked: bool = False
    pending: bool = False
    stopped: bool = False

    @property
    def placement(self) -> RingPlacement:
        """Where the ring lies."""
        return RingPlacement(self.size, self.desc, self.avail, self.used)


class TapSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the tap was set up: bytes, TUN_F_* flags, byte order of the header.

    `offer` is what it offers, feature bits, or None if nobody asked: it is not tried again,
    for that would disturb what is in it. `before` is what each queue had before anybody
    wired it, for the session that ends last.
    """

    name: str
    header_size: int
    offload: int
    endian: Literal["little", "native"]
    sndbuf: int
    offer: int | None = None
    before: tuple[TapSettings, ...] = ()


class Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything of a session that outlives it; lists are in virtqueue or pair order.

    `features` are the names of the acknowledged bits, `vmm` those of them that the VMM serves,
    `order` the enabled pair at each of the tap's queue indices.
    `undelivered` counts frames that a device had taken from the tap and did not get rid of
    in time: they are lost. `device` is where it ran, which binds nobody.
    """

    version: int
    device: str
    features: tuple[str, ...]
    vmm: tuple[str, ...]
    memory: tuple[RegionSnapshot, ...]
    rings: tuple[RingSnapshot, ...]
    order: tuple[int, ...]
    link: bool
    busyloop: int
    worker: str | None
    translating: bool
    tap: TapSnapshot
    undelivered: int = 0

    @property
    def feature_bits(self) -> int:
        """The acknowledged bits."""
        return _bits(self.features)

    def to_json(self) -> str:
        """Return the document."""
        return msgspec.json.format(msgspec.json.encode(self)).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a document. Raises InvalidArgument, which names what is wrong and where."""
        try:
            found = msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise InvalidArgument(f"snapshot: {error}") from error
        found.check()
        return found

    def config(self, device: str) -> SessionConfig:
        """Return what a session on `device` is to wire: these features, and no others."""
        bits = self.feature_bits
        return SessionConfig(
            tap=self.tap.name,
            device=device,
            queues=len(self.rings) // 2,
            queue_size=max(ring.size for ring in self.rings),
            policy=Policy(required=bits),
            driver=bits,
            vmm=_bits(self.vmm),
            sndbuf=self.tap.sndbuf,
            busyloop=self.busyloop,
            worker=self.worker,
            translating=self.translating,
        )

    def check(self) -> None:
        """Raise InvalidArgument unless the parts fit together."""
        if self.version != VERSION:
            raise InvalidArgument(
                f"snapshot: version {self.version}", hint=f"this vhostctl reads version {VERSION}"
            )
        _bits(self.features + self.vmm)
        if not self.rings or len(self.rings) % 2:
            raise InvalidArgument(f"snapshot: {len(self.rings)} rings", hint="a pair has two")
        if len(set(self.order)) != len(self.order) or not (
            set() < set(self.order) <= set(range(len(self.rings) // 2))
        ):
            raise InvalidArgument(f"snapshot: $.order is {list(self.order)}")
        for index, ring in enumerate(self.rings):
            check_size(ring.size)
            if not 0 <= ring.base <= 0xFFFF:
                raise InvalidArgument(f"snapshot: $.rings[{index}].base is {ring.base}")


def _bits(names: tuple[str, ...]) -> int:
    try:
        return mask(*map(virtio.feature_bit, names))
    except InvalidArgument as error:
        raise InvalidArgument(f"snapshot: {error}") from error


def take(wiring: Wiring, bases: Sequence[int], undelivered: int = 0) -> Snapshot:
    """Return what there is to know of `wiring`, whose rings stand at `bases`."""
    result, config = wiring.negotiated, wiring.config
    side = wiring.side
    rings = [
        RingSnapshot(
            queue.size,
            queue.desc,
            queue.avail,
            queue.used,
            bases[2 * pair.index + ring],
            masked=pair.calls[ring].masked,
            pending=pair.calls[ring].pending,
            stopped=ring in pair.stopped,
        )
        for pair in wiring.pairs
        for ring, queue in enumerate(pair.queues)
    ]
    return Snapshot(
        version=VERSION,
        device=config.device,
        features=tuple(virtio.feature_names(result.features)),
        vmm=tuple(virtio.feature_names(result.features & config.vmm)),
        memory=tuple(RegionSnapshot(r.gpa, r.size, r.name) for r in wiring.memory.regions),
        rings=tuple(rings),
        order=tuple(side.order),
        link=wiring.link,
        busyloop=wiring.busyloop,
        worker=config.worker,
        translating=config.translating,
        tap=TapSnapshot(
            name=side.tap.name if side.tap else config.tap,
            header_size=result.header_size,
            offload=result.offload,
            endian=result.endian,
            sndbuf=side.sndbuf,
            offer=side.offer,
            before=tuple(side.before),
        ),
        undelivered=undelivered,
    )


def bring_back(wiring: Wiring, snapshot: Snapshot) -> None:
    """Have `wiring`, whose rings are not set, as the one was that `snapshot` is of."""
    wiring.link = snapshot.link
    wiring.busyloop = snapshot.busyloop
    wiring.side.follow(snapshot.order)
    wiring.side.handed_on = True  # until it starts
    wiring.side.offer = snapshot.tap.offer
    wiring.side.before = snapshot.tap.before
    for pair in wiring.pairs:
        for ring, call in enumerate(pair.calls):
            was = snapshot.rings[2 * pair.index + ring]
            (pair.stopped.add if was.stopped else pair.stopped.discard)(ring)
            call.unmask()
            if was.masked:
                call.mask(pending=was.pending)
