"""A suspended session as a document: what another process needs to go on from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import msgspec

from vhostctl.abi import virtio
from vhostctl.control.features import Policy, mask
from vhostctl.control.rings import RingPlacement, check_size
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
    they were masked.
    """

    size: int
    desc: int
    avail: int
    used: int
    base: int
    masked: bool = False
    pending: bool = False

    @property
    def placement(self) -> RingPlacement:
        """Where the ring lies."""
        return RingPlacement(self.size, self.desc, self.avail, self.used)


class TapSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the tap was set up: bytes, TUN_F_* flags, byte order of the header."""

    name: str
    header_size: int
    offload: int
    endian: Literal["little", "native"]
    sndbuf: int


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


def take(wiring: Wiring, bases: Sequence[int], *, link: bool, undelivered: int = 0) -> Snapshot:
    """Return what there is to know of `wiring`, whose rings stand at `bases`."""
    result, config = wiring.negotiated, wiring.config
    calls = [call for pair in wiring.pairs for call in pair.calls]
    return Snapshot(
        version=VERSION,
        device=config.device,
        features=tuple(virtio.feature_names(result.features)),
        vmm=tuple(virtio.feature_names(result.features & config.vmm)),
        memory=tuple(RegionSnapshot(r.gpa, r.size, r.name) for r in wiring.memory.regions),
        rings=tuple(
            RingSnapshot(q.size, q.desc, q.avail, q.used, base, call.masked, call.pending)
            for q, base, call in zip(wiring.queues, bases, calls, strict=True)
        ),
        order=tuple(wiring.order),
        link=link,
        busyloop=wiring.busyloop,
        translating=config.translating,
        tap=TapSnapshot(
            name=wiring.tap.name if wiring.tap else config.tap,
            header_size=result.header_size,
            offload=result.offload,
            endian=result.endian,
            sndbuf=config.sndbuf,
        ),
        undelivered=undelivered,
    )
