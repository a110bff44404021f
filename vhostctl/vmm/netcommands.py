"""The commands of virtio-net's control queue: virtio 1.2, section 5.1.6.5."""

from __future__ import annotations

from typing import Protocol

from vhostctl.abi import virtio

MAC_SIZE = 6

_FILTERS = {
    (virtio.VIRTIO_NET_CTRL_RX, virtio.VIRTIO_NET_CTRL_RX_PROMISC),
    (virtio.VIRTIO_NET_CTRL_RX, virtio.VIRTIO_NET_CTRL_RX_ALLMULTI),
    (virtio.VIRTIO_NET_CTRL_RX, virtio.VIRTIO_NET_CTRL_RX_ALLUNI),
    (virtio.VIRTIO_NET_CTRL_RX, virtio.VIRTIO_NET_CTRL_RX_NOMULTI),
    (virtio.VIRTIO_NET_CTRL_RX, virtio.VIRTIO_NET_CTRL_RX_NOUNI),
    (virtio.VIRTIO_NET_CTRL_RX, virtio.VIRTIO_NET_CTRL_RX_NOBCAST),
    (virtio.VIRTIO_NET_CTRL_MAC, virtio.VIRTIO_NET_CTRL_MAC_TABLE_SET),
}
"""What asks for fewer frames. A tap hands over each, which a driver must expect (5.1.6.5.1)."""


class Commanded(Protocol):
    """The device that the commands are for."""

    def set_pairs(self, pairs: int) -> bool:
        """Have the first `pairs` queue pairs take part; False if there are not so many."""

    def set_mac(self, mac: bytes) -> None:
        """Have another MAC address, of 6 bytes."""

    def announced(self) -> None:
        """Know that the driver has told the network where it is."""


def answer(device: Commanded, command: bytes) -> bytes:
    """Do what `command` says, as the driver wrote it, and return what it gets: one byte.

    Raises what `device` raises.
    """
    done = len(command) >= 2 and _do(device, (command[0], command[1]), command[2:])
    return bytes([virtio.VIRTIO_NET_OK if done else virtio.VIRTIO_NET_ERR])


def _do(device: Commanded, command: tuple[int, int], data: bytes) -> bool:
    match command:
        case (virtio.VIRTIO_NET_CTRL_MQ, virtio.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET):
            return len(data) >= 2 and device.set_pairs(int.from_bytes(data[:2], "little"))
        case (virtio.VIRTIO_NET_CTRL_MAC, virtio.VIRTIO_NET_CTRL_MAC_ADDR_SET):
            if len(data) < MAC_SIZE or data[0] & 1:
                return False
            device.set_mac(data[:MAC_SIZE])
        case (virtio.VIRTIO_NET_CTRL_ANNOUNCE, virtio.VIRTIO_NET_CTRL_ANNOUNCE_ACK):
            device.announced()
        case _:
            return command in _FILTERS
    return True
