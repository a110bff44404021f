"""What a virtio network device is given, and what of it outlives its process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from vhostctl.control.features import Policy
from vhostctl.control.netsetup import parse_mac
from vhostctl.control.rings import check_size
from vhostctl.control.snapshot import Snapshot
from vhostctl.errors import InvalidArgument
from vhostctl.vmm.netcommands import MAC_SIZE
from vhostctl.vmm.registers import U16

_ANY_MAC = "02:00:00:00:00:00"
MTU_MIN, MTU_MAX = 68, 65535  # virtio 1.2, 5.1.4.1


class NetState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a network device is besides its rings: see `NetDevice.save`.

    `tap_offer` is the feature bits that the tap offers: it is not asked again, for that would
    disturb what is in it. `session` is the document of control/snapshot.py, and `control` where
    the control queue's avail ring is read next; None while the driver has not started the device.
    `features` is what the driver is offered, `pairs` how many the device has; `mtu` and
    `queue_size` are those of `NetConfig`.
    """

    mac: Annotated[bytes, msgspec.Meta(min_length=MAC_SIZE, max_length=MAC_SIZE)]
    link: bool
    announcing: bool
    wanted_pairs: U16
    tap_offer: int
    session: Snapshot | None
    control: U16 | None
    features: int
    pairs: int
    queue_size: int
    mtu: int | None

    @property
    def config(self) -> NetConfig:
        """What the guest saw, but for `mac`: it may have chosen one that nobody should have.

        Raises InvalidArgument.
        """
        return NetConfig(_ANY_MAC, self.mtu, self.queue_size)


@dataclass(frozen=True, slots=True)
class NetConfig:
    """What the guest is to see: `mac` in hexadecimal with colons, `mtu` in bytes or None.

    `queue_size` is the most descriptors of a ring.
    """

    mac: str
    mtu: int | None = None
    queue_size: int = 256
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        """Raise InvalidArgument for a MAC address, MTU or size of rings that no driver takes."""
        parse_mac(self.mac)
        check_size(self.queue_size)
        if self.mtu is not None and not MTU_MIN <= self.mtu <= MTU_MAX:
            raise InvalidArgument(f"MTU {self.mtu}", hint=f"use {MTU_MIN} to {MTU_MAX} bytes")
