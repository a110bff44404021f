"""A broker in a namespace, and callers of other users."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from vhostctl.broker.client import request
from vhostctl.broker.server import Broker
from vhostctl.broker.taps import LinkInfo, LinkTable
from vhostctl.host.links import Links, LinkState, exists
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import VhostNet

T = TypeVar("T")
USER, OTHER, GROUP = 60001, 60002, 60500
_SETGROUPS, _SETRESUID, _SETRESGID = 116, 117, 119  # asm/unistd_64.h


def as_user(function: Callable[[], T], uid: int = USER, groups: tuple[int, ...] = ()) -> T:
    """Return function(), called by a thread that is `uid`: the C library would change them all."""
    libc = ctypes.CDLL(None, use_errno=True)

    def become() -> None:
        gids = (ctypes.c_uint32 * len(groups))(*groups)
        assert libc.syscall(_SETGROUPS, len(groups), gids) == 0
        assert libc.syscall(_SETRESGID, uid, uid, uid) == 0
        assert libc.syscall(_SETRESUID, uid, uid, uid) == 0

    with ThreadPoolExecutor(1, initializer=become) as pool:
        return pool.submit(function).result()


@dataclass(frozen=True)
class World:
    """A broker in a namespace with the bridges br0 and br1."""

    namespace: NetNamespace
    broker: Broker
    path: Path
    device: str

    def ask(
        self,
        tap: str | None = None,
        queues: int = 1,
        bridge: str | None = None,
        uid: int = USER,
        groups: tuple[int, ...] = (),
        device: str = "",
    ) -> tuple[Tap, list[VhostNet]]:
        """Ask as user `uid` while the broker serves."""

        def function() -> tuple[Tap, list[VhostNet]]:
            wanted = device or self.device
            return request(self.path, tap=tap, queues=queues, bridge=bridge, device=wanted)

        with self.serving():
            return as_user(function, uid, groups)

    def serving(self) -> Serving:
        return Serving(self)

    def state(self, name: str) -> LinkState:
        def look() -> LinkState:
            with Links() as links:
                return links.state(name)

        return self.namespace.run(look)

    def info(self, name: str) -> LinkInfo:
        def look() -> LinkInfo:
            with LinkTable() as links:
                return links.all()[name]

        return self.namespace.run(look)

    def exists(self, name: str) -> bool:
        return self.namespace.run(lambda: exists(name))

    def persistent(self, name: str, queues: int = 1, **settings: object) -> None:
        """Make a tap as an administrator does."""

        def make() -> None:
            with Tap.open(name, queues) as tap, Links() as links:
                tap.queues[0].set_persist(True)
                if settings:
                    links.change(name, **settings)

        self.namespace.run(make)


class Serving:
    """The broker's loop, in its namespace, for as long as a with block lasts."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        while not self._ended.is_set():
            self._world.namespace.run(lambda: self._world.broker.step(0.02))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@dataclass
class Held:
    """What a caller got, closed at the end of a with block."""

    tap: Tap
    devices: list[VhostNet]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for device in self.devices:
            device.close()
        self.tap.close()
