"""A tap device and its queues: the socket side of vhost-net."""

from __future__ import annotations

import ctypes
import errno
from typing import Self

from vhostctl.abi import tun
from vhostctl.abi.ioctl import Request
from vhostctl.errors import InvalidArgument, KernelError
from vhostctl.host import links
from vhostctl.host.closing import Closing
from vhostctl.host.ioctl import call
from vhostctl.host.node import DeviceNode

TUN_PATH = "/dev/net/tun"
MAX_QUEUES = 256  # MAX_TAP_QUEUES of drivers/net/tun.c
UNLIMITED = 2**31 - 1
"""A send buffer of this size lets vhost-net hand the tun driver whole batches."""

# In this order each stands on those before it: set_offload() of drivers/net/tun.c looks at
# nothing without TUN_F_CSUM, at ECN only with TSO, and at USO only for both versions of IP.
_OFFLOADS = (
    tun.TUN_F_CSUM,
    tun.TUN_F_TSO4,
    tun.TUN_F_TSO6,
    tun.TUN_F_TSO_ECN,
    tun.TUN_F_UFO,
    tun.TUN_F_USO4 | tun.TUN_F_USO6,
)


class TapQueue(DeviceNode):
    """One queue of a tap: a descriptor of /dev/net/tun, attached by `attach`."""

    def __init__(self, part: str) -> None:
        super().__init__(TUN_PATH)
        self.label = part

    def attach(self, name: str, flags: int) -> str:
        """TUNSETIFF: join or make the tap `name`; returns the name that the kernel chose."""
        request = tun.ifreq(ifr_name=name.encode(), ifr_flags=flags)
        call(self, tun.TUNSETIFF, request)
        return bytes(request.ifr_name).rstrip(b"\0").decode()

    def set_vnet_hdr_size(self, size: int) -> None:
        """TUNSETVNETHDRSZ: bytes of virtio_net header before each frame, 10 or 12."""
        call(self, tun.TUNSETVNETHDRSZ, ctypes.c_int(size))

    def vnet_hdr_size(self) -> int:
        """TUNGETVNETHDRSZ: bytes of virtio_net header before each frame."""
        return self._get(tun.TUNGETVNETHDRSZ)

    def sndbuf(self) -> int:
        """TUNGETSNDBUF: bytes that may be in flight towards the host."""
        return self._get(tun.TUNGETSNDBUF)

    def _get(self, request: Request) -> int:
        value = ctypes.c_int()
        call(self, request, value)
        return value.value

    def set_sndbuf(self, size: int) -> None:
        """TUNSETSNDBUF: bytes in flight towards the host; `UNLIMITED` allows batches."""
        call(self, tun.TUNSETSNDBUF, ctypes.c_int(size))

    def set_offload(self, flags: int) -> None:
        """TUNSETOFFLOAD: TUN_F_* that frames towards the guest may rely on, on every queue.

        KernelError (EINVAL) if a flag is unknown, or lacks another one that it needs.
        """
        call(self, tun.TUNSETOFFLOAD, flags)

    def offloads(self) -> int:
        """Return the TUN_F_* that TUNSETOFFLOAD takes here, found by trying; none is left set.

        The flags are the whole tap's: try before the link is up, for what arrives meanwhile
        is queued as the flags of that moment allow. UDP tunnels are left out, for their
        frames have a longer header.
        """
        taken = 0
        try:
            for flags in _OFFLOADS:
                try:
                    self.set_offload(taken | flags)
                except KernelError as error:
                    if error.errno != errno.EINVAL:
                        raise
                else:
                    taken |= flags
        finally:
            self.set_offload(0)
        return taken

    def set_vnet_le(self, little: bool) -> None:
        """TUNSETVNETLE: the header is little-endian, as VERSION_1 wants it, or the host's order."""
        call(self, tun.TUNSETVNETLE, ctypes.c_int(little))

    def flags(self) -> int:
        """TUNGETIFF: the tap's IFF_*, with IFF_DETACH_QUEUE if this queue is disabled."""
        request = tun.ifreq()
        call(self, tun.TUNGETIFF, request)
        return int(request.ifr_flags)

    def enable(self) -> None:
        """TUNSETQUEUE, IFF_ATTACH_QUEUE: take part again after `disable`.

        KernelError (EINVAL) if the queue is enabled.
        """
        call(self, tun.TUNSETQUEUE, tun.ifreq(ifr_flags=tun.IFF_ATTACH_QUEUE))

    def disable(self) -> None:
        """TUNSETQUEUE, IFF_DETACH_QUEUE: carry nothing; what is queued is dropped.

        KernelError (EINVAL) if the tap has a single queue, or this one is disabled.
        """
        call(self, tun.TUNSETQUEUE, tun.ifreq(ifr_flags=tun.IFF_DETACH_QUEUE))

    def set_steering(self, program_fd: int | None) -> None:
        """TUNSETSTEERINGEBPF: let a program choose the queue of each frame; None removes it.

        `program_fd` is a loaded BPF_PROG_TYPE_SOCKET_FILTER, whose result modulo the number of
        enabled queues is the queue. The tap keeps it; the descriptor stays the caller's.
        """
        call(self, tun.TUNSETSTEERINGEBPF, ctypes.c_int(-1 if program_fd is None else program_fd))

    def set_persist(self, persist: bool) -> None:
        """TUNSETPERSIST: keep the tap when its last queue is closed."""
        call(self, tun.TUNSETPERSIST, int(persist))


class Tap(Closing):
    """A tap and the queues that this process holds of it; a context manager.

    A tap that `open` made goes when its last queue is closed.
    """

    def __init__(self, name: str, queues: list[TapQueue], *, created: bool) -> None:
        self.name = name
        self.queues = queues
        self.created = created

    @classmethod
    def open(cls, name: str, queues: int = 1) -> Self:
        """Attach `queues` queues to the tap `name`, which is made if it is missing.

        Every queue carries the virtio_net header and no packet information. Raises
        InvalidArgument (name, number of queues, a tap that cannot serve) and KernelError.
        """
        if (
            not 1 <= len(name.encode()) < tun.IFNAMSIZ
            or name.split() != [name]
            or set(name) & set("/%:")
        ):
            raise InvalidArgument(
                f"{name!r} is no link name", hint="1 to 15 bytes, no space, / % or :"
            )
        if not 1 <= queues <= MAX_QUEUES:
            raise InvalidArgument(f"{name}: {queues} queues", hint=f"a tap has 1 to {MAX_QUEUES}")
        created = not links.exists(name)
        multi_queue = queues > 1 if created else _check_existing(name, queues)
        flags = tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR
        if multi_queue:
            flags |= tun.IFF_MULTI_QUEUE
        tap = cls(name, [], created=created)
        try:
            for index in range(queues):
                tap.queues.append(TapQueue(f"{name} queue {index}"))
                tap.queues[-1].attach(name, flags)
        except BaseException:
            tap.close()
            raise
        return tap

    def close(self) -> None:
        """Close every queue; a second call does nothing."""
        for queue in self.queues:
            queue.close()


def _check_existing(name: str, queues: int) -> bool:
    """Return whether the tap `name` is multi-queue; refuse one that cannot serve."""
    with links.Links() as table:
        state = table.state(name)
    if state.kind != "tun":
        raise InvalidArgument(f"{name} is no tap", hint="the name belongs to another link")
    again = f"ip tuntap add dev {name} mode tap vnet_hdr" + (" multi_queue" if queues > 1 else "")
    if not state.vnet_hdr:
        raise InvalidArgument(f"tap {name} has no vnet_hdr", hint=f"make it anew: {again}")
    if queues > 1 and not state.multi_queue:
        raise InvalidArgument(
            f"tap {name} has a single queue, {queues} were asked for", hint=f"make it anew: {again}"
        )
    return state.multi_queue
