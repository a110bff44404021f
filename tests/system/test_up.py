"""`vhostctl up`: every kind of guest, what is kept and what is removed."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.conftest import until
from vhostctl.abi import tun
from vhostctl.cli.exitcodes import ExitCode
from vhostctl.host.ioctl import call
from vhostctl.host.links import Links, LinkState, exists
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap
from vhostctl.jobs.hosttraffic import HostSockets

VHOSTCTL = [sys.executable, "-m", "vhostctl"]


@contextmanager
def up(namespace: NetNamespace, *args: str) -> Iterator[subprocess.Popen[str]]:
    process = namespace.run(
        lambda: subprocess.Popen(
            [*VHOSTCTL, "up", "demo", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "demo: tap0 is up" in line, process.communicate(timeout=60)
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def ended(process: subprocess.Popen[str], how: int = signal.SIGTERM) -> str:
    process.send_signal(how)
    out, error = process.communicate(timeout=60)
    assert process.returncode == ExitCode.OK, error
    return out


def state(namespace: NetNamespace, name: str) -> LinkState:
    def look() -> LinkState:
        with Links() as links:
            return links.state(name)

    return namespace.run(look)


def test_echo_answers_and_the_tap_goes(namespace: NetNamespace) -> None:
    addresses = ("--addr", "192.0.2.1/24", "--addr", "2001:db8::1/64")
    with up(namespace, "--tap", "tap0", "--queues", "2", *addresses) as process:
        host = HostSockets(namespace.run)
        assert host.ping(4, "192.0.2.2", [0, 56, 1400]) == 3
        assert host.ping(6, "2001:db8::2", [0, 56, 1400]) == 3
        with host.sender(4, "192.0.2.2", 4000) as sock:
            sock.send(b"anybody there?")
            assert sock.recv(100) == b"anybody there?"
        out = ended(process)
    assert "0 errors" in out
    assert not namespace.run(lambda: exists("tap0"))


@dataclass(frozen=True)
class Kept:
    """What of a tap must be as it was."""

    link: LinkState
    addresses: frozenset[str]
    header: int

    @classmethod
    def of(cls, namespace: NetNamespace, name: str) -> Kept:
        def addresses() -> frozenset[str]:
            from pyroute2 import IPRoute

            index = socket.if_nametoindex(name)
            with IPRoute() as route:
                return frozenset(a.get_attr("IFA_ADDRESS") for a in route.get_addr(index=index))

        with namespace.run(lambda: Tap.open(name)) as tap:
            header = tap.queues[0].vnet_hdr_size()
        return cls(state(namespace, name), namespace.run(addresses), header)


def persistent_tap(namespace: NetNamespace, name: str, mtu: int = 1300) -> None:
    with namespace.run(lambda: Tap.open(name)) as tap:
        call(tap.queues[0], tun.TUNSETPERSIST, 1)

    def configure() -> None:
        with Links() as links:
            links.change(name, mtu=mtu)
            links.add_address(name, "198.51.100.1/24")

    namespace.run(configure)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_existing_tap_is_left_as_it_was(namespace: NetNamespace, how: int) -> None:
    persistent_tap(namespace, "tap0")
    before = Kept.of(namespace, "tap0")
    assert (before.link.up, before.header) == (False, 10)
    addresses = ["--addr", "192.0.2.1/24", "--addr", "198.51.100.1/24"]
    with up(namespace, "--tap", "tap0", "--mtu", "1400", *addresses) as process:
        during = state(namespace, "tap0")
        assert during.up
        assert during.mtu == 1400
        assert HostSockets(namespace.run).ping(4, "192.0.2.2", [1300]) == 1
        process.send_signal(how)
        ended(process, how)
    assert Kept.of(namespace, "tap0") == before


def test_the_guest_takes_frames_as_long_as_the_taps(namespace: NetNamespace) -> None:
    persistent_tap(namespace, "tap0", mtu=9000)
    with up(namespace, "--tap", "tap0", "--addr", "192.0.2.1/24") as process:
        assert HostSockets(namespace.run).ping(4, "192.0.2.2", [8972]) == 1
        ended(process)


def test_sink_counts_what_it_drops(namespace: NetNamespace) -> None:
    with up(namespace, "--tap", "tap0", "--guest", "sink") as process:
        send_raw(namespace, "tap0", [b"\xff" * 6 + bytes(54)] * 50)
        until(lambda: counters(namespace, "tap0") >= 50, "50 frames through the tap")
        out = ended(process)
    received = int(out.split("received ")[1].split()[0])
    assert received >= 50


def test_pcap_records_frames_whole(namespace: NetNamespace, tmp_path: Path) -> None:
    file = tmp_path / "capture.pcap"
    frames = [bytes([n]) * 6 + bytes(8) + bytes(range(n + 50)) for n in range(2, 100, 2)]
    with up(namespace, "--tap", "tap0", "--guest", f"pcap:{file}") as process:
        send_raw(namespace, "tap0", frames)
        until(lambda: counters(namespace, "tap0") >= len(frames), "frames through the tap")
        ended(process)
    recorded = list(read_pcap(file.read_bytes()))
    assert [frame for frame in recorded if frame in frames] == frames


def test_forward_joins_the_tap_to_another_link(namespace: NetNamespace) -> None:
    with NetNamespace() as other:
        link_namespaces(namespace, other)
        addresses = ("--addr", "192.0.2.1/24")
        with up(namespace, "--tap", "tap0", "--guest", "forward:left", *addresses) as process:
            near, far = HostSockets(namespace.run), HostSockets(other.run)
            assert near.ping(4, "192.0.2.7", [0, 56, 1400]) == 3
            # A veth leaves checksums to hardware that is not there: the guest completes them.
            with (
                far.receiver(4, "192.0.2.7", 4000) as there,
                near.sender(4, "192.0.2.7", 4000) as here,
            ):
                here.send(b"there")
                data, address = there.recvfrom(100)
                there.sendto(data + b" and back", address)
                assert here.recv(100) == b"there and back"
            assert "0 errors" in ended(process)


def test_a_bridge_takes_the_tap_in(namespace: NetNamespace) -> None:
    make_bridge(namespace)
    bridge = state(namespace, "br0")
    with up(namespace, "--tap", "tap0", "--bridge", "br0") as process:
        assert state(namespace, "tap0").master == bridge.index
        ended(process)


@pytest.mark.parametrize(
    "quarters",
    [0, 2, 8, *(pytest.param(later, marks=pytest.mark.soak) for later in (1, 4, 16, 24))],
)
def test_an_interrupt_at_any_moment_leaves_the_tap(namespace: NetNamespace, quarters: int) -> None:
    persistent_tap(namespace, "tap0")
    before = Kept.of(namespace, "tap0")
    process = namespace.run(
        lambda: subprocess.Popen(
            [*VHOSTCTL, "up", "demo", "--tap", "tap0", "--addr", "192.0.2.1/24", "--mtu", "1400"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    proc = Path(f"/proc/{process.pid}")
    until(lambda: b"demo" in (proc / "cmdline").read_bytes(), "it is no fork of this process")
    until(lambda: "_native" in (proc / "maps").read_text(), "vhostctl runs, not only Python")
    with suppress(subprocess.TimeoutExpired):
        process.wait(quarters / 4)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    # An interrupt inside exec() of a string (a dataclass being made, at import) is remembered by
    # CPython, which then ends by the signal itself; a shell calls that 130 as well.
    assert process.returncode in (ExitCode.OK, ExitCode.INTERRUPTED, -signal.SIGINT), error
    assert "Traceback" not in error
    assert Kept.of(namespace, "tap0") == before


def send_raw(namespace: NetNamespace, link: str, frames: list[bytes]) -> None:
    with namespace.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)) as sock:
        sock.bind((link, 0))
        for frame in frames:
            sock.send(frame)


def counters(namespace: NetNamespace, link: str) -> int:
    def look() -> int:
        with Links() as links:
            return links.counters(link).tx_packets

    return namespace.run(look)


def read_pcap(data: bytes) -> Iterator[bytes]:
    magic, major, minor, _, _, _, linktype = struct.unpack_from("=IHHiIII", data)
    assert (magic, major, minor, linktype) == (0xA1B23C4D, 2, 4, 1)
    position = 24
    while position < len(data):
        _, _, captured, length = struct.unpack_from("=IIII", data, position)
        assert captured == length
        yield data[position + 16 : position + 16 + captured]
        position += 16 + captured


def make_bridge(namespace: NetNamespace) -> None:
    def make() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            route.link("add", ifname="br0", kind="bridge")

    namespace.run(make)


def link_namespaces(near: NetNamespace, far: NetNamespace) -> None:
    """A veth pair: `left` in the one, `right` with an address in the other."""

    def make() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route, open(fd_path, "rb") as target:
            route.link("add", ifname="left", kind="veth", peer="right")
            (right,) = route.link_lookup(ifname="right")
            route.link("set", index=right, net_ns_fd=target.fileno())
            (left,) = route.link_lookup(ifname="left")
            route.link("set", index=left, state="up")

    def address() -> None:
        with Links() as links:
            links.change("right", state="up")
            links.add_address("right", "192.0.2.7/24")

    fd = far.open()
    fd_path = f"/proc/self/fd/{fd}"
    try:
        near.run(make)
    finally:
        os.close(fd)
    far.run(address)
