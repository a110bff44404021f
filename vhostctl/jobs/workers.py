"""Which worker serves which device of which process, and moving it."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from vhostctl.errors import InvalidArgument, StateError
from vhostctl.host import worker
from vhostctl.host.worker import Descriptor, Task

_MOST_CPUS = 8192  # CONFIG_NR_CPUS of x86-64 at most


@dataclass(frozen=True, slots=True)
class Process:
    """A process; `descriptors` are those of vhost nodes, None if we may not look."""

    pid: int
    command: str
    descriptors: tuple[Descriptor, ...] | None


@dataclass(frozen=True, slots=True)
class Serving:
    """A worker, whose it is and what it serves.

    The kernel does not tell which descriptor a worker belongs to. `candidates` are the owner's
    descriptors, which are all that it may be; none for an engine, which has no node, and None
    if the owner is unknown or not ours to look into. `certain` is whether there is one of each.
    If there are as many workers as descriptors, `likely` is the one in the same place in the
    order of creation.
    """

    task: Task
    owner: Process | None
    candidates: tuple[Descriptor, ...] | None
    certain: bool
    likely: Descriptor | None

    @property
    def tid(self) -> int:
        """The task's number."""
        return self.task.worker.tid


@dataclass(frozen=True, slots=True)
class Survey:
    """Workers in the order of their start, and processes with more descriptors than workers."""

    workers: tuple[Serving, ...]
    unserved: tuple[Process, ...]


def survey() -> Survey:
    """Look at every vhost worker and at every process with a vhost descriptor."""
    tasks = worker.look_at_all()
    held = worker.holders()
    owners = {task.owner for task in tasks if task.owner is not None}
    processes = {
        pid: Process(pid, worker.command(pid), held.get(pid, ()))
        for pid in sorted(owners | {pid for pid, descriptors in held.items() if descriptors})
    }
    in_kernel: dict[int, list[Task]] = {pid: [] for pid in processes}
    for task in tasks:
        if task.owner is not None and task.worker.kind != "engine":
            in_kernel[task.owner].append(task)
    unserved = [
        process
        for process in processes.values()
        if len(process.descriptors or ()) > len(in_kernel[process.pid])
    ]
    workers = [
        Serving(task, None, None, certain=False, likely=None)
        if task.owner is None
        else _serving(task, processes[task.owner], in_kernel[task.owner])
        for task in tasks
    ]
    return Survey(tuple(workers), tuple(unserved))


def _serving(task: Task, owner: Process, siblings: Sequence[Task]) -> Serving:
    """Say what `task` serves; `siblings` are the workers of the owner's nodes, oldest first."""
    if task not in siblings:
        return Serving(task, owner, (), certain=False, likely=None)
    held = owner.descriptors
    paired = held is not None and len(held) == len(siblings)
    likely = held[siblings.index(task)] if held and paired else None
    return Serving(task, owner, held, certain=paired and len(siblings) == 1, likely=likely)


def select(found: Survey, pids: Collection[int], tids: Collection[int]) -> Survey:
    """Return what concerns these processes and workers; with neither, all of it.

    Raises InvalidArgument for a number that is no worker's, StateError for a process that has
    neither worker nor descriptor.
    """
    if not pids and not tids:
        return found
    for tid in set(tids) - {serving.tid for serving in found.workers}:
        worker.look(tid)  # raises, and says what it is
    workers = [s for s in found.workers if s.tid in tids or (s.owner and s.owner.pid in pids)]
    unserved = [process for process in found.unserved if process.pid in pids]
    known = {s.owner.pid for s in workers if s.owner} | {process.pid for process in unserved}
    for pid in set(pids) - known:
        name = worker.command(pid)
        raise StateError(
            f"process {pid} ({name}) has no vhost worker" if name else f"no process {pid}",
            hint="a device has one from VHOST_SET_OWNER on" if name else "",
        )
    return Survey(tuple(workers), tuple(unserved))


@dataclass(frozen=True, slots=True)
class Interval:
    """How long was measured, and the CPU time of each worker then, in ns, by tid.

    One that ended meanwhile is not in it.
    """

    ns: int
    cpu_ns: dict[int, int]


def measure(workers: Collection[Serving], seconds: float) -> Interval:
    """Wait for so long; return what the workers took."""
    began = time.monotonic_ns()
    before = _cpu_times(workers)
    time.sleep(seconds)
    after = _cpu_times(workers)
    took = {tid: after[tid] - before[tid] for tid in before.keys() & after.keys()}
    return Interval(time.monotonic_ns() - began, took)


def _cpu_times(workers: Collection[Serving]) -> dict[int, int]:
    times = {}
    for serving in workers:
        with suppress(FileNotFoundError, ProcessLookupError):
            times[serving.tid] = worker.cpu_ns(serving.tid)
    return times


def parse_cpus(text: str) -> set[int]:
    """Read a list of CPUs such as ``0-3,8`` (cpuset(7)). Raises InvalidArgument."""
    cpus: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        first, last = (int(n) for n in (match[1], match[2] or match[1])) if match else (1, 0)
        if not first <= last < _MOST_CPUS:
            raise InvalidArgument(f"CPUs {text!r}", hint="write a list such as 0-3,8")
        cpus.update(range(first, last + 1))
    return cpus


def place(workers: Collection[Serving], cpus: Collection[int], cgroup: str | None) -> None:
    """Move workers into `cgroup` and let them run on `cpus` only; empty and None change nothing.

    The cgroup comes first, since its cpuset bounds the CPUs. The first refusal ends it: those
    before stay where they were put. Raises KernelError, InvalidArgument, EnvironmentMissing.
    """
    folder = worker.cgroup_folder(cgroup) if cgroup is not None else None
    for serving in workers:
        if folder is not None:
            worker.move(serving.tid, folder)
        if cpus:
            worker.pin(serving.tid, cpus)
