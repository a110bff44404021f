"""What a missing device or permission says: one line with the remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vhostctl.cli.exitcodes import ExitCode, exit_code
from vhostctl.errors import KernelError
from vhostctl.host import tap
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import VhostNet

pytestmark = pytest.mark.usefixtures("nothing_left")


@contextmanager
def nobody() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_user_without_permission_is_told_what_to_do() -> None:
    with nobody():
        with pytest.raises(
            PermissionError, match=r"open on /dev/vhost-net: .*EACCES.*group"
        ) as node:
            VhostNet.open()
        with pytest.raises(PermissionError, match=r"unshare .*CAP_SYS_ADMIN"):
            NetNamespace()
    assert isinstance(node.value, KernelError)
    assert exit_code(node.value) is ExitCode.MISSING


def test_without_tun_the_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = "/dev/net/tun.hidden"
    os.rename("/dev/net/tun", hidden)  # noqa: PTH104
    try:
        with pytest.raises(FileNotFoundError, match=r"/dev/net/tun.*modprobe tun"):
            Tap.open("tap0")
    finally:
        os.rename(hidden, "/dev/net/tun")  # noqa: PTH104
    monkeypatch.setattr(tap, "TUN_PATH", "/dev/null")
    with pytest.raises(OSError, match=r"TUNSETIFF on tap0 queue 0: .*ENOTTY"):
        Tap.open("tap0")


def test_a_node_that_is_no_vhost_device_is_named() -> None:
    with (
        VhostNet.open("/dev/null") as device,
        pytest.raises(OSError, match=r"VHOST_SET_OWNER on /dev/null: .*no vhost device"),
    ):
        device.set_owner()
