"""Limits: descriptors, tasks, memory regions, mappings, huge pages."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vhostctl.doctor.findings import Finding, note, warning
from vhostctl.doctor.system import CAP_SYS_ADMIN, CAP_SYS_RESOURCE, System
from vhostctl.host.module import DEFAULT_MAX_MEM_REGIONS

_PAIRS = 16  # what should fit: a pair for each CPU of a middling guest
_DESCRIPTORS = 8  # of a pair: device, tap queue, kick, call and error of two rings
_BESIDES = 24  # an interpreter's and a session's own
_MAPPINGS = 4096
_TASK_WORKERS = (6, 4)  # from here on a worker is a thread of its owner

_REGIONS = "/sys/module/vhost/parameters/max_mem_regions"
_MAP_COUNT = "/proc/sys/vm/max_map_count"
_HUGE = "/sys/kernel/mm/hugepages"

NOFILE = warning(
    "VHOST-LIMIT-NOFILE",
    f"Fewer than {_PAIRS} queue pairs fit into the limit of open files: each takes "
    f"{_DESCRIPTORS} descriptors.",
    "ulimit -n 4096, or LimitNOFILE= of the unit",
)
NPROC = warning(
    "VHOST-LIMIT-NPROC",
    f"Fewer than {_PAIRS} workers fit into the limit of this user's tasks: since Linux 6.4 a "
    "worker counts, and VHOST_SET_OWNER gives ENOMEM.",
    "ulimit -u, or LimitNPROC= of the unit",
)
REGIONS = warning(
    "VHOST-LIMIT-REGIONS",
    f"vhost takes fewer memory regions than the kernel's default of {DEFAULT_MAX_MEM_REGIONS}.",
    "options vhost max_mem_regions=64 in modprobe.d",
)
MAPS = warning(
    "VHOST-LIMIT-MAPS",
    f"A process may have fewer than {_MAPPINGS} mappings.",
    "sysctl -w vm.max_map_count=65530",
)
HUGE_PAGES = note(
    "VHOST-LIMIT-HUGEPAGES",
    "No huge pages are set aside: guest memory cannot lie on them.",
    "sysctl -w vm.nr_hugepages=64",
)
FAULTS = (NOFILE, NPROC, REGIONS, MAPS, HUGE_PAGES)


def check_limits(system: System) -> Iterator[Finding]:
    """Look at this process's limits."""
    files = system.limit("Max open files")
    wanted = _PAIRS * _DESCRIPTORS + _BESIDES
    if files is not None and files < wanted:
        said = f"/proc/self/limits: Max open files {files}, {_PAIRS} pairs need {wanted}"
        yield NOFILE.found(said, f"ulimit -n {max(1024, wanted)}")
    tasks = system.limit("Max processes")
    if tasks is not None and _workers_count(system):
        now = _tasks_of(system, system.real_uid)
        if tasks - now < _PAIRS:
            said = f"/proc/self/limits: Max processes {tasks}, this user has {now} now"
            yield NPROC.found(said, f"ulimit -u {now + 1024}")


def check_memory(system: System) -> Iterator[Finding]:
    """Look at the limits on guest memory."""
    regions = system.number(_REGIONS)
    if regions is not None and regions < DEFAULT_MAX_MEM_REGIONS and system.in_tree:
        # Both at once: vhost keeps the parameter it was loaded with.
        remedy = (
            "modprobe -r vhost_net vhost && "
            f"modprobe vhost max_mem_regions={DEFAULT_MAX_MEM_REGIONS} && modprobe vhost_net"
        )
        yield REGIONS.found(f"{_REGIONS}: {regions}", remedy)
    maps = system.number(_MAP_COUNT)
    if maps is not None and maps < _MAPPINGS:
        yield MAPS.found(f"{_MAP_COUNT}: {maps}")
    sizes = system.listing(_HUGE)
    if not any(system.number(f"{_HUGE}/{size}/nr_hugepages") for size in sizes):
        said = f"{_HUGE}/*/nr_hugepages: 0" if sizes else f"{_HUGE}: nothing there"
        yield HUGE_PAGES.found(said)


def _workers_count(system: System) -> bool:
    """Return whether a new worker counts against our RLIMIT_NPROC (copy_process, kernel/fork.c)."""
    mark = re.match(r"(\d+)\.(\d+)", system.release)
    tasks = mark is not None and (int(mark[1]), int(mark[2])) >= _TASK_WORKERS
    exempt = system.has(CAP_SYS_RESOURCE) or system.has(CAP_SYS_ADMIN)
    return tasks and system.real_uid != 0 and not exempt


def _tasks_of(system: System, uid: int) -> int:
    """Return how many tasks a user has."""
    found = 0
    for name in system.listing("/proc"):
        if name.isdigit():
            status = system.text(f"/proc/{name}/status")
            owner = re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)
            threads = re.search(r"^Threads:\s+(\d+)", status, re.MULTILINE)
            if owner and threads and int(owner[1]) == uid:
                found += int(threads[1])
    return found
