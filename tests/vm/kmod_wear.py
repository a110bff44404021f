"""Run inside a VM by test_kmod.py: load and unload, open and close, until something shows.

`python -m tests.vm.kmod_wear loads COUNT MODULE.ko` or `... opens COUNT`; prints JSON.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vhostctl.conformance import flags
from vhostctl.conformance.flags import Flags
from vhostctl.conformance.rig import GPA, Rig, Setup
from vhostctl.conformance.target import Target
from vhostctl.conformance.wire import Wire, frame
from vhostctl.host import netns
from vhostctl.host.vhost import VhostNet
from vhostctl.kmod import NAME, NODE, loading

_SETUP = Setup(nums=(32, 32), regions=((GPA, 1 << 20),), start=False)
_BATCH = 8
_BY_EXIT = 10  # one cycle in so many ends with its process
_WARM = 20


def loads(count: int, module: Path) -> dict[str, object]:
    """Load and unload, with a device opened and owned each time."""
    loading.load(module)  # with what it depends on
    loading.unload()
    with open(module, "rb") as file:
        for _ in range(count):
            assert loading._system_call(loading._FINIT_MODULE, file.fileno(), b"", 0) == 0
            with VhostNet.open(NODE) as device:
                device.set_owner()
            loading.unload()
    return {"cycles": count}


def opens(count: int) -> dict[str, object]:
    """Close devices while both rings run: frames come in, frames go out."""
    netns.unshare()
    found = flags.probe(opener, node=True)
    used = Counter[str]()
    with Wire() as wire, flood(wire):
        for _ in range(_WARM):
            cycle(wire, found)
        allocated = allocations()
        for number in range(count):
            if number == count // 2:
                unused = unused_memory()  # what is remembered of allocations has its size by now
            if number % _BY_EXIT == 0:
                cycle_in_child(wire, found)
            else:
                used.update(cycle(wire, found))
    wait_for_workers()
    left = allocations()
    left.subtract(allocated)
    return {
        "cycles": count,
        "used": dict(used),
        "left": {place: number for place, number in left.items() if number > 0},
        "lost_mib": (unused - unused_memory()) >> 20,
    }


def opener() -> VhostNet:
    return VhostNet.open(NODE)


def cycle(wire: Wire, found: Flags) -> Counter[str]:
    """Bring a device up and close it at work; return how many buffers it had used by then."""
    with Target(opener, found) as target:
        return work(Rig(target, _SETUP, onto=wire))


def cycle_in_child(wire: Wire, found: Flags) -> None:
    """Let a process do it and end without closing anything."""
    child = os.fork()
    if child == 0:
        try:
            work(Rig(Target(opener, found), _SETUP, onto=wire))
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def work(rig: Rig) -> Counter[str]:
    for start in (False, True):
        rig.rx.offer(*([rig.room(2048)] for _ in range(_BATCH)))
        rig.tx.offer(*(rig.outgoing(number) for number in range(_BATCH)))
        if not start:
            rig.start()
    return Counter(rx=rig.rx.used_idx, tx=rig.tx.used_idx)


@contextmanager
def flood(wire: Wire) -> Iterator[None]:
    """Let a process send frames out of the tap's link, for the device to receive."""
    child = os.fork()
    if child == 0:
        signal.alarm(3600)
        data = frame(1, 1000)
        while True:
            with suppress(OSError):
                wire.send(data)
            time.sleep(0.0005)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def wait_for_workers() -> None:
    """Wait until the last worker is gone."""
    deadline = time.monotonic() + 20
    while names := workers():
        assert time.monotonic() < deadline, names
        time.sleep(0.01)


def workers() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/task/*/comm"):
        with suppress(OSError):
            found.append(path.read_text().strip())
    return [name for name in found if name.startswith("vhost-")]


def allocations() -> Counter[str]:
    """Return what the module has allocated, by the place in it: slub_debug=U, vmalloc."""
    found = Counter[str]()
    for path in Path("/sys/kernel/debug/slab").glob("kmalloc-*/alloc_traces"):
        for line in path.read_text().splitlines():
            match = re.match(rf" *(\d+) (\S+ \[{NAME}\])", line)
            if match is not None:
                found[f"{path.parent.name} {match[2]}"] += int(match[1])
    for line in Path("/proc/vmallocinfo").read_text().splitlines():
        if (match := re.search(rf"\S+ \[{NAME}\]", line)) is not None:
            found[f"vmalloc {match[0]}"] += 1
    return found


def unused_memory() -> int:
    """Return the bytes that nobody holds, or somebody who is known: pages that leak are neither."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
    text = Path("/proc/meminfo").read_text()
    known = re.findall(r"^(?:MemFree|Slab|AnonPages|Cached): +(\d+) kB", text, re.MULTILINE)
    zones = Path("/proc/zoneinfo").read_text()
    kept = re.findall(r"^ +count: +(\d+)", zones, re.MULTILINE)  # free, in lists of one CPU
    return (sum(map(int, known)) << 10) + sum(map(int, kept)) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    what, number, *rest = sys.argv[1:]
    outcome = loads(int(number), Path(rest[0])) if what == "loads" else opens(int(number))
    print(json.dumps(outcome))
