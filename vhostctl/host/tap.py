"""A tap device and its queues: the socket side of vhost-net."""

from __future__ import annotations

import ctypes
from typing import Self

from vhostctl.abi import tun
from vhostctl.abi.ioctl import Request
from vhostctl.errors import InvalidArgument
from vhostctl.host import links
from vhostctl.host.closing import Closing
from vhostctl.host.ioctl import call
from vhostctl.host.node import DeviceNode

TUN_PATH = "/dev/net/tun"
MAX_QUEUES = 256  # MAX_TAP_QUEUES of drivers/net/tun.c
UNLIMITED = 2**31 - 1
"""A send buffer of this size lets vhost-net hand the tun driver whole batches."""


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
        """TUNSETOFFLOAD: TUN_F_* that frames towards the guest may rely on."""
        call(self, tun.TUNSETOFFLOAD, flags)


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
