"""Who owns a device, and what giving it up undoes."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from vhostctl.abi import vhost, virtio
from vhostctl.conformance.case import case
from vhostctl.conformance.cases.support import (
    ask,
    elsewhere,
    file_of,
    has_link,
    invalidate,
    is_running,
    owned,
    running,
)
from vhostctl.conformance.target import Target
from vhostctl.host.vhost import RX, TX
from vhostctl.host.worker import workers

SET_OWNER, RESET_OWNER = vhost.VHOST_SET_OWNER, vhost.VHOST_RESET_OWNER
NOTHING = invalidate(0, 4096)
PLATFORM = 1 << virtio.VIRTIO_F_ACCESS_PLATFORM


@case("SET_OWNER works once: again it is EBUSY, also for the owner.")
def set_twice(target: Target) -> None:
    device = target.open()
    target.check("first", ask(target, device, SET_OWNER), "")
    target.check("second", ask(target, device, SET_OWNER), "EBUSY")


@case("SET_OWNER of another process is EBUSY while there is an owner.")
def set_elsewhere(target: Target) -> None:
    device = owned(target)
    target.check("second", elsewhere(lambda: ask(target, device, SET_OWNER)), "EBUSY")


@case("SET_OWNER while a ring runs is EBUSY, and the ring goes on.")
def set_running(target: Target) -> None:
    device = running(target).device
    target.check("second", ask(target, device, SET_OWNER), "EBUSY")
    target.check("runs", is_running(target, device, RX), True)


@case("RESET_OWNER without an owner is EPERM.")
def reset_unowned(target: Target) -> None:
    device = target.open()
    target.check("fresh", ask(target, device, RESET_OWNER), "EPERM")
    device.set_owner()
    device.reset_owner()
    target.check("second", ask(target, device, RESET_OWNER), "EPERM")


@case("RESET_OWNER of another process is EPERM and changes nothing.")
def reset_elsewhere(target: Target) -> None:
    device = owned(target)
    target.check("reset", elsewhere(lambda: ask(target, device, RESET_OWNER)), "EPERM")
    target.check("owner still", target.refused(lambda: device.get_vring_base(RX)), "")


@case("After RESET_OWNER the same process may own the device again, many times.")
def own_again(target: Target) -> None:
    device = target.open()
    for _ in range(20):
        device.set_owner()
        device.reset_owner()
    target.check("again", ask(target, device, SET_OWNER), "")


@case("After RESET_OWNER nobody is the owner.")
def nobody(target: Target) -> None:
    device = owned(target)
    device.reset_owner()
    target.check("base", target.refused(lambda: device.get_vring_base(RX)), "EPERM")


@case("After RESET_OWNER another process may own the device.", needs=("node",))
def hand_over(target: Target) -> None:
    device = owned(target)
    device.reset_owner()

    def there() -> list[str]:
        taken = ask(target, device, SET_OWNER)
        base = target.refused(lambda: device.get_vring_base(RX))
        return [taken, base, ask(target, device, RESET_OWNER)]

    target.check("other: own, use, reset", elsewhere(there), ["", "", ""])
    target.check("back", ask(target, device, SET_OWNER), "")


@case("An owner that ended without RESET_OWNER stays the owner: EPERM, EBUSY.", needs=("node",))
def owner_gone(target: Target) -> None:
    device = target.open()
    target.check("other", elsewhere(lambda: ask(target, device, SET_OWNER)), "")
    target.check("own", ask(target, device, SET_OWNER), "EBUSY")
    target.check("reset", ask(target, device, RESET_OWNER), "EPERM")
    target.check("base", target.refused(lambda: device.get_vring_base(RX)), "EPERM")


@case("The owner is an address space: a thread of the owner is the owner.")
def thread(target: Target) -> None:
    device = owned(target)
    with ThreadPoolExecutor(1) as pool:
        base = pool.submit(target.refused, lambda: device.get_vring_base(RX)).result()
        again = pool.submit(ask, target, device, SET_OWNER).result()
        reset = pool.submit(ask, target, device, RESET_OWNER).result()
    target.check("base", base, "")
    target.check("own", again, "EBUSY")
    target.check("reset", reset, "")


@case("What a thread owned, the process owns when the thread has ended.")
def thread_gone(target: Target) -> None:
    device = target.open()
    with ThreadPoolExecutor(1) as pool:
        target.check("own", pool.submit(ask, target, device, SET_OWNER).result(), "")
    target.check("base", target.refused(lambda: device.get_vring_base(RX)), "")
    target.check("reset", ask(target, device, RESET_OWNER), "")


_AFTER_EXEC = """
import errno, fcntl, json, os, sys
device, pipe = int(sys.argv[1]), int(sys.argv[2])
def ask(number):
    try:
        fcntl.ioctl(device, number, bytearray(64))
    except OSError as error:
        return errno.errorcode[error.errno]
    return ""
os.write(pipe, json.dumps([ask(int(number)) for number in sys.argv[3:]]).encode())
"""


@case("exec() by the owner gives up the address space: EPERM, and the device stays owned: EBUSY.",
      needs=("node",))  # fmt: skip
def after_exec(target: Target) -> None:
    numbers = (vhost.VHOST_GET_VRING_BASE.number, SET_OWNER.number, RESET_OWNER.number)
    device = target.open()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            device.set_owner()
            for fd in (device.fileno(), writer):
                os.set_inheritable(fd, True)
            args = [str(n) for n in (device.fileno(), writer, *numbers)]
            os.execv(  # noqa: S606 -- no shell is wanted
                sys.executable, [sys.executable, "-I", "-S", "-c", _AFTER_EXEC, *args]
            )
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as answers:
        found = json.loads(answers.read() or b"[]")
    os.waitpid(child, 0)
    target.check("base, own, reset", found, ["EPERM", "EBUSY", "EPERM"])


@case("SET_OWNER starts one worker and RESET_OWNER ends it.", needs=("node",))
def worker_of_owner(target: Target) -> None:
    device, before = target.open(), len(workers())
    device.set_owner()
    target.check("owned", len(workers()) - before, 1)
    device.reset_owner()
    target.check("reset", len(workers()) - before, 0)


@case("The worker has ended when close() returns.", needs=("node",))
def worker_of_closed(target: Target) -> None:
    device, before = owned(target), len(workers())
    device.close()
    target.check("closed", len(workers()) - before, -1)


@case("RESET_OWNER stops running rings and lets go of the tap.")
def reset_running(target: Target) -> None:
    rig = running(target)
    link = rig.wire.link
    target.check("reset", ask(target, rig.device, RESET_OWNER), "")
    rig.device.set_owner()
    for queue in (RX, TX):
        target.check(f"runs {queue}", is_running(target, rig.device, queue), False)
    rig.wire.close()
    target.check("link", has_link(link), False)


@case("RESET_OWNER forgets base, busy-poll time and size of each ring.")
def reset_rings(target: Target) -> None:
    device = owned(target)
    for queue in (RX, TX):
        device.set_vring_num(queue, 256)
        device.set_vring_base(queue, 77)
        device.set_vring_busyloop_timeout(queue, 50)
    device.reset_owner()
    device.set_owner()
    for queue in (RX, TX):
        target.check(f"base {queue}", device.get_vring_base(queue), 0)
        target.check(f"busy-poll {queue}", device.get_vring_busyloop_timeout(queue), 0)


@case("RESET_OWNER leaves IOTLB mode.")
def reset_features(target: Target) -> None:
    device = owned(target)
    device.set_features(PLATFORM)
    target.check("before", target.refused(lambda: device.write_message(NOTHING)), "")
    device.reset_owner()
    target.check("after", target.refused(lambda: device.write_message(NOTHING)), "EFAULT")


@case("RESET_OWNER leaves a memory table without regions, not none.")
def reset_memory(target: Target) -> None:
    device = owned(target)
    stop = (vhost.VHOST_NET_SET_BACKEND, file_of(RX, -1))
    target.check("no table", ask(target, device, *stop), "EFAULT")
    device.reset_owner()
    device.set_owner()
    target.check("empty table", ask(target, device, *stop), "")


@case("Features that were set before there was an owner stay.")
def kept_features(target: Target) -> None:
    device = target.open()
    device.set_features(PLATFORM)
    device.set_owner()
    target.check("IOTLB mode", target.refused(lambda: device.write_message(NOTHING)), "")


@case("Two devices of one process have nothing in common.")
def two_devices(target: Target) -> None:
    first, second = owned(target), target.open()
    target.check("second unowned", target.refused(lambda: second.get_vring_base(RX)), "EPERM")
    second.set_owner()
    first.set_vring_base(RX, 11)
    second.set_vring_base(RX, 22)
    target.check("bases", [d.get_vring_base(RX) for d in (first, second)], [11, 22])
    first.reset_owner()
    target.check("second owned", target.refused(lambda: second.get_vring_base(RX)), "")


@case("SET_OWNER and RESET_OWNER ignore their argument.")
def arguments(target: Target) -> None:
    device = target.open()
    target.check("own", ask(target, device, SET_OWNER, 1 << 60), "")
    target.check("reset", ask(target, device, RESET_OWNER, 1 << 60), "")
