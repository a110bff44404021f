"""Behaviour that differs between kernels of one series, asked of the device itself.

Distributions backport, so a version says nothing. Each flag is what a device did when it
was probed; cases name the flags that they need, or expect by them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vhostctl.abi import vhost, virtio
from vhostctl.errors import KernelError
from vhostctl.host.vhost import VhostNet

_PLATFORM = 1 << virtio.VIRTIO_F_ACCESS_PLATFORM


@dataclass(frozen=True, slots=True)
class Flags:
    """What the device under test does, where vhost-net devices differ."""

    node: bool
    """It is a device node, so the system calls beside ioctl, read, write and poll work on it."""

    ring_reset: bool
    """VIRTIO_F_RING_RESET is offered (from Linux 6.2)."""

    in_order: bool
    """VIRTIO_F_IN_ORDER is offered (from Linux 6.17)."""

    features_array: bool
    """VHOST_GET_FEATURES_ARRAY is answered (from Linux 6.17)."""

    fork_from_owner: bool
    """VHOST_GET_FORK_FROM_OWNER is answered (from Linux 6.17, and 6.12.48)."""

    platform_toggles: bool
    """SET_FEATURES without ACCESS_PLATFORM leaves IOTLB mode, and either change of the bit
    forgets the addresses of the rings; else the mode stays, and so do the addresses."""


def probe(opener: Callable[[], VhostNet], *, node: bool) -> Flags:
    """Ask a fresh device for its behaviour. Raises KernelError if it cannot be opened or owned."""
    with opener() as device:
        offered = device.get_features()
        device.set_owner()
        return Flags(
            node=node,
            ring_reset=bool(offered >> virtio.VIRTIO_F_RING_RESET & 1),
            in_order=bool(offered >> virtio.VIRTIO_F_IN_ORDER & 1),
            features_array=_answers(device.get_features_array),
            fork_from_owner=_answers(device.get_fork_from_owner),
            platform_toggles=_platform_toggles(device),
        )


def _answers(request: Callable[[], object]) -> bool:
    try:
        request()
    except KernelError:
        return False
    return True


def _platform_toggles(device: VhostNet) -> bool:
    """Leave IOTLB mode and see whether it still takes messages."""
    device.set_features(_PLATFORM)
    device.set_features(0)
    message = vhost.vhost_msg(type=vhost.VHOST_IOTLB_MSG)
    message.iotlb.type = vhost.VHOST_IOTLB_INVALIDATE
    message.iotlb.size = vhost.VHOST_PAGE_SIZE
    return not _answers(lambda: device.write_message(message))
