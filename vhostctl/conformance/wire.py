"""The host's side of a tap: a link that is up, and a packet socket bound to it."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from pathlib import Path

from vhostctl.abi import tun
from vhostctl.abi.ioctl import Request
from vhostctl.conformance.target import Target
from vhostctl.host.closing import Closing
from vhostctl.host.ioctl import ioctl
from vhostctl.host.tap import TapQueue

ETHERTYPE = 0x88B5  # IEEE 802, "local experimental 1": nothing else here sends it
MIN_FRAME = 60

_SIOCGIFFLAGS = Request("SIOCGIFFLAGS", 0x8913)  # linux/sockios.h
_SIOCSIFFLAGS = Request("SIOCSIFFLAGS", 0x8914)
_SIOCSIFMTU = Request("SIOCSIFMTU", 0x8922)
_SIOCSIFVLAN = Request("SIOCSIFVLAN", 0x8983)
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15  # linux/socket.h, linux/if_packet.h
_ADD_VLAN_CMD = 0  # linux/if_vlan.h
_IFF_UP = 1
_MTU = 9000  # so that large frames fit


def frame(number: int, size: int = MIN_FRAME) -> bytes:
    """Return the Ethernet frame `number` of `size` bytes; each number fills it differently."""
    head = b"\xff" * 6 + b"\x02\0\0\0\0\x01" + struct.pack(">HI", ETHERTYPE, number)
    body = bytes((number * 7 + at) & 0xFF for at in range(251))
    return (head + body * (size // len(body) + 1))[:size]


def name(data: bytes) -> str:
    """Return ``NUMBERxSIZE`` for a frame of ours that is whole, else its bytes in hex."""
    if len(data) >= 18:
        number = int.from_bytes(data[14:18], "big")
        if data == frame(number, len(data)):
            return f"{number}x{len(data)}"
    return data.hex()


class Wire(Closing):
    """A tap in the caller's network namespace and the host's view of it.

    `fds` are the tap's queues, for VHOST_NET_SET_BACKEND.
    """

    def __init__(self, queues: int = 1, header: int | None = 12, sndbuf: int | None = None) -> None:
        """Make the tap; `header` is its virtio_net header's size, None for none at all."""
        self._stack = contextlib.ExitStack()
        flags = tun.IFF_TAP | tun.IFF_NO_PI
        flags |= tun.IFF_VNET_HDR if header else 0
        flags |= tun.IFF_MULTI_QUEUE if queues > 1 else 0
        self.queues: list[TapQueue] = []
        self.link = ""
        try:
            for index in range(queues):
                queue = self._stack.enter_context(TapQueue(f"tap queue {index}"))
                self.link = queue.attach(self.link, flags)
                self.queues.append(queue)
                if header:
                    queue.set_vnet_hdr_size(header)
            if sndbuf is not None:
                self.queues[0].set_sndbuf(sndbuf)
            self._bring_up()
        except BaseException:
            self.close()
            raise

    def _bring_up(self) -> None:
        # Neighbour and router discovery would use up receive buffers.
        quiet = Path(f"/proc/sys/net/ipv6/conf/{self.link}/disable_ipv6")
        if quiet.exists():
            quiet.write_text("1", encoding="ascii")
        self._socket = self._stack.enter_context(
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        )
        self._change(_SIOCSIFMTU, struct.pack("i", _MTU))
        self.set_up(True)
        self._socket.bind((self.link, ETHERTYPE))
        self._socket.setblocking(False)
        self._received: list[bytes] = []

    def _change(self, request: Request, value: bytes, link: str = "") -> bytes:
        block = ctypes.create_string_buffer(40)
        block.raw = struct.pack("16s24s", (link or self.link).encode(), value)
        ioctl(self._socket.fileno(), request, block)
        return block.raw[16:]

    def set_up(self, up: bool, link: str = "") -> None:
        """Set the link up or down; while down the tap takes no frame from the device."""
        flags = int(struct.unpack_from("H", self._change(_SIOCGIFFLAGS, b"", link))[0])
        flags = flags | _IFF_UP if up else flags & ~_IFF_UP
        self._change(_SIOCSIFFLAGS, struct.pack("H", flags), link)
        self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # ENETDOWN, which we know

    def send(self, data: bytes) -> None:
        """Send a frame out of the tap's link: the device receives it."""
        self._socket.send(data)

    def send_tagged(self, data: bytes, vlan: int) -> None:
        """Send a frame with an 802.1Q tag, as a VLAN link on top of the tap's does."""
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            try:
                request = ctypes.create_string_buffer(60)  # struct vlan_ioctl_args
                struct.pack_into("i24si", request, 0, _ADD_VLAN_CMD, self.link.encode(), vlan)
                ioctl(sender.fileno(), _SIOCSIFVLAN, request)
            except OSError:  # no 8021q here: the same bytes, with the tag in the frame
                self.send(data[:12] + struct.pack(">HH", 0x8100, vlan) + data[12:])
                return
            upper = next(n for _, n in socket.if_nameindex() if n not in ("lo", self.link))
            self.set_up(True, upper)
            sender.bind((upper, 0))
            sender.send(data)

    def send_with_header(self, header: bytes, data: bytes) -> None:
        """Send a frame that asks the link for what the virtio_net `header` says."""
        self._socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        self._socket.send(header + data)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 0)

    def received(self) -> list[str]:
        """Return the names of all frames that came out of the device so far, in order."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._received.append(self._socket.recv(1 << 17))
        return [name(data) for data in self._received]

    def raw(self) -> list[bytes]:
        """Return the frames themselves."""
        self.received()
        return self._received

    def close(self) -> None:
        """Close the tap and the socket; a second call does nothing."""
        self._stack.close()


def wire(
    target: Target, queues: int = 1, header: int | None = 12, sndbuf: int | None = None
) -> Wire:
    """Return a Wire that ends with the case."""
    made = Wire(queues, header, sndbuf)
    target.keep(made)
    return made
