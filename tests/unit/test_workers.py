"""Finding the workers of every process, in a /proc made for the tests."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.proc import BOUND, KTHREAD, USER_WORKER, Proc, device_number
from vhostctl.cli.exitcodes import ExitCode
from vhostctl.cli.main import main
from vhostctl.errors import EnvironmentMissing, InvalidArgument, KernelError, StateError
from vhostctl.host import worker
from vhostctl.host.worker import Descriptor, Worker
from vhostctl.jobs import workers as job

KTHREADD = 2


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proc:
    monkeypatch.setattr(worker, "_PROC", tmp_path)
    monkeypatch.setattr(worker, "_device_number", device_number)
    return Proc(tmp_path)


def vhostctl(*args: str) -> Result:
    return CliRunner().invoke(main, ["workers", *args], env={"COLUMNS": "200"})


def tids(found: Sequence[job.Serving]) -> list[int]:
    return [serving.tid for serving in found]


def test_the_flags_tell_the_kinds_apart(proc: Proc) -> None:
    proc.task(KTHREADD, "kthreadd", flags=KTHREAD)
    proc.task(300, "qemu")
    proc.task(301, "vhost-300", tgid=300, flags=USER_WORKER)
    proc.task(302, "vhost-300", flags=KTHREAD, started=60)
    proc.task(303, "vhost-300", tgid=300, started=70)
    assert [task.worker for task in worker.look_at_all()] == [
        Worker(301, "task"),
        Worker(302, "kthread"),
        Worker(303, "engine"),
    ]
    assert {task.owner for task in worker.look_at_all()} == {300}


@pytest.mark.parametrize("name", ["vhost-", "vhost-3x", "a vhost-300", "vhost_task", "(vhost-1) 2"])
def test_another_name_is_no_worker(proc: Proc, name: str) -> None:
    proc.task(300, "qemu")
    proc.task(301, name, tgid=300, flags=USER_WORKER)
    assert worker.look_at_all() == []
    with pytest.raises(InvalidArgument, match="no vhost worker"):
        worker.look(301)


def test_a_program_that_is_called_so_is_no_worker(proc: Proc) -> None:
    proc.task(300, "vhost-300")
    assert worker.look_at_all() == []


def test_what_is_said_of_a_worker(proc: Proc) -> None:
    proc.task(300, "qemu")
    proc.task(301, "vhost-300", tgid=300, flags=USER_WORKER, started=51)
    assert worker.look(301) == worker.Task(
        worker=Worker(301, "task"),
        name="vhost-300",
        owner=300,
        started=51,
        cpu_ns=301_000,
        cpus="0-3",
        policy="fifo",
        priority=7,
        nice=-5,
        cgroup="/machine/vm",
    )


def test_the_caller_may_be_any_thread_of_the_owner(proc: Proc) -> None:
    proc.task(300, "qemu")
    proc.task(305, "call me", tgid=300)
    proc.task(310, "vhost-305", flags=KTHREAD)
    assert worker.look(310).owner == 300


def test_whoever_has_the_callers_number_now_is_not_the_owner(proc: Proc) -> None:
    proc.task(300, "sh", started=51)
    proc.task(310, "vhost-300", flags=KTHREAD, started=50)
    proc.task(311, "vhost-299", flags=KTHREAD, started=50)
    assert [task.owner for task in worker.look_at_all()] == [None, None]
    assert [(s.owner, s.candidates) for s in job.survey().workers] == [(None, None)] * 2
    assert "vhost-299, gone" in " ".join(vhostctl().stdout.split())


def test_a_task_that_ended_is_not_there(proc: Proc) -> None:
    with pytest.raises(ProcessLookupError, match="look-up on task 301"):
        worker.look(301)
    proc.task(300, "qemu")
    proc.task(301, "vhost-300", tgid=300, flags=USER_WORKER)
    (proc.root / "300/task/301/schedstat").unlink()
    assert worker.look_at_all() == []


def test_ours_are_those_that_this_process_owns(proc: Proc) -> None:
    proc.task(os.getpid(), "python")
    proc.task(300, "qemu")
    proc.task(4_000_001, f"vhost-{os.getpid()}", tgid=os.getpid())
    proc.task(4_000_002, f"vhost-{os.getpid()}", flags=KTHREAD)
    proc.task(4_000_003, f"vhost-{os.getpid()}", tgid=300, flags=USER_WORKER)
    assert worker.workers() == {Worker(4_000_001, "engine"), Worker(4_000_002, "kthread")}


def test_descriptors_of_nodes_are_found_by_their_device(proc: Proc) -> None:
    proc.task(300, "qemu")
    proc.task(400, "cat")
    proc.descriptors(300, {9: "/dev/vhost-net", 10: "/x/vhost-vsock", 3: "/tmp/vhost-net.log"})
    proc.descriptors(300, {4: "socket:[77]", 5: "/dev/vhost-vdpa-0"})
    assert worker.holders() == {
        300: (Descriptor(9, "/dev/vhost-net"), Descriptor(10, "/x/vhost-vsock"))
    }


def test_one_of_each_is_certain(proc: Proc) -> None:
    proc.task(300, "qemu")
    proc.descriptors(300, {9: "/dev/vhost-net"})
    proc.task(301, "vhost-300", flags=KTHREAD)
    (serving,) = job.survey().workers
    assert serving.certain
    assert serving.likely == Descriptor(9, "/dev/vhost-net")
    assert serving.owner == job.Process(300, "qemu", (Descriptor(9, "/dev/vhost-net"),))
    assert job.survey().unserved == ()


def test_as_many_of_each_go_by_their_order(proc: Proc) -> None:
    proc.task(300, "qemu")
    proc.descriptors(300, {10: "/dev/vhost-net", 9: "/dev/vhost-net", 30: "/dev/vhost-vsock"})
    for tid, started in ((301, 70), (302, 60), (303, 60)):
        proc.task(tid, "vhost-300", tgid=300, flags=USER_WORKER, started=started)
    proc.task(304, "vhost-300", tgid=300)  # an engine has no part in it
    found = {s.tid: s for s in job.survey().workers}
    likely = {tid: serving.likely and serving.likely.fd for tid, serving in found.items()}
    assert likely == {302: 9, 303: 10, 301: 30, 304: None}
    assert not any(serving.certain for serving in found.values())
    assert [len(serving.candidates or ()) for serving in found.values()] == [0, 3, 3, 3]
    assert "likely fd 30 /dev/vhost-vsock" in " ".join(vhostctl().stdout.split())


def test_otherwise_it_is_one_of_them(proc: Proc) -> None:
    proc.task(300, "qemu")
    proc.descriptors(300, {9: "/dev/vhost-net", 10: "/dev/vhost-net", 11: "/dev/vhost-vsock"})
    proc.task(301, "vhost-300", flags=KTHREAD)
    found = job.survey()
    (serving,) = found.workers
    assert (serving.certain, serving.likely) == (False, None)
    assert [descriptor.fd for descriptor in serving.candidates or ()] == [9, 10, 11]
    assert [process.pid for process in found.unserved] == [300]
    out = " ".join(vhostctl().stdout.split())
    assert "300 (qemu) has fd 9, 10 /dev/vhost-net or fd 11 /dev/vhost-vsock, and not as" in out


def test_an_owner_without_descriptors_has_given_them_away(proc: Proc) -> None:
    proc.task(300, "sh")
    proc.task(400, "qemu")
    proc.descriptors(400, {9: "/dev/vhost-net"})
    proc.task(301, "vhost-300", flags=KTHREAD)
    found = job.survey()
    assert found.workers[0].candidates == ()
    assert [process.pid for process in found.unserved] == [400]


def test_a_process_that_may_not_be_looked_into(proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    proc.task(300, "qemu")
    proc.task(301, "vhost-300", tgid=300, flags=USER_WORKER)
    before = Path.iterdir

    def refuse(path: Path) -> object:
        if path.name == "fd":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return before(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    (serving,) = job.survey().workers
    assert (serving.candidates, serving.certain, serving.likely) == (None, False, None)
    assert "not ours to see" in " ".join(vhostctl().stdout.split())


@pytest.fixture
def two_vms(proc: Proc) -> Proc:
    for pid in (300, 400):
        proc.task(pid, "qemu")
        proc.descriptors(pid, {9: "/dev/vhost-net"})
        proc.task(pid + 1, f"vhost-{pid}", tgid=pid, flags=USER_WORKER)
    return proc


@pytest.mark.usefixtures("two_vms")
def test_selection() -> None:
    found = job.survey()
    assert tids(job.select(found, [], []).workers) == [301, 401]
    assert tids(job.select(found, [400], []).workers) == [401]
    assert tids(job.select(found, [], [301]).workers) == [301]
    assert tids(job.select(found, [400], [301]).workers) == [301, 401]


def test_selecting_what_is_none(two_vms: Proc) -> None:
    two_vms.task(500, "sh")
    found = job.survey()
    with pytest.raises(InvalidArgument, match=r"task 300 \(qemu\) is no vhost worker"):
        job.select(found, [], [300])
    with pytest.raises(StateError, match=r"process 500 \(sh\) has no vhost worker"):
        job.select(found, [400, 500], [])
    with pytest.raises(StateError, match="no process 501"):
        job.select(found, [501], [])


@pytest.mark.parametrize(
    ("text", "cpus"), [("0", {0}), ("2-3,0", {0, 2, 3}), ("5-5", {5}), ("8191", {8191})]
)
def test_lists_of_cpus(text: str, cpus: set[int]) -> None:
    assert job.parse_cpus(text) == cpus


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "-1", "3-2", "0-", "a", "8192", "0-99999999", "1 "]
)
def test_what_is_no_list_of_cpus(text: str) -> None:
    with pytest.raises(InvalidArgument, match="0-3,8"):
        job.parse_cpus(text)


def test_measured_is_what_each_took(two_vms: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    def while_waiting(_seconds: float) -> None:
        (two_vms.root / "300/task/301/schedstat").write_text("901000 1 1\n")
        (two_vms.root / "400/task/401/schedstat").unlink()

    monkeypatch.setattr("time.sleep", while_waiting)
    interval = job.measure(job.survey().workers, 2)
    assert interval.cpu_ns == {301: 600_000}
    assert interval.ns > 0


@pytest.mark.parametrize(
    ("error", "flags", "hint"),
    [
        (errno.EPERM, 0, "be root"),
        (errno.ESRCH, 0, "it has ended"),
        (errno.EINVAL, 0, "online and in its cpuset"),
        (errno.EINVAL, BOUND, "the kernel has bound this task"),
    ],
)
def test_refused_pinning_says_why(
    proc: Proc, monkeypatch: pytest.MonkeyPatch, error: int, flags: int, hint: str
) -> None:
    proc.task(300, "qemu")
    proc.task(301, "vhost-300", flags=KTHREAD | flags)

    def refuse(_tid: int, _cpus: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with pytest.raises(KernelError, match=hint) as caught:
        worker.pin(301, {0})
    assert caught.value.errno == error


@pytest.fixture
def cgroups(two_vms: Proc, tmp_path: Path) -> Path:
    """A cgroup v2 with two cgroups, in a folder of its own."""
    root = tmp_path / "cgroup"
    for name in ("", "machine", "machine/vm", "fast"):
        (root / name).mkdir()
        (root / name / "cgroup.controllers").touch()
    (two_vms.root / "mounts").write_text(f"cgroup /cg1 cgroup rw 0 0\nc {root} cgroup2 rw 0 0\n")
    return root


def test_a_cgroup_is_a_folder_or_what_proc_calls_it(cgroups: Path) -> None:
    for name in ("fast", "/fast", "fast/", str(cgroups / "fast")):
        assert worker.cgroup_folder(name) == cgroups / "fast"
    with pytest.raises(InvalidArgument, match=f"mkdir {cgroups}/slow"):
        worker.cgroup_folder("slow")


def test_no_cgroup_v2(two_vms: Proc) -> None:
    (two_vms.root / "mounts").write_text("cgroup /cg1 cgroup rw 0 0\n")
    with pytest.raises(EnvironmentMissing, match="no cgroup v2 is mounted"):
        worker.cgroup_folder("/")


def test_a_thread_goes_by_threads_and_a_kernel_thread_by_processes(
    two_vms: Proc, cgroups: Path
) -> None:
    two_vms.task(302, "vhost-300", flags=KTHREAD)
    job.place(job.survey().workers[:2], set(), "fast")
    assert (cgroups / "fast/cgroup.threads").read_text() == "301"
    assert (cgroups / "fast/cgroup.procs").read_text() == "302"


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (errno.EOPNOTSUPP, "a thread moves only within .*/machine/vm/vhost/cgroup.type"),
        (errno.EBUSY, "gives controllers to its children"),
        (errno.EACCES, "be root"),
        (errno.EPERM, "be root"),
        (errno.EINVAL, "the kernel keeps this task"),
        (errno.ESRCH, "it has ended"),
    ],
)
def test_a_refused_move_says_why(
    cgroups: Path, monkeypatch: pytest.MonkeyPatch, error: int, hint: str
) -> None:
    def refuse(_path: Path, _text: str) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(KernelError, match=hint) as caught:
        worker.move(301, cgroups / "fast")
    assert caught.value.errno == error
    assert caught.value.target == f"{cgroups}/fast/cgroup.threads"


@pytest.mark.usefixtures("two_vms")
def test_the_document() -> None:
    document = json.loads(vhostctl("--json", "--pid", "300", "--interval", "0.001").stdout)
    assert document["schema"] == "vhostctl.workers/1"
    assert document["interval_ns"] > 0
    assert document["unserved"] == []
    assert document["workers"] == [
        {
            "tid": 301,
            "kind": "task",
            "name": "vhost-300",
            "owner": {"pid": 300, "command": "qemu"},
            "candidates": [{"fd": 9, "path": "/dev/vhost-net"}],
            "certain": True,
            "likely": 9,
            "cpu_ns": 301_000,
            "interval_cpu_ns": 0,
            "cpus": "0-3",
            "policy": "fifo",
            "priority": 7,
            "nice": -5,
            "cgroup": "/machine/vm",
        }
    ]


@pytest.mark.usefixtures("two_vms")
def test_a_change_must_say_whose() -> None:
    for change in (["--pin", "0"], ["--cgroup", "/"]):
        result = vhostctl(*change)
        assert result.exit_code == ExitCode.USAGE
        assert "TID, --pid or --all" in result.stderr
    assert vhostctl("--all", "--pid", "300").exit_code == ExitCode.USAGE
    assert vhostctl("--pin", "x", "--all").exit_code == ExitCode.USAGE
    assert vhostctl("--interval", "0").exit_code == ExitCode.USAGE


def test_nobody_to_show_or_to_move(proc: Proc) -> None:
    proc.task(300, "qemu")
    proc.descriptors(300, {9: "/dev/vhost-net"})
    result = vhostctl()
    assert result.exit_code == ExitCode.OK
    assert "no vhost worker\n300 (qemu) has fd 9 /dev/vhost-net" in result.stdout
    assert vhostctl("--pid", "300").exit_code == ExitCode.OK
    assert vhostctl("--pid", "300", "--pin", "0").exit_code == ExitCode.FAILED
    assert vhostctl("--pid", "301").exit_code == ExitCode.FAILED
