"""Every request that VhostNet has a method for, on the real device."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys

import pytest

from vhostctl.abi import vhost, virtio
from vhostctl.control.memtable import GuestRegion
from vhostctl.control.probe import probe
from vhostctl.errors import KernelError
from vhostctl.host.eventfd import EventFd
from vhostctl.host.memory import GuestMemory
from vhostctl.host.vhost import VhostNet
from vhostctl.host.worker import workers

pytestmark = pytest.mark.usefixtures("nothing_left")


def refused(number: int) -> pytest.RaisesExc[KernelError]:
    return pytest.RaisesExc(KernelError, check=lambda error: error.errno == number)


def test_before_there_is_an_owner_only_features_are_answered() -> None:
    with VhostNet.open() as device:
        features = device.get_features()
        assert features >> virtio.VIRTIO_F_VERSION_1 & 1
        device.set_features(features & ~(1 << virtio.VIRTIO_F_ACCESS_PLATFORM))
        with pytest.raises(PermissionError, match="VHOST_SET_VRING_NUM on /dev/vhost-net queue 0"):
            device.set_vring_num(0, 256)


def test_a_bit_that_is_not_offered_is_refused() -> None:
    with VhostNet.open() as device, refused(errno.EOPNOTSUPP):
        device.set_features(1 << virtio.VIRTIO_NET_F_MAC)


def test_one_owner_at_a_time_and_reset_gives_it_up() -> None:
    with VhostNet.open() as device:
        before = workers()
        device.set_owner()
        assert len(workers() - before) == 1
        with refused(errno.EBUSY):
            device.set_owner()
        device.reset_owner()
        device.set_owner()


def test_ring_state_comes_back_as_it_was_set() -> None:
    with VhostNet.open() as device:
        device.set_owner()
        for queue in (0, 1):
            for base in (0, 1, 65535):
                device.set_vring_base(queue, base)
                assert device.get_vring_base(queue) == base
            device.set_vring_busyloop_timeout(queue, 50 + queue)
            assert device.get_vring_busyloop_timeout(queue) == 50 + queue
            for size in (1, 32768):
                device.set_vring_num(queue, size)
            for size in (0, 3, 65536):
                with refused(errno.EINVAL):
                    device.set_vring_num(queue, size)
        with refused(errno.ENOBUFS):
            device.set_vring_num(2, 256)


def test_eventfds_are_bound_and_unbound() -> None:
    with VhostNet.open() as device, EventFd.create() as event:
        device.set_owner()
        for bind in (device.set_vring_kick, device.set_vring_call, device.set_vring_err):
            bind(0, event.fileno())
            bind(0, None)
            with refused(errno.EBADF):
                bind(0, 1 << 20)
            with open(os.devnull) as file, refused(errno.EINVAL):
                bind(0, file.fileno())
        device.set_log_fd(event.fileno())
        device.set_log_fd(None)


def test_memory_table_and_its_limit() -> None:
    with GuestMemory.anonymous(1 << 20) as memory, VhostNet.open() as device:
        device.set_owner()
        device.set_mem_table(memory.regions)
        device.set_mem_table([])
        hva = memory.regions[0].hva
        with pytest.raises(KernelError, match=r"E2BIG.*max_mem_regions"):
            device.set_mem_table([GuestRegion(n << 12, 4096, hva) for n in range(4096)])


def test_rings_are_placed() -> None:
    with GuestMemory.anonymous(1 << 20) as memory, VhostNet.open() as device:
        device.set_owner()
        hva = memory.regions[0].hva
        device.set_vring_num(1, 64)
        device.set_vring_addr(1, desc=hva, avail=hva + 4096, used=hva + 8192)
        device.set_vring_addr(1, desc=hva, avail=hva + 4096, used=hva + 8192, log_gpa=8192)
        with refused(errno.EINVAL):
            device.set_vring_addr(1, desc=hva, avail=hva + 1, used=hva + 8192)


def test_backend_must_be_a_socket_of_the_right_kind() -> None:
    with GuestMemory.anonymous(1 << 20) as memory, VhostNet.open() as device:
        device.set_owner()
        device.set_mem_table(memory.regions)
        hva = memory.regions[0].hva
        device.set_vring_num(0, 64)
        device.set_vring_addr(0, desc=hva, avail=hva + 4096, used=hva + 8192)
        with open(os.devnull) as file, refused(errno.ENOTSOCK):
            device.set_backend(0, file.fileno())
        device.set_backend(0, None)


def test_newer_requests_are_answered_or_unknown() -> None:
    with VhostNet.open() as device:
        offered = device.get_features()
        with contextlib.suppress(KernelError):
            assert device.get_features_array() & (1 << 64) - 1 == offered
        assert device.get_backend_features() >> vhost.VHOST_BACKEND_F_IOTLB_MSG_V2 & 1
        device.set_backend_features(1 << vhost.VHOST_BACKEND_F_IOTLB_MSG_V2)
        try:
            task = device.get_fork_from_owner()
        except PermissionError:  # unknown before there is an owner, on Linux 6.1
            return
        device.set_fork_from_owner(not task)
        assert device.get_fork_from_owner() is not task
        before = workers()
        device.set_owner()
        assert {worker.kind for worker in workers() - before} == {"kthread" if task else "task"}


def test_the_owner_is_an_address_space_not_a_descriptor() -> None:
    code = (
        "import sys; from vhostctl.host.vhost import VhostNet; from vhostctl.host.node import *\n"
        "class Passed(DeviceNode):\n"
        "    def __init__(self, fd): Handle.__init__(self, fd, 'passed')\n"
        "try: VhostNet(Passed(int(sys.argv[1]))).get_vring_base(0)\n"
        "except PermissionError as error: print(error)\n"
    )
    with VhostNet.open() as device:
        device.set_owner()
        device.get_vring_base(0)
        run = subprocess.run(
            [sys.executable, "-c", code, str(device.fileno())],
            pass_fds=[device.fileno()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert "only the process that called VHOST_SET_OWNER" in run.stdout, run.stderr


def test_probe_tells_answered_from_unknown() -> None:
    report = probe()
    assert report.requests["VHOST_SET_OWNER"]
    assert report.requests["VHOST_SET_VRING_NUM"]
    assert report.requests["VHOST_NET_SET_BACKEND"]
    assert not report.requests["VHOST_NEW_WORKER"]
    assert not report.requests["VHOST_SET_VRING_ENDIAN"]
    assert "VIRTIO_F_VERSION_1" in report.feature_names
    assert report.worker in ("kthread", "task")
    assert report.max_mem_regions >= 64
