"""Size, base, addresses and busy-poll time of a ring: values, and when they may change."""

from __future__ import annotations

import mmap
from functools import partial

from vhostctl.abi import vhost, virtio
from vhostctl.conformance.case import case
from vhostctl.conformance.cases.support import (
    BAD,
    MISSING_RING,
    Edge,
    ask,
    owned,
    protect,
    running,
    state_of,
    stopped,
    update,
)
from vhostctl.conformance.rig import V1
from vhostctl.conformance.target import Target
from vhostctl.host.vhost import RX, TX, VhostNet

NUM, BASE = vhost.VHOST_SET_VRING_NUM, vhost.VHOST_SET_VRING_BASE
GET_BASE, ADDR = vhost.VHOST_GET_VRING_BASE, vhost.VHOST_SET_VRING_ADDR
SET_POLL = vhost.VHOST_SET_VRING_BUSYLOOP_TIMEOUT
GET_POLL = vhost.VHOST_GET_VRING_BUSYLOOP_TIMEOUT
ENDIAN = (vhost.VHOST_SET_VRING_ENDIAN, vhost.VHOST_GET_VRING_ENDIAN)
PLATFORM = 1 << virtio.VIRTIO_F_ACCESS_PLATFORM


def _addr(
    target: Target,
    device: VhostNet,
    *,
    flags: int = 0,
    desc: int = 0x1000,
    avail: int = 0x2000,
    used: int = 0x3000,
    log: int = 0,
) -> str:
    argument = vhost.vhost_vring_addr(
        index=TX,
        flags=flags,
        desc_user_addr=desc,
        avail_user_addr=avail,
        used_user_addr=used,
        log_guest_addr=log,
    )
    return ask(target, device, ADDR, argument)


@case("A ring's size is a power of two up to 32768.")
def sizes(target: Target) -> None:
    device = owned(target)
    for power in range(16):
        found = ask(target, device, NUM, state_of(RX, 1 << power))
        target.check(f"{1 << power}", found, "")


@case("Any other size is EINVAL.")
def wrong_sizes(target: Target) -> None:
    device = owned(target)
    for size in (0, 3, 100, 32767, 65535, 65536, 1 << 31, 2**32 - 1):
        target.check(f"{size}", ask(target, device, NUM, state_of(RX, size)), "EINVAL")


@case("SET_VRING_NUM is EBUSY while the ring runs, before the size is read.")
def size_busy(target: Target) -> None:
    rig, edge = running(target), target.keep(Edge())
    for queue in (RX, TX):
        target.check(f"size, {queue}", ask(target, rig.device, NUM, edge.words(queue)), "EBUSY")
    target.check("no ring", ask(target, rig.device, NUM, edge.words(MISSING_RING)), "ENOBUFS")


@case("SET_VRING_BASE is EBUSY while the ring runs, before the base is read.")
def base_busy(target: Target) -> None:
    rig, edge = running(target), target.keep(Edge())
    for queue in (RX, TX):
        target.check(f"base, {queue}", ask(target, rig.device, BASE, edge.words(queue)), "EBUSY")


@case("One ring's running leaves the other's size and base free to be set.")
def other_ring(target: Target) -> None:
    rig = running(target)
    rig.rx.stop()
    target.check("size", ask(target, rig.device, NUM, state_of(RX, 128)), "")
    target.check("base", ask(target, rig.device, BASE, state_of(RX, 5)), "")
    target.check("running", ask(target, rig.device, BASE, state_of(TX, 5)), "EBUSY")


@case("The rest of an argument that is not there is EFAULT, for each request of a ring.")
def short_arguments(target: Target) -> None:
    device, edge = owned(target), target.keep(Edge())
    for request in (NUM, BASE, ADDR, GET_BASE, SET_POLL, GET_POLL):
        target.check(request.name, ask(target, device, request, edge.words(RX)), "EFAULT")
    target.check("ADDR, 36 bytes", ask(target, device, ADDR, edge.words(*[0] * 9)), "EFAULT")
    target.check("ADDR, 40 bytes", ask(target, device, ADDR, edge.words(*[0] * 10)), "")


@case("A base is 16 bits: more is EINVAL.")
def wrong_bases(target: Target) -> None:
    device = owned(target)
    device.set_vring_base(TX, 9)
    for base in (65536, 1 << 31, 2**32 - 1):
        target.check(f"{base}", ask(target, device, BASE, state_of(TX, base)), "EINVAL")
    target.check("base", device.get_vring_base(TX), 9)


@case("GET_VRING_BASE gives back what was set, whatever the size of the ring.")
def bases(target: Target) -> None:
    device = owned(target)
    device.set_vring_num(TX, 4)
    for base in (0, 1, 4, 32768, 65535):
        device.set_vring_base(TX, base)
        target.check(f"{base}", device.get_vring_base(TX), base)
    target.check("other ring", device.get_vring_base(RX), 0)


@case("SET_VRING_NUM leaves the base alone.")
def base_stays(target: Target) -> None:
    device = owned(target)
    device.set_vring_base(RX, 1234)
    device.set_vring_num(RX, 64)
    target.check("base", device.get_vring_base(RX), 1234)


@case("GET_VRING_BASE writes the ring's index too, and works while the ring runs.")
def base_index(target: Target) -> None:
    rig = running(target)
    for queue in (RX, TX):
        state = state_of(queue, 2**32 - 1)
        target.check(f"answer {queue}", ask(target, rig.device, GET_BASE, state), "")
        target.check(f"state {queue}", [state.index, state.num], [queue, 0])


@case("GET_VRING_BASE into memory that cannot be written is EFAULT.")
def base_read_only(target: Target) -> None:
    device, edge = owned(target), target.keep(Edge())
    address = edge.words(RX, 0)
    protect(address & -mmap.PAGESIZE, mmap.PAGESIZE, 1)
    target.check("base", ask(target, device, GET_BASE, address), "EFAULT")
    target.check("busy-poll", ask(target, device, GET_POLL, address), "EFAULT")
    target.check("set", ask(target, device, BASE, address), "")


@case("SET_VRING_ADDR knows one flag; any other is EOPNOTSUPP before the addresses are judged.")
def address_flags(target: Target) -> None:
    device = owned(target)
    for flags in (2, 3, 1 << 31):
        found = _addr(target, device, flags=flags, avail=1, used=1, log=1)
        target.check(f"flags {flags:#x}", found, "EOPNOTSUPP")
    target.check("log", _addr(target, device, flags=1), "")


@case("The avail ring is aligned to 2 bytes, the used ring to 4, else EINVAL.")
def alignment(target: Target) -> None:
    device = owned(target)
    target.check("avail 1", _addr(target, device, avail=0x2001), "EINVAL")
    target.check("avail 2", _addr(target, device, avail=0x2002), "")
    for low in (1, 2, 3):
        target.check(f"used {low}", _addr(target, device, used=0x3000 + low), "EINVAL")
    target.check("used 4", _addr(target, device, used=0x3004), "")


@case("The descriptor table needs no alignment.")
def desc_alignment(target: Target) -> None:
    device = owned(target)
    for low in (1, 2, 4, 8):
        target.check(f"desc {low}", _addr(target, device, desc=0x1000 + low), "")


@case("The log address is aligned to 4 bytes, also if its flag is off, else EINVAL.")
def log_alignment(target: Target) -> None:
    device = owned(target)
    for flags in (0, 1):
        for low, want in ((1, "EINVAL"), (2, "EINVAL"), (3, "EINVAL"), (4, "")):
            found = _addr(target, device, flags=flags, log=low)
            target.check(f"flags {flags}, log {low}", found, want)


@case("While the ring is stopped its addresses may be anything that is aligned.")
def addresses_stopped(target: Target) -> None:
    device = owned(target)
    target.check("null", _addr(target, device, desc=0, avail=0, used=0), "")
    target.check("2^60", _addr(target, device, desc=BAD, avail=BAD, used=BAD, flags=1, log=BAD), "")
    target.check("end", _addr(target, device, desc=2**64 - 1, used=2**64 - 4, avail=2**64 - 2), "")


@case("A running ring moves to new addresses, but to none outside the owner's memory: EINVAL.")
def addresses_running(target: Target) -> None:
    rig = running(target)
    ring = rig.tx
    for part in ("desc", "avail", "used"):
        where = {"desc": ring.desc, "avail": ring.avail, "used": ring.used} | {part: BAD}
        target.check(part, _addr(target, rig.device, **where), "EINVAL")
    found = _addr(target, rig.device, desc=ring.desc, avail=ring.avail, used=ring.used)
    target.check("as before", found, "")
    ring.offer(rig.outgoing(1))
    target.check("sent", rig.sent(1), ["1x60"])


@case("A running ring takes an address for its log only if the log covers it: EINVAL.")
def log_running(target: Target) -> None:
    rig = running(target)
    where = {"desc": rig.tx.desc, "avail": rig.tx.avail, "used": rig.tx.used}
    rig.device.set_log_base(BAD)
    target.check("bad", _addr(target, rig.device, flags=1, **where), "EINVAL")
    target.check("off", _addr(target, rig.device, flags=0, **where), "")
    rig.device.set_log_base(rig.memory.hva(rig.alloc(4096), 4096))
    target.check("good", _addr(target, rig.device, flags=1, **where), "")


@case("Rings need not lie in the memory table.")
def outside_table(target: Target) -> None:
    rig = stopped(target)
    rig.device.set_mem_table([])
    target.check("start", target.refused(rig.tx.start), "")


@case("In IOTLB mode the addresses of a running ring are taken as they are.")
def addresses_iotlb(target: Target) -> None:
    rig = stopped(target, V1 | PLATFORM)
    for region in rig.memory.regions:
        rig.device.write_message(update(region.gpa, region.size, region.hva))
    target.check("start", target.refused(rig.tx.start), "")
    target.check("2^60", _addr(target, rig.device, desc=BAD, avail=BAD, used=BAD), "")
    target.check("alignment", _addr(target, rig.device, avail=1), "EINVAL")


@case("The busy-poll time is any 32-bit number, for each ring, 0 at first.")
def busy_poll(target: Target) -> None:
    device = owned(target)
    target.check("first", device.get_vring_busyloop_timeout(TX), 0)
    for time in (1, 50, 2**31, 2**32 - 1):
        device.set_vring_busyloop_timeout(TX, time)
        target.check(f"{time}", device.get_vring_busyloop_timeout(TX), time)
    target.check("other ring", device.get_vring_busyloop_timeout(RX), 0)


@case("The busy-poll time is set and read while the ring runs.")
def busy_poll_live(target: Target) -> None:
    rig = running(target)
    rig.device.set_vring_busyloop_timeout(RX, 7)
    target.check("time", rig.device.get_vring_busyloop_timeout(RX), 7)
    target.check("stop", target.refused(partial(rig.device.set_vring_busyloop_timeout, RX, 0)), "")


@case("GET_VRING_BUSYLOOP_TIMEOUT writes the ring's index too.")
def busy_poll_index(target: Target) -> None:
    device, state = owned(target), state_of(TX, 2**32 - 1)
    target.check("answer", ask(target, device, GET_POLL, state), "")
    target.check("state", [state.index, state.num], [TX, 0])


@case("The byte order of a ring is neither set nor told: ENOTTY, before the rest is read.")
def byte_order(target: Target) -> None:
    device, edge = owned(target), target.keep(Edge())
    for request in ENDIAN:
        for queue in (RX, TX):
            found = ask(target, device, request, edge.words(queue))
            target.check(f"{request.name} {queue}", found, "ENOTTY")


@case("The byte order of a running ring is ENOTTY too, not EBUSY.")
def byte_order_running(target: Target) -> None:
    rig = running(target)
    for request in ENDIAN:
        target.check(request.name, ask(target, rig.device, request, state_of(TX, 0)), "ENOTTY")
