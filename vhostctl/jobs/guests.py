"""What can be at the guest's end of a wire: echo, sink, a capture file, another link."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vhostctl.control.netsetup import parse_mac
from vhostctl.errors import InvalidArgument, kernel_error
from vhostctl.guest.driver import QueuePair
from vhostctl.guest.endpoint import Endpoint
from vhostctl.guest.pump import Forwarder, Sink
from vhostctl.host.closing import Closing
from vhostctl.jobs.running import Stoppable

_ETH_P_ALL = 0x0003  # linux/if_ether.h
_SOL_PACKET = 263  # these and the next from linux/if_packet.h
_PACKET_ADD_MEMBERSHIP = 1
_PACKET_VNET_HDR = 15
_PACKET_FANOUT = 18
_PACKET_IGNORE_OUTGOING = 23
_PACKET_MR_PROMISC = 1
_PCAP_MAGIC_NS = 0xA1B23C4D
_LINKTYPE_ETHERNET = 1
_SLICE = 0.2
_MOST_POSTED = 32768


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """`kind` is echo, sink, pcap (of file `target`) or forward (to link `target`)."""

    kind: str
    target: str = ""

    @classmethod
    def parse(cls, text: str) -> GuestSpec:
        """Read ``echo``, ``sink``, ``pcap:FILE`` or ``forward:IFACE``.

        Raises InvalidArgument for anything else.
        """
        kind, _, target = text.partition(":")
        if kind not in ("echo", "sink", "pcap", "forward") or bool(target) != (
            kind in ("pcap", "forward")
        ):
            raise InvalidArgument(f"guest {text!r}", hint="echo, sink, pcap:FILE or forward:IFACE")
        return cls(kind, target)


@dataclass(frozen=True, slots=True)
class GuestIdentity:
    """Who the guest is: six bytes of MAC, and at most one address of each family."""

    mac: bytes
    ipv4: str | None = None
    ipv6: str | None = None

    @classmethod
    def choose(cls, name: str, mac: str | None, addresses: Sequence[str]) -> GuestIdentity:
        """Return the identity of the guest called `name` behind a tap with `addresses`.

        Without `mac` one is derived from the name, so that it stays the same. The guest's
        addresses are the ones after the tap's. Raises InvalidArgument (MAC).
        """
        chosen: dict[int, str] = {}
        for cidr in addresses:
            interface = ipaddress.ip_interface(cidr)
            if interface.version not in chosen:
                chosen[interface.version] = _next_address(interface)
        digest = hashlib.sha256(name.encode()).digest()
        return cls(
            mac=b"\x02" + digest[:5] if mac is None else parse_mac(mac),
            ipv4=chosen.get(4),
            ipv6=chosen.get(6),
        )


def _next_address(interface: ipaddress.IPv4Interface | ipaddress.IPv6Interface) -> str:
    network = interface.network
    if interface.ip == network.broadcast_address or interface.ip + 1 not in network:
        raise InvalidArgument(
            f"{interface} has no address after it", hint="leave one for the guest"
        )
    guest = interface.ip + 1
    if guest == network.broadcast_address and network.prefixlen < network.max_prefixlen - 1:
        raise InvalidArgument(
            f"{interface} is followed by the broadcast address", hint="use a lower"
        )
    return str(guest)


def make_guests(
    spec: GuestSpec, identity: GuestIdentity, pairs: Sequence[QueuePair], stack: ExitStack
) -> list[Stoppable]:
    """Return one loop for each queue pair; `stack` closes them and what they use.

    Raises KernelError (the link or the file).
    """
    if spec.kind == "echo":
        return [
            stack.enter_context(Endpoint(pair, identity.mac, identity.ipv4, identity.ipv6))
            for pair in pairs
        ]
    if spec.kind == "sink":
        return [stack.enter_context(Sink(pair)) for pair in pairs]
    if spec.kind == "pcap":
        capture = stack.enter_context(Capture(Path(spec.target)))
        return [_Recorder(pair, capture) for pair in pairs]
    loops: list[Stoppable] = []
    for pair in pairs:
        port = stack.enter_context(_packet_socket(spec.target, len(pairs)))
        loops.append(stack.enter_context(Forwarder(pair, port.fileno(), vnet_hdr=True)))
    return loops


def _packet_socket(link: str, sharers: int) -> socket.socket:
    """Open a packet socket that sees what comes in by `link`, whoever it is for.

    A virtio_net header goes with every frame: a link may hand over frames whose checksum was
    left to it, and several segments as one packet.
    """
    try:
        port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    except OSError as error:
        raise kernel_error(error.errno or 0, "packet socket", link, "needs CAP_NET_RAW") from error
    try:
        port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        port.bind((link, _ETH_P_ALL))
        index = socket.if_nametoindex(link)
        membership = struct.pack("iHH8s", index, _PACKET_MR_PROMISC, 0, b"")
        port.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, membership)
        if sharers > 1:  # by flow, so that each frame goes to one pair
            port.setsockopt(_SOL_PACKET, _PACKET_FANOUT, os.getpid() & 0xFFFF)
    except OSError as error:
        port.close()
        raise kernel_error(
            error.errno or 0, "bind packet socket", link, "check the link"
        ) from error
    except BaseException:
        port.close()
        raise
    return port


class Capture(Closing):
    """A pcap file (draft-ietf-opsawg-pcap, nanosecond form) that several threads write."""

    def __init__(self, path: Path) -> None:
        """Create or truncate `path`. Raises KernelError."""
        self._lock = threading.Lock()
        try:
            self._file = path.open("wb", buffering=1 << 16)
        except OSError as error:
            raise kernel_error(error.errno or 0, "open", str(path), "check the path") from error
        self._file.write(
            struct.pack("=IHHiIII", _PCAP_MAGIC_NS, 2, 4, 0, 0, 1 << 18, _LINKTYPE_ETHERNET)
        )

    def write(self, frames: Sequence[bytes]) -> None:
        """Append `frames` with the time of now."""
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        with self._lock:
            for frame in frames:
                length = len(frame)
                self._file.write(struct.pack("=IIII", seconds, nanoseconds, length, length))
                self._file.write(frame)
            self._file.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


class _Recorder:
    """Writes every frame of a pair to a capture."""

    def __init__(self, pair: QueuePair, capture: Capture) -> None:
        self._pair = pair
        self._capture = capture
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.is_set():
            if self._pair.wait(_SLICE):
                self._capture.write(self._pair.receive())
        self._capture.write(self._pair.receive(_MOST_POSTED))  # what came before the stop

    def stop(self) -> None:
        self._stopped.set()
