"""Run inside a lab VM: a guest of `vhostctl vmm`, its console and its QMP socket."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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

# Its self-tests of ciphers take a kernel half of its boot under an emulator.
APPEND = (
    "console=ttyS0 pci=noearly quiet panic=-1 nokaslr mitigations=off tsc=reliable"
    f" cryptomgr.notests vhostctl.ip={GUEST}/24"
)


@dataclass
class Guest:
    """A guest with a shell on its console."""

    process: subprocess.Popen[bytes]
    console: Console
    qmp: ServiceClient

    def counters(self) -> dict[str, int]:
        """Return what Python did so far, once the guest's console is still.

        Its port is: what else is counted may go on, for a conversation say.
        """
        before: dict[str, int] = self.qmp.execute("query-counters")
        deadline = time.monotonic() + ANSWER
        while time.monotonic() < deadline:
            time.sleep(0.5)
            after: dict[str, int] = self.qmp.execute("query-counters")
            if after["port-exits"] == before["port-exits"]:
                return after
            before = after
        raise AssertionError(f"the guest is never still: {before}")

    def vhost_nodes(self) -> list[str]:
        """Return the vhost device that it has open for each pair; the engine has no node."""
        links = [entry.readlink() for entry in Path(f"/proc/{self.process.pid}/fd").iterdir()]
        return [str(link) for link in links if link.name.startswith("vhost-net")]

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


def run_command(arguments: argparse.Namespace, append: str = "") -> list[str]:
    """Return the command that boots the guest; `append` is for the end of its kernel's line."""
    command = [*VMM, "run", "--kernel", str(arguments.kernel), "--initrd", str(arguments.initrd)]
    command += ["--cpus", str(arguments.cpus), "--memory", str(arguments.memory)]
    command += ["--queues", str(arguments.queues)]
    command += ["--append", f"{APPEND} {append}"]
    command += [f"--no-{name}" for name in arguments.without]
    return [*command, *_either(arguments)]


def resume_command(
    arguments: argparse.Namespace, directory: Path, options: Sequence[str]
) -> list[str]:
    """Return the command that goes on with the guest that is in a directory."""
    return [*VMM, "resume", str(directory), *_either(arguments), *options]


def _either(arguments: argparse.Namespace) -> list[str]:
    return ["--tap", TAP, "--device", arguments.device, "--qmp", str(QMP)]


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
def booted(arguments: argparse.Namespace, append: str = "") -> Iterator[Guest]:
    """Boot the guest to its shell."""
    with started(run_command(arguments, append)) as (process, console):
        console.log_in(BOOT)
        with ServiceClient(QMP) as qmp:
            yield Guest(process, console, qmp)


@contextmanager
def resumed(
    arguments: argparse.Namespace, directory: Path, options: Sequence[str]
) -> Iterator[Guest]:
    """Go on with a guest, at its shell."""
    with started(resume_command(arguments, directory, options)) as (process, console):
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
