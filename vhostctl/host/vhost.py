"""A vhost-net device: one method for each request of linux/vhost.h.

Every method raises KernelError, which names the request, the device and the ring, and
ClosedError after `close()`. Rings are 0 (receive) and 1 (transmit) on every device.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable
from typing import Protocol, Self

from vhostctl.abi import vhost
from vhostctl.abi.ioctl import Request
from vhostctl.host.closing import Closing
from vhostctl.host.ioctl import Channel, call, refusal
from vhostctl.host.node import DeviceNode

DEFAULT_PATH = "/dev/vhost-net"
ENGINE = "engine"  # in place of a path: the vhost-net of this process
RX, TX = 0, 1
_SETTLING = 0.001  # seconds between two looks

IotlbMessage = vhost.vhost_msg | vhost.vhost_msg_v2


class Region(Protocol):
    """A region of guest memory: bytes, as SET_MEM_TABLE wants them."""

    @property
    def gpa(self) -> int:
        """Guest physical address."""

    @property
    def size(self) -> int:
        """Length."""

    @property
    def hva(self) -> int:
        """Address in the process that owns the device."""


class OwnedChannel(Channel, Protocol):
    """A channel that this process holds open."""

    def fileno(self) -> int:
        """Return its descriptor."""
        ...

    def read(self, size: int) -> bytes:
        """As read(2): return up to `size` bytes, raise OSError with its errno."""
        ...

    def write(self, data: bytes) -> int:
        """As write(2): return how many bytes it says it took, raise OSError with its errno."""
        ...

    def detach(self) -> int:
        """Return its descriptor and give up its ownership."""
        ...

    def settle(self, queue: int, /) -> int:
        """Let a ring read no more frames; return how many it has and has not delivered."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class _Node(DeviceNode):
    """A vhost-net in the kernel."""

    def settle(self, _queue: int) -> int:
        """Return 0: when a ring is stopped, what it has read ahead goes back to the tap."""
        return 0


class VhostNet(Closing):
    """One vhost-net device: a pair of rings, a memory table, a worker.

    The worker lives from `set_owner` to `reset_owner` or `close`. From Linux 6.4 on it
    is a thread of this process, so an exec() by the owner ends the data path.
    """

    def __init__(self, channel: OwnedChannel) -> None:
        self._channel = channel
        self.owned = False
        """Whether `set_owner` bound the device to this process."""

    @classmethod
    def open(cls, path: str = DEFAULT_PATH, label: str = "") -> Self:
        """Open the device node `path`; `label` is what errors call it, the path without it.

        Raises KernelError (ENOENT, EACCES...).
        """
        node = _Node(path)
        node.label = label or path
        return cls(node)

    @classmethod
    def adopt(cls, fd: int, label: str = DEFAULT_PATH) -> Self:
        """Own `fd`, a descriptor of the node that somebody else opened, and nobody owns yet."""
        return cls(_Node.adopt(fd, label))

    @classmethod
    def at(cls, device: str, label: str = "") -> Self:
        """Open what the user calls `device`: the path of a node, or "engine"."""
        return cls.embedded(label or ENGINE) if device == ENGINE else cls.open(device, label)

    @classmethod
    def embedded(cls, label: str = ENGINE) -> Self:
        """Make a vhost-net in this process; it needs no module, no node and no privilege.

        Its worker is a thread of this process, and it cannot be detached. Raises KernelError
        (EMFILE, ENOMEM).
        """
        # Inside, because it stands above this layer.
        from vhostctl.engine.device import Engine

        return cls(Engine(label))

    @property
    def label(self) -> str:
        """What error messages call this device."""
        return self._channel.label

    def fileno(self) -> int:
        """Return the descriptor; it stays owned by this object."""
        return self._channel.fileno()

    def detach(self) -> int:
        """Return the descriptor and give up its ownership: the caller closes it."""
        return self._channel.detach()

    def close(self) -> None:
        """Close the device; its worker has ended when this returns."""
        self._channel.close()

    def request(self, request: Request, argument: object = None, queue: int | None = None) -> int:
        """Issue any request; `argument` is of its argument type. Returns ioctl(2)'s result."""
        return call(self._channel, request, argument, "" if queue is None else f"queue {queue}")

    def read(self, size: int) -> bytes:
        """Read one IOTLB message if `size` bytes hold it; KernelError (EAGAIN) if none waits."""
        try:
            return self._channel.read(size)
        except OSError as error:
            raise refusal(error, "read", self.label) from error

    def write(self, data: bytes) -> int:
        """Write one IOTLB message; returns the length of a whole one, even if `data` is less."""
        try:
            return self._channel.write(data)
        except OSError as error:
            raise refusal(error, "write", self.label) from error

    def read_message(self) -> IotlbMessage:
        """Read the next IOTLB message, a miss; KernelError (EAGAIN) if none waits.

        Its version is 2 if VHOST_BACKEND_F_IOTLB_MSG_V2 was acknowledged.
        """
        data = self.read(ctypes.sizeof(vhost.vhost_msg))
        message = vhost.vhost_msg.from_buffer_copy(data)
        if message.type == vhost.VHOST_IOTLB_MSG_V2:
            return vhost.vhost_msg_v2.from_buffer_copy(data)
        return message

    def write_message(self, message: IotlbMessage) -> None:
        """Write an IOTLB message, an update or invalidation; EFAULT if it is not taken."""
        self.write(bytes(message))

    def set_owner(self) -> None:
        """VHOST_SET_OWNER: bind the device to this process's memory, start its worker."""
        self.request(vhost.VHOST_SET_OWNER)
        self.owned = True

    def reset_owner(self) -> None:
        """VHOST_RESET_OWNER: stop the rings, forget everything, end the worker."""
        self.request(vhost.VHOST_RESET_OWNER)
        self.owned = False

    def _get_u64(self, request: Request) -> int:
        value = ctypes.c_uint64()
        self.request(request, value)
        return value.value

    def get_features(self) -> int:
        """VHOST_GET_FEATURES: the first 64 feature bits on offer."""
        return self._get_u64(vhost.VHOST_GET_FEATURES)

    def set_features(self, features: int) -> None:
        """VHOST_SET_FEATURES: acknowledge `features`; EOPNOTSUPP for a bit not offered."""
        self.request(vhost.VHOST_SET_FEATURES, ctypes.c_uint64(features))

    def get_features_array(self, words: int = 2) -> int:
        """VHOST_GET_FEATURES_ARRAY: 64 feature bits for each word (from Linux 6.17)."""
        table = vhost.vhost_features_table(count=words)
        self.request(vhost.VHOST_GET_FEATURES_ARRAY, table)
        return vhost.vhost_features_bits(table)

    def get_backend_features(self) -> int:
        """VHOST_GET_BACKEND_FEATURES: message formats and the like."""
        return self._get_u64(vhost.VHOST_GET_BACKEND_FEATURES)

    def set_backend_features(self, features: int) -> None:
        """VHOST_SET_BACKEND_FEATURES."""
        self.request(vhost.VHOST_SET_BACKEND_FEATURES, ctypes.c_uint64(features))

    def get_fork_from_owner(self) -> bool:
        """VHOST_GET_FORK_FROM_OWNER: True if the worker will be a thread of the owner."""
        value = _padded(0)
        self.request(vhost.VHOST_GET_FORK_FROM_OWNER, value)
        return bool(value[0])

    def set_fork_from_owner(self, thread: bool) -> None:
        """VHOST_SET_FORK_FROM_OWNER, before `set_owner`: thread of the owner, or kthread."""
        self.request(vhost.VHOST_SET_FORK_FROM_OWNER, _padded(thread))

    def set_mem_table(self, regions: Iterable[Region]) -> None:
        """VHOST_SET_MEM_TABLE: replace the memory table, all or nothing."""
        table = vhost.vhost_memory_table(
            [
                vhost.vhost_memory_region(
                    guest_phys_addr=r.gpa, memory_size=r.size, userspace_addr=r.hva
                )
                for r in regions
            ]
        )
        self.request(vhost.VHOST_SET_MEM_TABLE, table)

    def set_log_base(self, hva: int) -> None:
        """VHOST_SET_LOG_BASE: bitmap at `hva`, a bit for each 4096 bytes of guest memory."""
        self.request(vhost.VHOST_SET_LOG_BASE, ctypes.c_uint64(hva))

    def set_log_fd(self, eventfd: int | None) -> None:
        """VHOST_SET_LOG_FD: signalled when the log was written; None unbinds."""
        self.request(vhost.VHOST_SET_LOG_FD, ctypes.c_int(_or_none(eventfd)))

    def _get_state(self, request: Request, queue: int) -> int:
        state = vhost.vhost_vring_state(index=queue)
        self.request(request, state, queue)
        return int(state.num)

    def _set_state(self, request: Request, queue: int, num: int) -> None:
        self.request(request, vhost.vhost_vring_state(index=queue, num=num), queue)

    def set_vring_num(self, queue: int, num: int) -> None:
        """VHOST_SET_VRING_NUM: descriptors in the ring, a power of two up to 32768."""
        self._set_state(vhost.VHOST_SET_VRING_NUM, queue, num)

    def set_vring_base(self, queue: int, base: int) -> None:
        """VHOST_SET_VRING_BASE: the avail index that the device reads next."""
        self._set_state(vhost.VHOST_SET_VRING_BASE, queue, base)

    def get_vring_base(self, queue: int) -> int:
        """VHOST_GET_VRING_BASE: the avail index that the device would read next."""
        return self._get_state(vhost.VHOST_GET_VRING_BASE, queue)

    def set_vring_busyloop_timeout(self, queue: int, timeout: int) -> None:
        """VHOST_SET_VRING_BUSYLOOP_TIMEOUT: poll for `timeout` units of 1.024 us."""
        self._set_state(vhost.VHOST_SET_VRING_BUSYLOOP_TIMEOUT, queue, timeout)

    def get_vring_busyloop_timeout(self, queue: int) -> int:
        """VHOST_GET_VRING_BUSYLOOP_TIMEOUT."""
        return self._get_state(vhost.VHOST_GET_VRING_BUSYLOOP_TIMEOUT, queue)

    def set_vring_addr(
        self, queue: int, *, desc: int, avail: int, used: int, log_gpa: int | None = None
    ) -> None:
        """VHOST_SET_VRING_ADDR: the three parts of the ring, as host virtual addresses.

        `log_gpa` is the used ring's guest physical address if its writes are to be logged.
        """
        address = vhost.vhost_vring_addr(
            index=queue,
            flags=0 if log_gpa is None else 1 << vhost.VHOST_VRING_F_LOG,
            desc_user_addr=desc,
            used_user_addr=used,
            avail_user_addr=avail,
            log_guest_addr=log_gpa or 0,
        )
        self.request(vhost.VHOST_SET_VRING_ADDR, address, queue)

    def _set_file(self, request: Request, queue: int, fd: int | None) -> None:
        self.request(request, vhost.vhost_vring_file(index=queue, fd=_or_none(fd)), queue)

    def set_vring_kick(self, queue: int, eventfd: int | None) -> None:
        """VHOST_SET_VRING_KICK: the driver's doorbell; None unbinds."""
        self._set_file(vhost.VHOST_SET_VRING_KICK, queue, eventfd)

    def set_vring_call(self, queue: int, eventfd: int | None) -> None:
        """VHOST_SET_VRING_CALL: the device's interrupt; None unbinds."""
        self._set_file(vhost.VHOST_SET_VRING_CALL, queue, eventfd)

    def set_vring_err(self, queue: int, eventfd: int | None) -> None:
        """VHOST_SET_VRING_ERR: signalled when the ring is malformed; None unbinds."""
        self._set_file(vhost.VHOST_SET_VRING_ERR, queue, eventfd)

    def set_backend(self, queue: int, fd: int | None) -> None:
        """VHOST_NET_SET_BACKEND: start the ring on a tap's descriptor; None stops it."""
        self._set_file(vhost.VHOST_NET_SET_BACKEND, queue, fd)

    def settle(self, queue: int, timeout: float = 0.0) -> int:
        """Let `queue` read no more frames from its backend; wait until it delivered what it has.

        Returns the frames that it still has after `timeout` seconds, for want of buffers. If it
        is 0 the backend can be taken away, and another device or reader gets every later frame.
        Frames that are left wait for the same file to be set again, and are dropped (and
        counted) when the device is reset or closed. `set_backend` lets the ring read again. A
        kernel's device returns 0 at once: it gives frames back to the tap when a ring is
        stopped. Raises KernelError.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                left = self._channel.settle(queue)
            except OSError as error:
                raise refusal(error, "settle", f"{self.label} queue {queue}") from error
            if not left or time.monotonic() >= deadline:
                return left
            time.sleep(_SETTLING)


def _or_none(fd: int | None) -> int:
    return vhost.VHOST_FILE_UNBIND if fd is None else fd


def _padded(value: int) -> ctypes.Array[ctypes.c_uint8]:
    """A byte and zeroes: a kernel that does not know the request reads a ring index here."""
    return (ctypes.c_uint8 * 8)(value)
