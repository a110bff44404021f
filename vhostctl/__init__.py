"""QEMU's role for the Linux kernel's vhost-net, as a library.

The names below are the library's face; they are imported when they are first used, for
the command line starts inside emulated machines where every import is paid for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vhostctl.control.features import Policy
    from vhostctl.control.session import Session
    from vhostctl.control.wiring import SessionConfig
    from vhostctl.errors import KernelError, VhostctlError
    from vhostctl.guest.driver import NetDriver
    from vhostctl.host.memory import GuestMemory
    from vhostctl.host.netns import NetNamespace
    from vhostctl.host.tap import Tap
    from vhostctl.host.vhost import VhostNet

__all__ = [
    "GuestMemory",
    "KernelError",
    "NetDriver",
    "NetNamespace",
    "Policy",
    "Session",
    "SessionConfig",
    "Tap",
    "VhostNet",
    "VhostctlError",
]

_HOMES = {
    "GuestMemory": "host.memory",
    "KernelError": "errors",
    "NetDriver": "guest.driver",
    "NetNamespace": "host.netns",
    "Policy": "control.features",
    "Session": "control.session",
    "SessionConfig": "control.wiring",
    "Tap": "host.tap",
    "VhostNet": "host.vhost",
    "VhostctlError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"vhostctl.{_HOMES[name]}"), name)
