"""The kernel's packet generator: one thread that sends into a link of a namespace.

Documentation/networking/pktgen.rst of the kernel describes the commands. Its files belong
to the namespace of the thread that opens them.
"""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Self

from vhostctl.errors import EnvironmentMissing, kernel_error
from vhostctl.host.closing import Closing
from vhostctl.host.netns import NetNamespace

_FILES = Path("/proc/thread-self/net/pktgen")
_THREAD = "kpktgend_0"


def generator_threads() -> set[int]:
    """Return the thread numbers of the first generator of every namespace."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            name = path.read_text().strip()
        except OSError:
            continue  # the process ended after it was listed
        if name == _THREAD:
            found.add(int(path.parent.name))
    return found


class PacketGenerator(Closing):
    """Sends UDP frames of `size` bytes to `mac` through `link`, from entry to exit."""

    def __init__(self, namespace: NetNamespace, link: str, size: int, mac: str) -> None:
        """Set the generator up. Raises EnvironmentMissing if pktgen is not loaded."""
        self._namespace = namespace
        if not namespace.run(_FILES.is_dir):
            raise EnvironmentMissing(
                "the kernel's packet generator is missing", hint="modprobe pktgen"
            )
        self._write(_THREAD, "rem_device_all")
        self._write(_THREAD, f"add_device {link}")
        for command in (
            "count 0",
            "delay 0",
            f"pkt_size {size}",
            "src_min 198.51.100.1",
            "dst 198.51.100.2",
            f"dst_mac {mac}",
        ):
            self._write(link, command)
        # The write of "start" returns when sending ends, so it needs a thread of its own.
        self._runner = Thread(target=_start, name="pktgen")

    def _write(self, name: str, command: str) -> None:
        try:
            self._namespace.run(lambda: (_FILES / name).write_text(command + "\n"))
        except OSError as error:
            raise kernel_error(error.errno or 0, f"pktgen {command!r}", name) from error

    def __enter__(self) -> Self:
        self._namespace.run(self._runner.start)  # a new thread is where its maker is
        return self

    def close(self) -> None:
        """Stop sending; returns when the generator has stopped."""
        while self._runner.is_alive():
            self._write("pgctrl", "stop")
            self._runner.join(0.1)
        self._write(_THREAD, "rem_device_all")


def _start() -> None:
    (_FILES / "pgctrl").write_text("start\n")
