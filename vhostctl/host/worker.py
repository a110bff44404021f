"""The tasks that serve vhost devices, of any process: which they are and where they run.

A worker is a kernel thread up to Linux 6.3 and where the owner chose so, a thread of the
owner from 6.4 on, and an ordinary thread in a process with the engine. All are called
vhost-TID, after the thread that called VHOST_SET_OWNER; the task's flags tell them apart.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vhostctl.errors import EnvironmentMissing, InvalidArgument, KernelError, kernel_error
from vhostctl.host.vhost import VhostNet

_PROC = Path("/proc")
_NAME = re.compile(r"vhost-([0-9]+)")
_MISC_MAJOR = 10  # linux/major.h

# Flags of a task, linux/sched.h; the first since Linux 6.4.
_PF_USER_WORKER = 0x0000_4000
_PF_KTHREAD = 0x0020_0000
_PF_NO_SETAFFINITY = 0x0400_0000
_POLICIES = {0: "other", 1: "fifo", 2: "rr", 3: "batch", 5: "idle", 6: "deadline", 7: "ext"}


@dataclass(frozen=True, slots=True)
class Worker:
    """A vhost worker: `kind` is ``task`` (a thread of the owner), ``kthread`` or ``engine``."""

    tid: int
    kind: str


@dataclass(frozen=True, slots=True)
class Task:
    """What /proc says of a worker.

    `owner` is the process that called VHOST_SET_OWNER; None for a kernel thread whose caller
    is gone, since nothing else leads from it to a process. `started` is in clock ticks since
    boot, `cpus` a list such as 0-3,8, `priority` 1 to 99 for fifo and rr, otherwise 0.
    `cgroup` is the path in the hierarchy of cgroup v2, None without one.
    """

    worker: Worker
    name: str
    owner: int | None
    started: int
    cpu_ns: int
    cpus: str
    policy: str
    priority: int
    nice: int
    cgroup: str | None


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A descriptor of a vhost node, and what /proc calls the file behind it."""

    fd: int
    path: str


@dataclass(frozen=True, slots=True)
class _Stat:
    """What is used of /proc/TID/stat (proc(5))."""

    name: str
    flags: int
    nice: int
    started: int
    priority: int
    policy: int

    @classmethod
    def read(cls, tid: int) -> _Stat:
        text = (_PROC / str(tid) / "stat").read_text(errors="replace")
        head, _, tail = text.rpartition(")")  # the name may hold parentheses and blanks
        fields = [int(field) if field.lstrip("-").isdigit() else 0 for field in tail.split()]
        return cls(head.partition("(")[2], fields[6], fields[16], fields[19], *fields[37:39])


def _numbers(folder: Path) -> Iterator[int]:
    """Yield the numbers that name entries of `folder`; none if it is gone or not ours."""
    with suppress(OSError):
        yield from [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()]


def _named(tid: int, process: int) -> bool:
    """Return whether a task is called what a worker is: the cheapest look."""
    with suppress(OSError):
        comm = (_PROC / f"{process}/task/{tid}/comm").read_text(errors="replace")
        return bool(_NAME.fullmatch(comm.strip()))
    return False  # it ended between listing and reading


def _status(tid: int) -> dict[str, str]:
    lines = (_PROC / str(tid) / "status").read_text(errors="replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _owner(worker: Worker, process: int, own: _Stat) -> int | None:
    if worker.kind != "kthread":
        return process
    caller = int(own.name.removeprefix("vhost-"))
    with suppress(OSError):
        # Another task may have the number by now; it started after this one.
        if _Stat.read(caller).started <= own.started:
            return int(_status(caller)["Tgid"])
    return None


def _kind(tid: int, process: int, flags: int) -> str | None:
    if flags & _PF_KTHREAD:
        return "kthread"
    if tid == process:
        return None  # a program that is called so
    return "task" if flags & _PF_USER_WORKER else "engine"


def _cgroup(tid: int) -> str | None:
    for line in (_PROC / str(tid) / "cgroup").read_text(errors="replace").splitlines():
        if line.startswith("0::"):
            return line.removeprefix("0::")
    return None


def look(tid: int) -> Task:
    """Return what there is to say of the worker `tid`.

    Raises InvalidArgument if it is none, KernelProcessLookupError if there is no such task.
    """
    try:
        own, status = _Stat.read(tid), _status(tid)
        process = int(status["Tgid"])
        kind = _kind(tid, process, own.flags) if _NAME.fullmatch(own.name) else None
        if kind is None:
            raise InvalidArgument(
                f"task {tid} ({own.name}) is no vhost worker", hint="`vhostctl workers` lists them"
            )
        worker = Worker(tid, kind)
        return Task(
            worker=worker,
            name=own.name,
            owner=_owner(worker, process, own),
            started=own.started,
            cpu_ns=cpu_ns(tid),
            cpus=status["Cpus_allowed_list"],
            policy=_POLICIES.get(own.policy, str(own.policy)),
            priority=own.priority,
            nice=own.nice,
            cgroup=_cgroup(tid),
        )
    except (FileNotFoundError, ProcessLookupError) as error:
        raise _ended(tid) from error


def _ended(tid: int) -> KernelError:
    return kernel_error(errno.ESRCH, "look-up", f"task {tid}", "there is none, or it has ended")


def look_at_all() -> list[Task]:
    """Return every vhost worker that this process can see, in the order of their start."""
    found = []
    for process in _numbers(_PROC):
        for tid in _numbers(_PROC / f"{process}/task"):
            if _named(tid, process):
                with suppress(InvalidArgument, ProcessLookupError):  # none after all, or ended
                    found.append(look(tid))
    return sorted(found, key=lambda task: (task.started, task.worker.tid))


def workers() -> set[Worker]:
    """Return the vhost workers that this process owns and that are alive.

    Not among them is a kernel thread that a thread of this process asked for which has ended.
    """
    return {task.worker for task in look_at_all() if task.owner == os.getpid()}


def own(device: VhostNet) -> Worker | None:
    """As `device.set_owner()`; return the worker that it started.

    None if that cannot be told: inside a PID namespace the kernel's names do not fit, and its
    threads cannot be seen. Other threads may own devices meanwhile. Raises KernelError.
    """
    before = workers()
    device.set_owner()
    new = workers() - before
    if len(new) > 1:
        name = f"vhost-{threading.get_native_id()}"
        new = {worker for worker in new if look(worker.tid).name == name}
    return new.pop() if len(new) == 1 else None


def command(pid: int) -> str:
    """Return the name of the process `pid`, at most 15 characters; empty if it has ended."""
    try:
        return (_PROC / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def holders() -> dict[int, tuple[Descriptor, ...] | None]:
    """Return the vhost descriptors of each process that has some, by pid.

    None stands for a process that we may not look into (ptrace(2), access mode checking).
    """
    nodes = _nodes()
    found: dict[int, tuple[Descriptor, ...] | None] = {}
    for pid in _numbers(_PROC):
        try:
            held = tuple(_descriptors(pid, nodes))
        except PermissionError:
            found[pid] = None
            continue
        if held:
            found[pid] = held
    return found


def _descriptors(pid: int, nodes: Collection[int]) -> Iterator[Descriptor]:
    try:
        links = sorted((_PROC / str(pid) / "fd").iterdir(), key=lambda link: int(link.name))
    except (FileNotFoundError, ProcessLookupError):
        return  # it has ended
    for link in links:
        with suppress(OSError):
            path = str(link.readlink())
            # By name first: stat() of a file on a network that is gone would never return.
            if "vhost" in path and _device_number(link) in nodes:
                yield Descriptor(int(link.name), path)


def _nodes() -> set[int]:
    """Return the numbers of the nodes whose devices have a worker: net, scsi, vsock, ours."""
    lines = (line.split() for line in (_PROC / "misc").read_text().splitlines())
    return {os.makedev(_MISC_MAJOR, int(n)) for n, name in lines if name.startswith("vhost-")}


def _device_number(path: Path) -> int | None:
    about = path.stat()
    return about.st_rdev if stat.S_ISCHR(about.st_mode) else None


def pin(tid: int, cpus: Collection[int]) -> None:
    """Let the worker `tid` run on these CPUs only (sched_setaffinity(2)). Raises KernelError."""
    try:
        os.sched_setaffinity(tid, cpus)
    except OSError as error:
        hints = {
            errno.EPERM: "be root or the owner's user (CAP_SYS_NICE)",
            errno.ESRCH: "it has ended",
            errno.EINVAL: "none of these CPUs is online and in its cpuset",
        }
        hint = hints.get(error.errno or 0, "")
        with suppress(OSError):
            if error.errno == errno.EINVAL and _Stat.read(tid).flags & _PF_NO_SETAFFINITY:
                hint = "the kernel has bound this task and lets nobody else do it"
        raise kernel_error(
            error.errno or 0, "sched_setaffinity", f"vhost worker {tid}", hint
        ) from error


def cgroup_folder(name: str) -> Path:
    """Return the folder of a cgroup (v2): a folder already, or named as /proc/PID/cgroup does.

    Raises EnvironmentMissing without a cgroup v2, InvalidArgument if there is no such cgroup.
    """
    mounts = (line.split() for line in (_PROC / "mounts").read_text().splitlines())
    points = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"]
    if not points:
        raise EnvironmentMissing(
            "no cgroup v2 is mounted", hint="mount -t cgroup2 cgroup2 /sys/fs/cgroup"
        )
    root, given = points[0], Path(name)
    folder = given if given.is_relative_to(root) else root / name.lstrip("/")
    if not (folder / "cgroup.controllers").exists():
        raise InvalidArgument(f"no cgroup {folder}", hint=f"mkdir {folder}")
    return folder


def move(tid: int, folder: Path) -> None:
    """Put the worker `tid` into the cgroup (v2) `folder`, and nothing else of its process.

    Documentation/admin-guide/cgroup-v2.rst: a kernel thread is a process by itself; a thread
    moves within the threaded subtree that its process is in. Raises KernelError and as `look`.
    """
    task = look(tid)
    file = folder / ("cgroup.procs" if task.worker.kind == "kthread" else "cgroup.threads")
    try:
        file.write_text(str(tid))
    except OSError as error:
        raise kernel_error(
            error.errno or 0, f"write of {tid}", str(file), _why_it_stays(error, task, folder)
        ) from error


def _why_it_stays(error: OSError, task: Task, folder: Path) -> str:
    child = cgroup_folder("/") / (task.cgroup or "/").lstrip("/") / "vhost"
    threaded = (
        "a thread moves only within the threaded cgroups of its process: "
        f"mkdir {child} && echo threaded >{child}/cgroup.type, and use that one"
    )
    return {
        errno.EOPNOTSUPP: threaded,
        errno.EBUSY: f"{folder} gives controllers to its children: use one of them, or a new one",
        errno.EACCES: "be root, or have that cgroup and the one above both delegated to you",
        errno.EPERM: "be root, or have that cgroup and the one above both delegated to you",
        errno.ESRCH: "it has ended",
        errno.EINVAL: "the kernel keeps this task where it is",
    }.get(error.errno or 0, "")


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
