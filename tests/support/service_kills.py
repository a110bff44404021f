"""A service that is killed while it begins, changes something, or ends."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from tests.support.service import ADDRESS, READY, Place, ended
from vhostctl.errors import VhostctlError
from vhostctl.service.client import ServiceClient


@contextmanager
def victim(place: Place, *args: str | Path) -> Iterator[subprocess.Popen[str]]:
    process = place.spawn("service", *args)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=READY)


SETTINGS: dict[str, Any] = {"addresses": [ADDRESS], "mtu": 1400, "bridge": "br0"}


def kill_toml(place: Place) -> Path:
    """The devices of `life` in a file."""
    file = place.state.parent / "kill.toml"
    one = f'[[device]]\nname = "{{0}}"\ntap = "{{0}}"\ndevice = "{place.device}"\n'
    settings = "".join(f"{key} = {json.dumps(value)}\n" for key, value in SETTINGS.items())
    file.write_text(one.format("kept") + settings + one.format("made") + "queues = 2\n")
    return file


def life(place: Place, client: ServiceClient) -> Iterator[Callable[[], object]]:
    """Yield what happens in a service's life, one after the other."""

    def ask(command: str, name: str, **arguments: object) -> Callable[[], object]:
        return lambda: client.execute(command, name=name, **arguments)

    yield lambda: place.add(client, "kept", "kept", **SETTINGS)
    yield lambda: place.add(client, "made", "made", queues=2)
    yield ask("set-link", "kept", up=False)
    yield ask("set-pairs", "made", pairs=1)
    yield ask("set-mtu", "kept", mtu=1350)
    yield ask("memory-add", "made", region="dimm", size=1 << 21)
    yield ask("log-start", "made")
    yield ask("suspend", "kept")
    yield ask("resume", "kept")
    yield ask("device-stop", "kept")
    yield ask("device-start", "kept")
    yield ask("device-del", "made")
    yield ask("device-del", "kept")


def began(place: Place, process: subprocess.Popen[str]) -> None:
    """Wait until a service has its state directory: all that comes before is imports."""
    directory = str(place.state.resolve())

    def has_it() -> bool:
        assert process.poll() is None, process.communicate()
        return directory in open_files(process.pid)

    wait_for(has_it)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 2 * READY
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def open_files(pid: int) -> set[str]:
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(fd.readlink()))
    return found


@dataclass
class Pace:
    """How many seconds a service takes for each thing, here and now."""

    start: float
    file: float
    restart: float
    steps: list[float]
    end: float


def took(event: Callable[[], object]) -> float:
    before = time.monotonic()
    event()
    return time.monotonic() - before


def pace_of(place: Place) -> Pace:
    def ready(process: subprocess.Popen[str]) -> float:
        began(place, process)
        return took(lambda: place.client(process).close())

    with victim(place, "-f", kill_toml(place)) as process:
        file = ready(process)
    with victim(place) as process:
        restart = ready(process)
        ended(process)
    with victim(place) as process:
        start = ready(process)
        with place.client(process) as client:
            steps = [took(event) for event in life(place, client)]
            both_up(place, client)
        process.terminate()
        end = took(lambda: wait_for(lambda: not place.files()))  # the rest is Python's own end
        return Pace(start, file, restart, steps, end)


def both_up(place: Place, client: ServiceClient) -> None:
    for event in islice(life(place, client), 2):
        event()


class Killer:
    """Kills services, each in another phase, at moments that are drawn."""

    def __init__(self, place: Place, seed: int) -> None:
        self._place = place
        self._draw = random.Random(seed)  # noqa: S311 -- nobody is to be surprised
        self._pace = pace_of(place)
        self._turns = cycle(
            (self.end, self.restart, self.file, self.change, self.start, self.change)
        )

    def kill(self) -> str:
        """Kill once more; return when."""
        return next(self._turns)()

    def _at(self, seconds: float) -> float:
        return self._draw.uniform(0, seconds)

    def _late(self, seconds: float) -> float:
        # Most of them go into the import of netlink, before any tap is touched.
        return seconds * max(self._draw.random() for _ in range(4))

    def _after(self, process: subprocess.Popen[str], seconds: float) -> threading.Timer:
        killer = threading.Timer(seconds, process.kill)
        killer.start()
        return killer

    def change(self) -> str:
        """Have a service do everything there is, and kill it in one of the steps."""
        step = self._draw.randrange(len(self._pace.steps))
        with victim(self._place) as process, self._place.client(process) as client:
            for event in islice(life(self._place, client), step):
                event()
            draw = self._at if step else self._late
            killer = self._after(process, draw(self._pace.steps[step]))
            with suppress(VhostctlError):  # it is gone, and that is the point
                for event in islice(life(self._place, client), step, None):
                    event()
            process.wait(READY)
            killer.join()
        return f"in step {step}"

    def end(self) -> str:
        """Kill a service while it ends by itself, and takes its devices down."""
        quits = self._draw.random() < 0.5
        with victim(self._place) as process, self._place.client(process) as client:
            both_up(self._place, client)
            if quits:
                client.execute("quit")
            else:
                process.terminate()
            killer = self._after(process, self._at(self._pace.end))
            process.communicate(timeout=READY)
            killer.join()
        return "after quit" if quits else "after SIGTERM"

    def start(self) -> str:
        """Kill a service that comes up where there was none before."""
        return self._beginning("at the first start", self._at(self._pace.start))

    def file(self) -> str:
        """Kill a service that comes up with devices."""
        return self._beginning("at -f", self._late(self._pace.file), "-f", kill_toml(self._place))

    def restart(self) -> str:
        """Kill a service in a step, and the next one while it cleans up."""
        when = self.change()
        return self._beginning(f"at a restart after one {when}", self._late(self._pace.restart))

    def _beginning(self, when: str, seconds: float, *args: str | Path) -> str:
        with victim(self._place, *args) as process:
            began(self._place, process)
            with pytest.raises(subprocess.TimeoutExpired):  # by itself it does not end
                process.wait(seconds)
        return when
