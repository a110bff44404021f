"""What a device of the service is to be, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import msgspec

from vhostctl.abi import virtio
from vhostctl.control.features import Policy, mask
from vhostctl.control.netsetup import LinkSettings, parse_mac
from vhostctl.control.rings import check_size
from vhostctl.control.ringstatus import RingStatus
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import InvalidArgument
from vhostctl.host.vhost import DEFAULT_PATH
from vhostctl.jobs.guests import GuestIdentity, GuestSpec
from vhostctl.jobs.wire import WireConfig

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$(?!\n)")]
"""A device's name: it names files too."""

Mtu = Annotated[int, msgspec.Meta(ge=68, le=65521)]
"""Bytes of IP that a tap may have in a frame."""

TapName = Annotated[str, msgspec.Meta(pattern=r"^[^\s/%:]{1,15}$(?!\n)")]


def _blame(key: str, function: Callable[..., object], *arguments: object) -> None:
    """Call `function`; what it refuses is the fault of `key`."""
    try:
        function(*arguments)
    except InvalidArgument as error:
        raise InvalidArgument(f"{key}: {error}") from error


def _bits(names: Sequence[str]) -> int:
    return mask(*map(virtio.feature_bit, names))


class DeviceSpec(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"
):
    """A device: a tap wired to vhost-net, and the guest behind it.

    `device` is a node or ``engine``, `queues` pairs, `queue_size` descriptors, `guest`
    ``echo``, ``sink``, ``pcap:FILE`` or ``forward:IFACE``. `addresses` (CIDR), `mtu` (bytes) and
    `bridge` are the tap's on the host, `mac` is the guest's. `require` and `refuse` name
    features, `busyloop` is microseconds, `worker` the kind of worker, None: the kernel's choice.
    """

    name: Name
    tap: TapName
    device: str = DEFAULT_PATH
    queues: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    queue_size: Annotated[int, msgspec.Meta(ge=1, le=32768)] = 256
    guest: str = "echo"
    addresses: tuple[str, ...] = ()
    mtu: Mtu | None = None
    bridge: str | None = None
    mac: str | None = None
    require: tuple[str, ...] = ()
    refuse: tuple[str, ...] = ()
    busyloop: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0
    worker: Literal["task", "kthread"] | None = None

    def __post_init__(self) -> None:
        """Raise InvalidArgument for what can never be."""
        _blame("require", _bits, self.require)
        _blame("refuse", _bits, self.refuse)
        if both := virtio.feature_names(_bits(self.require) & _bits(self.refuse)):
            raise InvalidArgument(f"refuse: {both[0]} is required too")
        _blame("queue-size", check_size, self.queue_size)
        _blame("guest", GuestSpec.parse, self.guest)
        if self.mac is not None:
            _blame("mac", parse_mac, self.mac)
        _blame("addresses", self.identity)

    @property
    def link(self) -> LinkSettings:
        """What to make of the tap on the host."""
        return LinkSettings(addresses=self.addresses, mtu=self.mtu, bridge=self.bridge)

    def wire(self) -> WireConfig:
        """Return what to wire, in the namespace of the caller."""
        session = SessionConfig(
            tap=self.tap,
            device=self.device,
            queues=self.queues,
            queue_size=self.queue_size,
            policy=Policy(required=_bits(self.require), refused=_bits(self.refuse)),
            busyloop=self.busyloop,
            worker=self.worker,
        )
        return WireConfig(session, self.link, isolated=False)

    def guest_spec(self) -> GuestSpec:
        """Return what is behind the tap."""
        return GuestSpec.parse(self.guest)

    def identity(self) -> GuestIdentity:
        """Return who the guest is: only echo has addresses."""
        addresses = self.link.addresses if self.guest_spec().kind == "echo" else ()
        return GuestIdentity.choose(self.name, self.mac, addresses)


class NetConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A net.toml: one ``[[device]]`` for each device."""

    device: tuple[DeviceSpec, ...] = ()

    def __post_init__(self) -> None:
        """Raise InvalidArgument if two devices want one name or one tap."""
        for key in ("name", "tap"):
            seen: set[str] = set()
            for index, spec in enumerate(self.device):
                value = getattr(spec, key)
                if value in seen:
                    raise InvalidArgument(f"device[{index}].{key}: {value!r} is another's already")
                seen.add(value)


class MemoryStatus(msgspec.Struct, frozen=True, rename="kebab"):
    """A region of guest memory: bytes."""

    name: str
    gpa: int
    size: int


class TrafficStatus(msgspec.Struct, frozen=True, rename="kebab"):
    """Frames and bytes so far as the guest sees them, all pairs together."""

    rx_frames: int
    rx_bytes: int
    tx_frames: int
    tx_bytes: int
    errors: int


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """What a device of the service is.

    `state` is ``running``, ``stopped``, ``suspended`` or ``failed``, `enabled` the pairs that
    take part, `created` whether the tap was made for it, `rings` where each ring stands (none
    where nobody can tell), `ring_errors` how often each was found malformed, both in virtqueue
    order, `guest_error` what ended the guest, if it ended.
    """

    name: str
    state: Literal["running", "stopped", "suspended", "failed"]
    link: bool
    created: bool
    mac: str
    ipv4: str | None
    ipv6: str | None
    mtu: int
    features: tuple[str, ...]
    enabled: tuple[int, ...]
    memory: tuple[MemoryStatus, ...]
    logging: bool
    busyloop: int
    rings: tuple[RingStatus, ...]
    ring_errors: tuple[int, ...]
    guest_error: str | None
    traffic: TrafficStatus
    spec: DeviceSpec
