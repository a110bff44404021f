"""`vhostctl run`: what the command gets, and what a refused tap says."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest

from tests.system.conftest import until
from vhostctl.abi import tun
from vhostctl.cli.exitcodes import ExitCode, exit_code
from vhostctl.control.netsetup import LinkSettings
from vhostctl.errors import VhostctlError
from vhostctl.host.ioctl import call
from vhostctl.host.links import exists
from vhostctl.host.netns import NetNamespace
from vhostctl.host.node import DeviceNode
from vhostctl.host.tap import TUN_PATH, Tap
from vhostctl.host.vhost import DEFAULT_PATH
from vhostctl.jobs.run import run as run_job

CHILD = """
import os, sys
from vhostctl.host.handle import Handle
from vhostctl.host.ioctl import ioctl
from vhostctl.host.vhost import VhostNet

class Passed(Handle):
    def ioctl(self, request, argument):
        return ioctl(self.fileno(), request, argument)

fds = [int(fd) for fd in sys.argv[2].split(":")]
for fd in fds:
    VhostNet(Passed(fd, "passed")).set_owner()
print(sys.argv[1] == os.environ["TAPFDS"], len(fds))
"""


def vhostctl(namespace: NetNamespace, *args: str) -> subprocess.CompletedProcess[str]:
    return namespace.run(
        lambda: subprocess.run(
            [sys.executable, "-m", "vhostctl", *args],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    )


def test_the_devices_come_without_an_owner(namespace: NetNamespace) -> None:
    command = [sys.executable, "-c", CHILD, "{tapfds}", "{vhostfds}"]
    run = vhostctl(namespace, "run", "--tap", "tap0", "--queues", "2", "--", *command)
    assert run.stdout.split() == ["True", "2"], run.stderr
    until(lambda: not namespace.run(lambda: exists("tap0")), "the tap is gone")


def test_another_user_gets_the_descriptors_and_no_privileges(namespace: NetNamespace) -> None:
    script = "id -u; grep CapEff /proc/self/status; cd /proc/self/fd; readlink {tapfds} {vhostfds}"
    options = ["--tap", "tap0", "--user", "65534", "--addr", "192.0.2.1/24"]
    run = vhostctl(namespace, "run", *options, "--", "/bin/sh", "-c", script)
    assert run.stdout.split() == [
        "65534",
        "CapEff:",
        "0000000000000000",
        "/dev/net/tun",
        "/dev/vhost-net",
    ], run.stderr


def test_the_exit_status_is_the_commands(namespace: NetNamespace) -> None:
    assert vhostctl(namespace, "run", "--tap", "tap0", "--", "sh", "-c", "exit 7").returncode == 7


def test_a_command_that_is_missing_leaves_no_tap(namespace: NetNamespace) -> None:
    run = vhostctl(namespace, "run", "--tap", "tap0", "--", "/nowhere/program")
    assert run.returncode == ExitCode.MISSING
    assert "exec on /nowhere/program" in run.stderr
    assert not namespace.run(lambda: exists("tap0"))


def persistent(name: str, flags: int) -> None:
    with DeviceNode(TUN_PATH) as node:
        call(node, tun.TUNSETIFF, tun.ifreq(ifr_name=name.encode(), ifr_flags=flags))
        call(node, tun.TUNSETPERSIST, 1)


@pytest.mark.usefixtures("nothing_left")
def test_a_tap_that_cannot_serve_is_refused_with_the_remedy(namespace: NetNamespace) -> None:
    plain = tun.IFF_TAP | tun.IFF_NO_PI
    namespace.run(lambda: persistent("bare", plain))
    namespace.run(lambda: persistent("single", plain | tun.IFF_VNET_HDR))
    nothing = LinkSettings()
    for tap, queues, device, settings, code, text in (
        (
            "bare",
            1,
            DEFAULT_PATH,
            nothing,
            ExitCode.USAGE,
            "tap bare has no vnet_hdr; make it anew",
        ),
        ("single", 2, DEFAULT_PATH, nothing, ExitCode.USAGE, "has a single queue, 2 were asked"),
        ("lo", 1, DEFAULT_PATH, nothing, ExitCode.USAGE, "the name belongs to another link"),
        ("single", 1, DEFAULT_PATH, LinkSettings(mtu=1400), ExitCode.USAGE, "tap single exists"),
        ("new", 1, "/nowhere", nothing, ExitCode.MISSING, "/nowhere: No such file"),
        ("new", 1, DEFAULT_PATH, LinkSettings(bridge="br9"), ExitCode.MISSING, "br9"),
    ):
        with pytest.raises(VhostctlError, match=text) as caught:
            namespace.run(
                partial(
                    run_job,
                    ["true"],
                    tap=tap,
                    device=device,
                    queues=queues,
                    settings=settings,
                    user=None,
                )
            )
        assert exit_code(caught.value) is code
    assert not namespace.run(lambda: exists("new"))


@pytest.mark.usefixtures("nothing_left")
def test_a_tap_in_use_is_refused(namespace: NetNamespace) -> None:
    with (
        namespace.run(lambda: Tap.open("tap0")),
        pytest.raises(OSError, match="somebody has the tap open"),
    ):
        namespace.run(lambda: Tap.open("tap0"))


@pytest.mark.usefixtures("nothing_left")
def test_the_queues_of_a_tap_are_limited(namespace: NetNamespace) -> None:
    with pytest.raises(ValueError, match="1 to 256"):
        namespace.run(lambda: Tap.open("tap0", 257))
    assert not namespace.run(lambda: exists("tap0"))
