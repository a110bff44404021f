"""Tests here need root, the node of --device and /dev/net/tun: most run inside a lab VM."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.needs import skip_without_device
from vhostctl.host.netns import NetNamespace, unshare
from vhostctl.host.worker import workers

MANY = 1 << 16


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_without_device(config, items, Path(__file__).parent)


def until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Wait for `condition`, for as long as an emulated machine may take."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


@dataclass(frozen=True)
class Possessions:
    """What this process holds of the kernel."""

    descriptors: dict[str, str]
    threads: frozenset[str]
    mappings: frozenset[str]
    workers: frozenset[object]

    @classmethod
    def now(cls) -> Possessions:
        descriptors = {}
        for path in Path("/proc/self/fd").iterdir():
            try:
                descriptors[path.name] = str(path.readlink())
            except OSError:
                continue  # the descriptor that listed the folder
        maps = Path("/proc/self/maps").read_text().splitlines()
        return cls(
            descriptors={fd: name for fd, name in descriptors.items() if "/fd" not in name},
            threads=frozenset(thread.name for thread in threading.enumerate()),
            mappings=frozenset(line for line in maps if "vhostctl-guest-memory" in line),
            workers=frozenset(workers()),
        )


@pytest.fixture(scope="session", autouse=True)
def _links_of_its_own() -> None:
    """Several processes run tests: what one opens where it stands must meet no other's."""
    unshare()


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail if the test leaves a descriptor, thread, mapping or worker behind."""
    before: Possessions | None = None
    while before != (before := Possessions.now()):
        time.sleep(0.01)  # what the test before this one ended may be in /proc for a moment
    yield
    until(lambda: Possessions.now() == before, f"{Possessions.now()} as before: {before}")


@pytest.fixture
def namespace() -> Iterator[NetNamespace]:
    with NetNamespace() as fresh:
        yield fresh


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Let this process have more descriptors than a shell gives it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (MANY, max(MANY, before[1])))
    except ValueError:  # without CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
