"""Run inside a lab VM: a guest of `vhostctl vmm`, its console and its QMP socket."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.vmm_guest import Console
from tests.vm.tcp_qemu import ANSWER, BOOT, GUEST
from vhostctl.service.client import ServiceClient

TAP, HOST = "tap0", "192.0.2.1"
QMP, ERRORS = Path("/run/vmm-qmp"), Path("/run/vmm-errors")
VMM = os.environ.get("VHOSTCTL_TEST_VMM", f"{sys.executable} -m vhostctl vmm").split()
"""What `run` and `resume` are given to."""

APPEND = (
    "console=ttyS0 pci=noearly quiet panic=-1 nokaslr mitigations=off tsc=reliable"
    f" vhostctl.ip={GUEST}/24"
)


@dataclass
class Guest:
    """A guest with a shell on its console."""

    process: subprocess.Popen[bytes]
    console: Console
    qmp: ServiceClient

    def counters(self) -> dict[str, int]:
        """Return what Python did so far, once the guest's console is still."""
        before: dict[str, int] = self.qmp.execute("query-counters")
        deadline = time.monotonic() + ANSWER
        while time.monotonic() < deadline:
            time.sleep(0.5)
            after: dict[str, int] = self.qmp.execute("query-counters")
            if after == before:
                return after
            before = after
        raise AssertionError(f"the guest is never still: {before}")

    def end(self) -> int:
        """Return the exit status, which must come."""
        return self.process.wait(ANSWER)


def make_tap(queues: int) -> None:
    """Make a tap that stays, with the host's address on it."""
    more = ["multi_queue"] if queues > 1 else []
    for argv in (
        ["tuntap", "add", TAP, "mode", "tap", "vnet_hdr", *more],
        ["addr", "add", f"{HOST}/24", "dev", TAP],
        ["link", "set", TAP, "up"],
    ):
        subprocess.run(["ip", *argv], check=True)


def run_command(arguments: argparse.Namespace) -> list[str]:
    """Return the command that boots the guest."""
    command = [*VMM, "run", "--kernel", str(arguments.kernel), "--initrd", str(arguments.initrd)]
    command += ["--cpus", str(arguments.cpus), "--memory", str(arguments.memory)]
    command += ["--queues", str(arguments.queues)]
    command += ["--append", APPEND]
    return [*command, *_either(arguments)]


def resume_command(arguments: argparse.Namespace, directory: Path) -> list[str]:
    """Return the command that goes on with the guest that is in a directory."""
    return [*VMM, "resume", str(directory), *_either(arguments)]


def _either(arguments: argparse.Namespace) -> list[str]:
    words = ["--tap", TAP, "--device", arguments.device, "--qmp", str(QMP)]
    return words + [f"--no-{name}" for name in arguments.without]


@contextmanager
def started(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Console]]:
    """Run a guest for the length of the block; say all that it said if that fails."""
    with ERRORS.open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0
        )
    assert process.stdin is not None
    assert process.stdout is not None
    console = Console(process.stdout.fileno(), process.stdin.fileno())
    try:
        with console:
            try:
                yield process, console
            finally:
                process.kill()
    except BaseException:
        print("console:", console.text, "stderr:", ERRORS.read_text(), sep="\n", file=sys.stderr)
        raise
    finally:
        process.wait()
        process.stdin.close()
        process.stdout.close()


@contextmanager
def booted(arguments: argparse.Namespace) -> Iterator[Guest]:
    """Boot the guest to its shell."""
    with started(run_command(arguments)) as (process, console):
        console.log_in(BOOT)
        with ServiceClient(QMP) as qmp:
            yield Guest(process, console, qmp)


@contextmanager
def resumed(arguments: argparse.Namespace, directory: Path) -> Iterator[Guest]:
    """Go on with a guest, at its shell."""
    with started(resume_command(arguments, directory)) as (process, console):
        until(lambda: QMP.exists() or process.poll() is not None, "the socket")
        console.write("\n")
        console.log_in(ANSWER)
        with ServiceClient(QMP) as qmp:
            yield Guest(process, console, qmp)


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for something."""
    deadline = time.monotonic() + ANSWER
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {ANSWER} s: {what}")
        time.sleep(0.2)
