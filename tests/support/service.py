"""A service in a namespace of its own, and what it leaves there."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vhostctl.cli.exitcodes import ExitCode
from vhostctl.errors import EnvironmentMissing
from vhostctl.host.netns import NetNamespace
from vhostctl.service.client import ServiceClient

VHOSTCTL = [sys.executable, "-m", "vhostctl"]
READY = 60.0  # seconds, for an emulated machine
ADDRESS = "192.0.2.1/24"


@dataclass
class Place:
    """Where a service is to run: a namespace and a state directory."""

    namespace: NetNamespace
    state: Path
    device: str

    @property
    def socket(self) -> Path:
        return self.state / "qmp.sock"

    def spawn(self, *args: str | Path) -> subprocess.Popen[str]:
        return self.namespace.run(
            lambda: subprocess.Popen(
                [*VHOSTCTL, *map(str, args), "--state", str(self.state)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )

    def run(self, *args: str | Path, status: ExitCode = ExitCode.OK) -> str:
        """Run a command to its end; return its stdout, or stderr if it failed."""
        out, error = (process := self.spawn(*args)).communicate(timeout=2 * READY)
        assert process.returncode == status, (out, error)
        return error if status else out

    @contextmanager
    def service(self, *args: str | Path) -> Iterator[subprocess.Popen[str]]:
        process = self.spawn("service", *args)
        try:
            self.client(process).close()
            yield process
        finally:
            process.kill()
            process.communicate(timeout=READY)

    def client(self, process: subprocess.Popen[str]) -> ServiceClient:
        """Return a connection to a service that is coming up."""
        deadline = time.monotonic() + READY
        while True:
            try:
                return ServiceClient(self.socket)
            except EnvironmentMissing:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.005)

    def add(self, client: ServiceClient, name: str, tap: str, **more: object) -> bool:
        changed: bool = client.execute(
            "device-add", name=name, tap=tap, device=self.device, **more
        )["changed"]
        return changed

    def links(self) -> set[str]:
        return self.namespace.run(lambda: {name for _, name in socket.if_nameindex()})

    def files(self) -> set[str]:
        return {file.name for file in self.state.iterdir()}


def ended(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=READY)
    assert process.returncode == ExitCode.OK, error
    assert "Traceback" not in error
    return error
