"""The device's side of a control queue, and a driver that adds commands while it works."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from vhostctl.abi import virtio
from vhostctl.control import access
from vhostctl.control.addressspace import AddressSpace
from vhostctl.control.features import mask
from vhostctl.control.rings import place_rings
from vhostctl.errors import InvalidArgument
from vhostctl.host.memory import MappedRegion
from vhostctl.vmm.ctrlqueue import ControlQueue

SIZE = 4
COMMANDS = 0x10000  # where command n is: one byte, then one for the answer


class Driver:
    """Adds commands of one byte, which is their number; `rung` counts its doorbells."""

    def __init__(self, space: AddressSpace, *features: int) -> None:
        self.space = space
        (self.ring,), _ = place_rings(0, 1, SIZE)
        self.queue = ControlQueue(space, self.ring, mask(*features))
        self.event_idx = virtio.VIRTIO_RING_F_EVENT_IDX in features
        self.added = 0
        self.rung = 0

    def add(self) -> None:
        at = COMMANDS + 2 * self.added
        head = 2 * (self.added % (SIZE // 2))
        access.write(self.space, at, bytes([self.added, 0xFF]))
        table = struct.pack("<QIHH", at, 1, virtio.VRING_DESC_F_NEXT, head + 1)
        table += struct.pack("<QIHH", at + 1, 1, virtio.VRING_DESC_F_WRITE, 0)
        access.write(self.space, self.ring.desc + 16 * head, table)
        entry = self.ring.avail + 4 + 2 * (self.added % SIZE)
        access.write(self.space, entry, struct.pack("<H", head))
        before, self.added = self.added, self.added + 1
        access.write(self.space, self.ring.avail + 2, struct.pack("<H", self.added))
        self.rung += not self.event_idx or self.word(self.ring.used + 4 + 8 * SIZE) == before

    def word(self, gpa: int) -> int:
        return int.from_bytes(access.read(self.space, gpa, 2), "little")

    def answers(self) -> bytes:
        return access.read(self.space, COMMANDS, 2 * self.added)[1::2]


@pytest.fixture
def space() -> Iterator[AddressSpace]:
    with MappedRegion.anonymous(0, 1 << 20) as memory:
        yield AddressSpace([memory])


def test_commands_are_answered_one_at_a_time(space: AddressSpace) -> None:
    driver = Driver(space)
    assert driver.queue.take(lambda _: b"\0") is None
    driver.add()
    driver.add()
    assert driver.queue.take(lambda command: command) is True
    assert driver.answers() == b"\0\xff"
    access.write(space, driver.ring.avail, struct.pack("<H", virtio.VRING_AVAIL_F_NO_INTERRUPT))
    assert driver.queue.take(lambda command: command) is False
    assert driver.answers() == b"\0\1"
    assert (driver.queue.base, driver.word(driver.ring.used + 2)) == (2, 2)
    assert driver.queue.take(lambda _: b"\0") is None


def test_a_command_added_meanwhile_is_seen_or_rung_for(space: AddressSpace) -> None:
    driver = Driver(space, virtio.VIRTIO_RING_F_EVENT_IDX)
    assert driver.queue.take(lambda _: b"\0") is None
    driver.add()
    assert driver.rung == 1

    def answer(command: bytes) -> bytes:
        if driver.added < 100:
            driver.add()
        return command

    while driver.queue.take(answer) is not None:
        pass
    assert driver.answers() == bytes(range(100))
    driver.add()
    assert driver.rung == 2


def test_the_driver_says_which_answer_it_wants_to_hear_of(space: AddressSpace) -> None:
    driver = Driver(space, virtio.VIRTIO_RING_F_EVENT_IDX)
    wanted = []
    for number in range(4):
        driver.add()
        used_event = driver.ring.avail + 4 + 2 * SIZE
        access.write(space, used_event, struct.pack("<H", 2 if number else 7))
        wanted.append(driver.queue.take(lambda command: command))
    assert wanted == [False, False, True, False]


def test_a_chain_without_an_end_is_malformed(space: AddressSpace) -> None:
    driver = Driver(space)
    driver.add()
    access.write(
        space, driver.ring.desc + 16, struct.pack("<QIHH", 0, 0, virtio.VRING_DESC_F_NEXT, 0)
    )
    with pytest.raises(InvalidArgument, match="a chain of more than"):
        driver.queue.take(lambda command: command)
