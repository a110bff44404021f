"""QEMU's role for the Linux kernel's vhost-net, as a library.

The names below are the library's face; they are imported when they are first used, for
the command line starts inside emulated machines where every import is paid for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vhostctl.control.addressspace import AddressSpace
    from vhostctl.control.features import NegotiationResult, Policy, negotiate
    from vhostctl.control.session import Session
    from vhostctl.control.snapshot import Snapshot
    from vhostctl.control.wiring import SessionConfig
    from vhostctl.errors import KernelError, VhostctlError
    from vhostctl.guest.driver import NetDriver
    from vhostctl.host.memory import GuestMemory, MappedRegion
    from vhostctl.host.netns import NetNamespace
    from vhostctl.host.tap import Tap
    from vhostctl.host.vhost import VhostNet

__all__ = [
    "AddressSpace",
    "GuestMemory",
    "KernelError",
    "MappedRegion",
    "NegotiationResult",
    "NetDriver",
    "NetNamespace",
    "Policy",
    "Session",
    "SessionConfig",
    "Snapshot",
    "Tap",
    "VhostNet",
    "VhostctlError",
    "negotiate",
]

_HOMES = {
    "AddressSpace": "control.addressspace",
    "GuestMemory": "host.memory",
    "KernelError": "errors",
    "MappedRegion": "host.memory",
    "NegotiationResult": "control.features",
    "NetDriver": "guest.driver",
    "NetNamespace": "host.netns",
    "Policy": "control.features",
    "Session": "control.session",
    "SessionConfig": "control.wiring",
    "Snapshot": "control.snapshot",
    "Tap": "host.tap",
    "VhostNet": "host.vhost",
    "VhostctlError": "errors",
    "negotiate": "control.features",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"vhostctl.{_HOMES[name]}"), name)
