"""What a tap queue finds out by trying, against kernels of several ages."""

from __future__ import annotations

import errno

import pytest

from vhostctl.abi import tun
from vhostctl.abi.ioctl import Request
from vhostctl.errors import KernelError
from vhostctl.host.tap import TapQueue

CSUM, TSO4, TSO6, ECN = tun.TUN_F_CSUM, tun.TUN_F_TSO4, tun.TUN_F_TSO6, tun.TUN_F_TSO_ECN
TSO = TSO4 | TSO6
USO = tun.TUN_F_USO4 | tun.TUN_F_USO6


class Queue(TapQueue):
    """A queue of a kernel that knows the flags `known`, with the rules of tun's set_offload()."""

    def __init__(self, known: int, broken: int = 0) -> None:
        self.label = "tap0 queue 0"
        self.known = known
        self.broken = broken
        self.told: list[int] = []

    def ioctl(self, request: Request, argument: object) -> int:
        assert request is tun.TUNSETOFFLOAD
        assert isinstance(argument, int)
        self.told.append(argument)
        if argument & self.broken:
            raise OSError(errno.EBADFD, "")
        alone = argument and not argument & CSUM
        ecn_alone = argument & ECN and not argument & TSO
        half = argument & USO not in (0, USO)
        if argument & ~self.known or alone or ecn_alone or half:
            raise OSError(errno.EINVAL, "")
        return 0


@pytest.mark.parametrize(
    "known",
    [
        0,
        CSUM,
        CSUM | TSO,
        CSUM | TSO | ECN,
        CSUM | TSO6 | ECN,
        CSUM | TSO | ECN | tun.TUN_F_UFO,
        CSUM | TSO | ECN | USO,
        CSUM | TSO | ECN | tun.TUN_F_UFO | USO,
        CSUM | TSO | ECN | tun.TUN_F_UFO | USO | tun.TUN_F_UDP_TUNNEL_GSO,
    ],
    ids=hex,
)
def test_what_the_kernel_knows_is_found_and_none_is_left_set(known: int) -> None:
    queue = Queue(known)
    assert queue.offloads() == known & ~tun.TUN_F_UDP_TUNNEL_GSO
    assert queue.told[-1] == 0


def test_another_error_is_no_answer() -> None:
    queue = Queue(CSUM | TSO, broken=TSO6)
    with pytest.raises(KernelError, match="TUNSETOFFLOAD on tap0 queue 0") as caught:
        queue.offloads()
    assert caught.value.errno == errno.EBADFD
    assert queue.told[-1] == 0
