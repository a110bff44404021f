"""Workers of our devices: the right task is named, measured, pinned and moved."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.flow import Flow
from tests.system.conftest import until
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import KernelError
from vhostctl.host import worker
from vhostctl.host.vhost import ENGINE, VhostNet
from vhostctl.jobs import workers as job
from vhostctl.jobs.selftest import wire_config
from vhostctl.jobs.wire import Wire
from vhostctl.jobs.workers import Serving

pytestmark = pytest.mark.usefixtures("nothing_left")


def ours() -> list[Serving]:
    return [s for s in job.survey().workers if s.owner and s.owner.pid == os.getpid()]


def kinds(device: str) -> list[str | None]:
    """Return the kinds of worker that the device can be asked for; None: it cannot be asked."""
    with VhostNet.at(device) as probe:
        try:
            probe.get_fork_from_owner()
        except KernelError:
            return [None]
    return ["task", "kthread"]


@contextmanager
def owned(device: str, count: int) -> Iterator[dict[int, VhostNet]]:
    """Own so many devices; yield them by the task that each started."""
    with ExitStack() as stack:
        devices = [stack.enter_context(VhostNet.at(device)) for _ in range(count)]
        found = {}
        for each in devices:
            started = worker.own(each)
            assert started is not None
            found[started.tid] = each
        assert len(found) == count
        yield found


def said(*args: str) -> dict[str, Any]:
    """Return what `vhostctl workers` says of us; it runs in a process of its own."""
    argv = [sys.executable, "-m", "vhostctl", "workers", "--json", *args]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert isinstance(document, dict)
    return document


def test_each_device_has_its_worker(device: str) -> None:
    with owned(device, 3) as devices:
        found = {serving.tid: serving for serving in ours()}
        assert found.keys() == devices.keys()
        for tid, serving in found.items():
            assert serving.task.name == f"vhost-{threading.get_native_id()}"
            assert not serving.certain
            if device == ENGINE:
                assert (serving.task.worker.kind, serving.candidates) == ("engine", ())
            else:
                fds = [descriptor.fd for descriptor in serving.candidates or ()]
                assert fds == sorted(each.fileno() for each in devices.values())
                assert serving.likely is not None
                assert (serving.likely.fd, serving.likely.path) == (devices[tid].fileno(), device)
        # After a RESET_OWNER the worker is a new one, and the order says nothing any more.
        first, again = next(iter(devices.items()))
        again.reset_owner()
        until(lambda: first not in {serving.tid for serving in ours()}, "the first has ended")
        second = worker.own(again)
        assert second is not None
        assert second.tid in {serving.tid for serving in ours()}


def test_one_device_and_one_worker_belong_together(device: str) -> None:
    with owned(device, 1) as devices:
        (tid,) = devices
        (serving,) = ours()
        assert (serving.tid, serving.certain) == (tid, device != ENGINE)
        document = said("--pid", str(os.getpid()))
        (row,) = document["workers"]
        assert (row["tid"], row["owner"]["pid"]) == (tid, os.getpid())
        fds = [] if device == ENGINE else [{"fd": devices[tid].fileno(), "path": device}]
        assert row["candidates"] == fds
        assert document["unserved"] == []


def test_a_device_without_owner_is_unserved(device: str) -> None:
    with VhostNet.at(device) as unowned:
        mine = [p for p in job.survey().unserved if p.pid == os.getpid()]
        fds = [descriptor.fd for process in mine for descriptor in process.descriptors or ()]
        assert fds == ([] if device == ENGINE else [unowned.fileno()])


def test_the_caller_may_have_ended(device: str) -> None:
    """A kernel thread's name is all that leads to its owner; a thread's process is known."""
    with VhostNet.at(device) as one:
        found: list[worker.Worker | None] = []
        caller = threading.Thread(target=lambda: found.append(worker.own(one)))
        caller.start()
        caller.join()
        (started,) = found
        assert started is not None
        until(lambda: not Path(f"/proc/{caller.native_id}").exists(), "the caller is gone")
        task = worker.look(started.tid)
        assert task.name == f"vhost-{caller.native_id}"
        assert task.owner == (None if started.kind == "kthread" else os.getpid())
        one.reset_owner()


def test_both_kinds_are_named_and_take_time_under_traffic(device: str) -> None:
    for kind in kinds(device):
        config = SessionConfig("tap0", device, queues=2, queue_size=64, worker=kind)
        with Wire(wire_config(config)) as wire:
            found = ours()
            assert len(found) == 2
            if kind is not None:
                assert {serving.task.worker.kind for serving in found} == {kind}
            with Flow(wire) as flow:
                took = job.measure(found, 0.5)
                flow.go_on()
                assert flow.end() == []
            assert took.ns >= 500_000_000
            assert took.cpu_ns.keys() == {serving.tid for serving in found}
            assert 0 < sum(took.cpu_ns.values()) < 2 * took.ns
            total = {serving.tid: serving.task.cpu_ns for serving in ours()}
            assert all(total[serving.tid] > serving.task.cpu_ns for serving in found)


def allowed(tid: int) -> str:
    status = Path(f"/proc/{tid}/status").read_text()
    return status.partition("Cpus_allowed_list:")[2].split()[0]


def test_pinning_shows_and_traffic_goes_on(device: str) -> None:
    for kind in kinds(device):
        config = SessionConfig("tap0", device, queues=2, queue_size=64, worker=kind)
        with Wire(wire_config(config)) as wire, Flow(wire) as flow:
            one, other = ours()
            for cpu in sorted(os.sched_getaffinity(0)):
                before = allowed(one.tid)
                (row,) = said(str(other.tid), "--pin", str(cpu))["workers"]
                assert (row["tid"], row["cpus"]) == (other.tid, str(cpu))
                assert (allowed(other.tid), allowed(one.tid)) == (str(cpu), before)
                flow.go_on()
            job.place([one, other], os.sched_getaffinity(0), None)
            assert allowed(one.tid) == allowed(other.tid) == allowed(os.getpid())
            assert flow.end() == []


def test_a_cpu_that_is_not_there(device: str) -> None:
    with owned(device, 1) as devices:
        (tid,) = devices
        with pytest.raises(KernelError, match="none of these CPUs is online"):
            worker.pin(tid, {8000})


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup below the one that we are in."""
    mine = Path("/proc/self/cgroup").read_text().partition("0::/")[2].split("\n")[0]
    folder = worker.cgroup_folder(mine) / f"vhostctl-test-{os.getpid()}"
    folder.mkdir()
    yield folder

    def removed() -> bool:
        with suppress(OSError):  # EBUSY until the kernel has forgotten the worker
            folder.rmdir()
        return not folder.exists()

    until(removed, f"{folder} is empty")


def test_moving_shows_and_traffic_goes_on(device: str, cgroup: Path) -> None:
    name = f"/{cgroup.relative_to(worker.cgroup_folder('/'))}"
    for kind in kinds(device):
        config = SessionConfig("tap0", device, queue_size=64, worker=kind)
        with Wire(wire_config(config)) as wire, Flow(wire) as flow:
            (serving,) = ours()
            if serving.task.worker.kind != "kthread" and not is_threaded(cgroup):
                # As the kernel has it, a thread does not leave its process's cgroup for this one.
                with pytest.raises(KernelError, match=r"mkdir .* && echo threaded") as caught:
                    job.place([serving], set(), name)
                assert caught.value.errno == errno.EOPNOTSUPP
                assert worker.look(serving.tid).cgroup == serving.task.cgroup
                (cgroup / "cgroup.type").write_text("threaded")
            (row,) = said(str(serving.tid), "--cgroup", name)["workers"]
            assert row["cgroup"] == name
            assert f"0::{name}\n" in Path(f"/proc/{serving.tid}/cgroup").read_text()
            assert f"0::{name}\n" not in Path("/proc/self/cgroup").read_text()
            flow.go_on()
            assert flow.end() == []


def is_threaded(cgroup: Path) -> bool:
    return (cgroup / "cgroup.type").read_text() == "threaded\n"


def test_a_worker_that_ends_while_it_is_measured(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with owned(device, 2) as devices:
        found = ours()
        gone = next(iter(devices))

        def end(_: float) -> None:
            devices[gone].close()
            until(lambda: gone not in {serving.tid for serving in ours()}, "it has ended")

        clock = SimpleNamespace(sleep=end, monotonic_ns=time.monotonic_ns)
        monkeypatch.setattr("vhostctl.jobs.workers.time", clock)
        took = job.measure(found, 1)
        assert took.cpu_ns.keys() == devices.keys() - {gone}
