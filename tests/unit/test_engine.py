"""The embedded engine: what it needs, what it holds, and what it gives back."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.conftest import until
from vhostctl.abi import vhost, virtio
from vhostctl.conformance.ring import RawRing
from vhostctl.engine.device import Engine
from vhostctl.errors import ClosedError, KernelError, KernelPermissionError, StateError
from vhostctl.host.eventfd import EventFd
from vhostctl.host.memory import GuestMemory
from vhostctl.host.vhost import RX, TX, VhostNet
from vhostctl.host.worker import workers

GPA = 0x10_0000
NOWHERE = 1 << 57


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine("engine") as engine:
        yield engine


@pytest.fixture
def device() -> Iterator[VhostNet]:
    with VhostNet.embedded() as device:
        yield device


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def in_child(body: object) -> int:
    """Return the exit status of a forked child that calls `body`."""
    child = os.fork()
    if child == 0:
        try:
            assert callable(body)
            body()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_it_answers_as_a_node_does(device: VhostNet) -> None:
    assert device.label == "engine"
    assert device.get_features() & 1 << virtio.VIRTIO_F_VERSION_1
    device.set_owner()
    with pytest.raises(KernelError) as caught:
        device.set_owner()
    assert caught.value.errno == errno.EBUSY
    assert "VHOST_SET_OWNER on engine" in str(caught.value)


def test_an_argument_is_a_pointer_an_address_or_nothing(engine: Engine) -> None:
    features = ctypes.c_uint64()
    assert engine.ioctl(vhost.VHOST_GET_FEATURES, features) == 0
    copy = ctypes.c_uint64()
    assert engine.ioctl(vhost.VHOST_GET_FEATURES, ctypes.addressof(copy)) == 0
    assert features.value == copy.value != 0
    for address in (None, 0, 8, NOWHERE, (1 << 64) - 8):
        with pytest.raises(OSError) as caught:  # noqa: PT011 - its errno is looked at
            engine.ioctl(vhost.VHOST_GET_FEATURES, address)
        assert caught.value.errno == errno.EFAULT


def test_memory_that_ends_in_the_middle_of_an_argument_is_a_bad_address(engine: Engine) -> None:
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    pages = libc.mmap(None, 8192, 3, 0x22, -1, 0)
    libc.munmap(ctypes.c_void_p(pages + 4096), 4096)
    engine.ioctl(vhost.VHOST_SET_FEATURES, pages + 4096 - 8)
    for short in range(1, 8):
        with pytest.raises(OSError) as caught:  # noqa: PT011 - its errno is looked at
            engine.ioctl(vhost.VHOST_SET_FEATURES, pages + 4096 - short)
        assert caught.value.errno == errno.EFAULT
    libc.munmap(ctypes.c_void_p(pages), 4096)


def test_the_worker_is_a_thread_of_this_process(device: VhostNet, engine: Engine) -> None:
    before = workers()
    assert engine.worker() is None
    engine.ioctl(vhost.VHOST_SET_OWNER, None)
    device.set_owner()
    tid = engine.worker()
    assert tid in {found.tid for found in workers() - before}
    assert len(workers() - before) == 2
    name = Path(f"/proc/self/task/{tid}/comm").read_text().strip()
    assert name == f"vhost-{threading.get_native_id()}"[:15]
    device.reset_owner()
    engine.ioctl(vhost.VHOST_RESET_OWNER, None)
    until(lambda: workers() == before, "both have left /proc")
    assert engine.worker() is None


def test_the_worker_takes_no_signals(engine: Engine) -> None:
    engine.ioctl(vhost.VHOST_SET_OWNER, None)
    status = Path(f"/proc/self/task/{engine.worker()}/status").read_text()
    blocked = int(status.split("SigBlk:")[1].split()[0], 16)
    for number in (1, 2, 3, 10, 12, 13, 14, 15, 17, 28):
        assert blocked >> (number - 1) & 1


def test_what_it_holds_it_gives_back() -> None:
    before, threads = descriptors(), workers()
    for _ in range(3):
        with VhostNet.embedded() as device, EventFd.create() as event:
            device.set_owner()
            for _ in range(3):
                device.set_vring_kick(RX, event.fileno())
                device.set_vring_call(TX, event.fileno())
                device.set_vring_err(TX, event.fileno())
                device.set_log_fd(event.fileno())
            device.set_vring_kick(RX, None)
            device.reset_owner()
            device.set_owner()
    assert descriptors() == before
    until(lambda: workers() == threads, "each has left /proc")


def test_out_of_descriptors_it_says_so() -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(descriptors()) - 1, limits[1]))
    try:
        with pytest.raises(KernelError) as caught:
            Engine("engine")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE
    assert "ulimit" in str(caught.value)


def test_close_twice_and_use_after_it() -> None:
    engine = Engine("engine")
    engine.close()
    engine.close()
    assert engine.closed
    for use in (
        engine.fileno,
        engine.worker,
        lambda: engine.stats(RX),
        lambda: engine.read(72),
        lambda: engine.write(b""),
        lambda: engine.ioctl(vhost.VHOST_SET_OWNER, None),
    ):
        with pytest.raises(ClosedError, match="engine is closed"):
            use()


def test_it_cannot_be_handed_over(device: VhostNet) -> None:
    with pytest.raises(StateError, match="cannot be handed over"):
        device.detach()


def test_one_that_nobody_closed_says_so() -> None:
    kept = [Engine("forgotten")]
    with pytest.warns(ResourceWarning, match="forgotten was never closed"):
        kept.clear()


def test_a_ring_that_there_is_not_has_no_stats(engine: Engine) -> None:
    assert engine.stats(RX) == engine.stats(TX)
    with pytest.raises(OSError, match="buffer space"):
        engine.stats(2)


@pytest.mark.parametrize("made", [socket.socketpair, os.pipe, None], ids=["unix", "pipe", "null"])
def test_only_taps_and_packet_sockets_are_backends(device: VhostNet, made: object) -> None:
    if callable(made):
        ends = made()
    else:
        ends = (os.open("/dev/null", os.O_RDWR), os.open("/dev/zero", os.O_RDWR))
    numbers = [end if isinstance(end, int) else end.fileno() for end in ends]
    before = descriptors()
    with GuestMemory([(GPA, 1 << 16)]) as memory:
        device.set_owner()
        device.set_mem_table(memory.regions)
        ring = RawRing(memory.regions[0].hva, 8)
        device.set_vring_num(TX, ring.num)
        device.set_vring_addr(TX, desc=ring.desc, avail=ring.avail, used=ring.used)
        for number in numbers:
            with pytest.raises(KernelError) as caught:
                device.set_backend(TX, number)
            assert caught.value.errno == errno.ENOTSOCK
        device.reset_owner()
    assert descriptors() == before
    for end in ends:
        if isinstance(end, int):
            os.close(end)
        else:
            end.close()


def test_an_eventfd_is_what_has_its_name(device: VhostNet) -> None:
    device.set_owner()
    reader, writer = os.pipe()
    for number, expected in ((reader, errno.EINVAL), (-2, errno.EBADF), (9999, errno.EBADF)):
        with pytest.raises(KernelError) as caught:
            device.set_vring_call(RX, number)
        assert caught.value.errno == expected
    os.close(reader)
    os.close(writer)


def test_messages_are_taken_where_none_waits(device: VhostNet) -> None:
    poll = select.poll()
    poll.register(device.fileno(), select.POLLIN | select.POLLOUT)
    assert poll.poll(0) == []
    with pytest.raises(BlockingIOError):
        device.read(72)
    assert device.read(71) == b""
    device.set_features(1 << virtio.VIRTIO_F_VERSION_1 | 1 << virtio.VIRTIO_F_ACCESS_PLATFORM)
    message = vhost.vhost_msg_v2(type=vhost.VHOST_IOTLB_MSG_V2)
    message.iotlb.size = 4096
    message.iotlb.uaddr = 4096
    message.iotlb.perm = vhost.VHOST_ACCESS_RW
    message.iotlb.type = vhost.VHOST_IOTLB_UPDATE
    assert device.write(bytes(message)) == 72


def test_a_child_does_not_own_it(device: VhostNet) -> None:
    device.set_owner()

    def body() -> None:
        assert device.get_features()
        with pytest.raises(KernelPermissionError):
            device.set_vring_num(RX, 8)
        with pytest.raises(KernelError) as caught:
            device.set_owner()
        assert caught.value.errno == errno.EBUSY

    assert in_child(body) == 0


def test_a_child_can_close_it_and_make_its_own(device: VhostNet) -> None:
    with EventFd.create() as kick:
        device.set_owner()
        device.set_vring_kick(RX, kick.fileno())
        held = len(descriptors())

        def body() -> None:
            device.close()
            assert len(descriptors()) < held
            with VhostNet.embedded() as own:
                own.set_owner()
                own.set_vring_kick(RX, kick.fileno())
                own.set_vring_num(RX, 8)

        for _ in range(3):
            assert in_child(body) == 0
        device.set_vring_num(RX, 8)
        device.set_vring_kick(RX, None)
    device.reset_owner()


def test_a_child_can_close_it_whatever_was_locked(device: VhostNet) -> None:
    """Forks meet requests in another thread, with the locks of the device taken."""
    device.set_owner()
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            device.set_vring_busyloop_timeout(TX, 0)
            device.set_log_fd(None)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(50):
            assert in_child(device.close) == 0
    finally:
        ended.set()
        thread.join()


def test_requests_from_many_threads(device: VhostNet) -> None:
    device.set_owner()

    def ask(queue: int) -> None:
        for number in range(200):
            device.set_vring_base(queue, number)
            device.get_vring_base(queue)
            with EventFd.create() as event:
                device.set_vring_kick(queue, event.fileno())
                device.set_vring_call(queue, event.fileno())
            device.set_vring_kick(queue, None)

    threads = [threading.Thread(target=ask, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_closing_it_ends_a_worker_that_has_work(device: VhostNet) -> None:
    """Kicks without end, while the ring that they are for is set up and torn down."""
    ended = threading.Event()
    with EventFd.create() as kick, GuestMemory([(GPA, 1 << 16)]) as memory:

        def ring_the_bell() -> None:
            while not ended.is_set():
                kick.signal()

        thread = threading.Thread(target=ring_the_bell)
        thread.start()
        try:
            for _ in range(20):
                with VhostNet.embedded() as other:
                    other.set_owner()
                    other.set_mem_table(memory.regions)
                    other.set_vring_kick(TX, kick.fileno())
        finally:
            ended.set()
            thread.join()
    assert device.get_features()
