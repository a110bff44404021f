"""The selftest, in every combination of features, sizes and pairs."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.processes import ended
from tests.system.conftest import until
from vhostctl.abi import virtio
from vhostctl.cli.exitcodes import ExitCode
from vhostctl.control.features import Policy
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import CheckFailed, NegotiationError
from vhostctl.guest.streams import Stream
from vhostctl.jobs import hosttraffic
from vhostctl.jobs.hosttraffic import HostSockets
from vhostctl.jobs.selftest import raise_for, selftest

pytestmark = pytest.mark.usefixtures("nothing_left")

FRAMES = 2000
FEATURES = {
    "mrg": virtio.VIRTIO_NET_F_MRG_RXBUF,
    "event": virtio.VIRTIO_RING_F_EVENT_IDX,
    "indirect": virtio.VIRTIO_RING_F_INDIRECT_DESC,
}
COMBINATIONS = [
    pytest.param(queues, size, choices, id=f"{queues}x{size}-" + ("+".join(on) or "none"))
    for queues, size, choices in itertools.product(
        (1, 4), (64, 256, 1024), itertools.product((True, False), repeat=len(FEATURES))
    )
    for on in [[name for name, choice in zip(FEATURES, choices, strict=True) if choice]]
]


@pytest.mark.parametrize(("queues", "size", "choices"), COMBINATIONS)
def test_every_frame_is_accounted_for(
    device: str, queues: int, size: int, choices: tuple[bool, ...]
) -> None:
    policy = Policy.of(zip(FEATURES.values(), choices, strict=True))
    config = SessionConfig(device=device, queues=queues, queue_size=size, policy=policy)
    report = selftest(config, FRAMES)
    assert report.problems == []
    assert (report.to_guest.frames, report.to_host.frames) == (FRAMES, FRAMES)
    assert report.to_guest.bytes == report.to_host.bytes > FRAMES
    assert report.arp >= 1
    assert report.neighbour >= 1
    for bit, choice in zip(FEATURES.values(), choices, strict=True):
        assert (virtio.FEATURE_NAMES[bit] in report.features) is choice


def test_a_long_run_in_the_default_combination(device: str) -> None:
    report = selftest(SessionConfig(device=device), 100_000)
    assert report.problems == []
    assert (report.to_guest.frames, report.to_host.frames) == (100_000, 100_000)
    assert report.kicks + report.calls < 200_000  # notifications are suppressed, not one each


def test_a_changed_datagram_is_seen(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Stream.payload

    def forged(stream: Stream, k: int) -> bytes:
        payload = honest(stream, k)
        return payload[:-1] + bytes([payload[-1] ^ 1]) if k == 100 else payload

    monkeypatch.setattr(Stream, "payload", forged)
    report = selftest(SessionConfig(device=device), 200)
    assert report.problems == [
        "1 datagrams changed to the guest",
        "1 datagrams changed to the host",
    ]
    with pytest.raises(CheckFailed, match="1 datagrams changed"):
        raise_for(report)


class Lossy:
    """A socket that swallows its 40th datagram."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._count = 0

    def send(self, data: bytes) -> int:
        self._count += 1
        return len(data) if self._count == 40 else self._socket.send(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def test_a_lost_datagram_is_seen(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vhostctl.jobs.traffic.PATIENCE", 2)
    honest = HostSockets.sender
    monkeypatch.setattr(
        HostSockets, "sender", lambda *args: Lossy(honest(*args)) if args[1] == 4 else honest(*args)
    )
    report = selftest(SessionConfig(device=device), 200)
    # Every second datagram is IPv4, and steering took the first one of its socket.
    window = -(-2 * 39 // hosttraffic.WINDOW) * hosttraffic.WINDOW
    assert report.problems == [
        "1 datagrams lost to the guest",
        f"{200 - window} datagrams not sent to the guest",
        f"{200 - window} datagrams not sent to the host",
    ]


def test_a_required_feature_that_is_missing_is_named(device: str) -> None:
    policy = Policy.of([(virtio.VIRTIO_NET_F_MAC, True)])
    with pytest.raises(NegotiationError, match="VIRTIO_NET_F_MAC"):
        selftest(SessionConfig(device=device, policy=policy), 1)


def test_the_command_prints_a_document(device: str) -> None:
    command = [sys.executable, "-m", "vhostctl", "selftest", "--device", device]
    run = subprocess.run(
        [*command, "--frames", "100", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == ExitCode.OK, run.stderr
    document = json.loads(run.stdout)
    assert document["schema"] == "vhostctl.selftest/1"
    assert document["to_guest"]["frames"] == document["to_host"]["frames"] == 100


def sockets(pid: int) -> int:
    """How many the process has: netlink first, then those of ping, then those of the streams."""
    found = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found += "socket:" in str(descriptor.readlink())
    return found


def test_an_interrupt_during_traffic_is_clean(device: str) -> None:
    command = [sys.executable, "-m", "vhostctl", "selftest", "--device", device]
    process = subprocess.Popen(
        [*command, "--frames", "10000000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with ended(process):
        until(lambda: sockets(process.pid) >= 6, "traffic")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in error) == (ExitCode.INTERRUPTED, False), error
