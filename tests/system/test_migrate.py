"""`vhostctl migrate` on --device, and what is left when somebody ends it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ended
from tests.system.conftest import until
from vhostctl.cli.exitcodes import ExitCode
from vhostctl.control.snapshot import Snapshot
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import CheckFailed
from vhostctl.host.vhost import ENGINE
from vhostctl.jobs.migrant import Migrant
from vhostctl.jobs.migrate import migrate

MIGRANT = "vhostctl.jobs.migrant"


MINE = f"VHOSTCTL_TEST_MIGRATE={os.getpid()}"
"""In the environment of what these tests start: others migrate at the same time."""


def migrants() -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            its = (process / "environ").read_bytes().split(b"\0")
            if MINE.encode() in its and MIGRANT.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue  # it ended meanwhile
    return found


@pytest.fixture(autouse=True)
def no_process_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(*MINE.split("="))
    yield
    until(lambda: not migrants(), "the other processes ended")


def command(device: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "vhostctl", "migrate", device, ENGINE, device, *more]


def test_the_command_prints_a_document(device: str) -> None:
    run = subprocess.run(
        command(device, "--frames", "100", "--queues", "2", "--json"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == ExitCode.OK, run.stderr
    document = json.loads(run.stdout)
    assert document["schema"] == "vhostctl.migrate/1"
    assert [(hop["source"], hop["target"]) for hop in document["hops"]] == [
        (device, ENGINE),
        (ENGINE, device),
    ]
    for hop in document["hops"]:
        assert hop["down_ms"] > 0
        assert hop["undelivered"] == 0
        assert len(hop["bases"]) == 4
    assert document["to_guest"]["lost"] == document["to_host"]["lost"] == 0
    assert document["to_guest"]["sent"] == document["to_host"]["sent"] >= 300
    assert document["problems"] == []


@pytest.mark.usefixtures("nothing_left")
def test_a_device_that_is_not_there_is_named_and_ends_it(device: str) -> None:
    with pytest.raises(CheckFailed, match=r"process for /dev/nowhere: open on /dev/nowhere"):
        migrate(SessionConfig(), [device, "/dev/nowhere"], 10)


def test_a_datagram_that_is_lost_is_in_the_report(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)

    class Lossy(socket.socket):
        """Swallows one datagram in the middle."""

        sent = 0

        def send(self, data: bytes, flags: int = 0) -> int:  # type: ignore[override]
            Lossy.sent += 1
            return len(data) if Lossy.sent == 300 else super().send(data, flags)

    monkeypatch.setattr("vhostctl.jobs.hosttraffic.socket.socket", Lossy)
    report = migrate(SessionConfig(device=device), [device, ENGINE], 1 << 20)
    assert "1 datagrams lost to the guest" in report.problems
    assert "1 moves not made" in report.problems


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("traffic", "hosttraffic"):
        monkeypatch.setattr(f"vhostctl.jobs.{module}.PATIENCE", 2)


def test_a_process_that_dies_is_named(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    start = Migrant.start

    def shot(migrant: Migrant, snapshot: Snapshot) -> int:
        migrant._process.kill()
        migrant._process.wait()
        return start(migrant, snapshot)

    monkeypatch.setattr(Migrant, "start", shot)
    with pytest.raises(CheckFailed, match="process for engine"):
        migrate(SessionConfig(device=device), [device, ENGINE], 100)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.soak),
        pytest.param(signal.SIGKILL, marks=pytest.mark.soak),
    ],
)
def test_who_ends_it_ends_the_other_processes(device: str, number: signal.Signals) -> None:
    endless = [ENGINE, device] * 50
    moving = subprocess.Popen(
        command(device, *endless),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    with ended(moving):
        until(lambda: bool(migrants()), "a move began", 120)
        # As a terminal does it: to the whole group.
        os.killpg(moving.pid, number) if number == signal.SIGINT else moving.send_signal(number)
        _, errors = moving.communicate(timeout=120)
    codes = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}
    assert moving.returncode == codes.get(number, -number), errors.decode()
    assert b"Traceback" not in errors
