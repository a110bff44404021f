"""The worker that serves a vhost device: which task it is and what CPU time it took."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vhostctl.errors import kernel_error

_PROC = Path("/proc")
_KTHREADD = 2


@dataclass(frozen=True, slots=True)
class Worker:
    """A vhost worker: `kind` is ``task`` (a thread of the owner) or ``kthread``."""

    tid: int
    kind: str


def _comm(directory: Path) -> str:
    try:
        return (directory / "comm").read_text().strip()
    except OSError:
        return ""  # it ended between listing and reading


def _is_kernel_thread(directory: Path) -> bool:
    try:
        # proc(5): after the name in parentheses come state and parent.
        return int((directory / "stat").read_text().rpartition(")")[2].split()[1]) == _KTHREADD
    except (OSError, ValueError):
        return False


def workers() -> set[Worker]:
    """Return the vhost workers that this process started and that are alive.

    The kernel names each after the thread that called VHOST_SET_OWNER: vhost-TID.
    """
    ours = {int(path.name) for path in (_PROC / "self/task").iterdir()}
    names = {f"vhost-{tid}" for tid in ours}
    found = {Worker(tid, "task") for tid in ours if _comm(_PROC / f"self/task/{tid}") in names}
    for path in _PROC.iterdir():
        if path.name.isdigit() and _comm(path) in names and _is_kernel_thread(path):
            found.add(Worker(int(path.name), "kthread"))
    return found


def schedule_as_batch(worker: Worker) -> None:
    """Give the worker the policy SCHED_BATCH (sched(7)): its wake-ups preempt nobody.

    On a CPU that it shares with whoever sends into the tap, it then takes what has gathered
    instead of being switched to for every frame. Raises KernelError.
    """
    try:
        os.sched_setscheduler(worker.tid, os.SCHED_BATCH, os.sched_param(0))
    except OSError as error:
        raise kernel_error(
            error.errno or 0, "sched_setscheduler", f"vhost worker {worker.tid}", "run as root"
        ) from error


def cpu_ns(tid: int) -> int:
    """Return the CPU time of the thread `tid` so far, in ns (/proc/TID/schedstat)."""
    return int((_PROC / str(tid) / "schedstat").read_text().split()[0])


def machine_cpu_ns() -> int:
    """Return the CPU time that all tasks of the machine took so far, in ns.

    The seventh figure of each cpu line of /proc/schedstat (the kernel's
    Documentation/scheduler/sched-stats.rst); interrupts count for the task they hit.
    """
    lines = (_PROC / "schedstat").read_text().splitlines()
    return sum(int(line.split()[7]) for line in lines if line.startswith("cpu"))
