"""Request numbers are unsigned, and what does not fit one is an error."""

from __future__ import annotations

import ctypes
import dataclasses

import pytest

from vhostctl.abi import ioctl, layout, vhost
from vhostctl.errors import InvalidArgument


class Oversized(layout.Struct):
    __slots__ = ()
    _fields_ = (("data", ctypes.c_uint8 * 16384),)


def test_request_is_immutable_and_unsigned() -> None:
    assert vhost.VHOST_GET_FEATURES.number == 0x8008AF00
    with pytest.raises(dataclasses.FrozenInstanceError):
        vhost.VHOST_GET_FEATURES.number = 0  # type: ignore[misc]
    for number in (-2146914560, 2**32):
        with pytest.raises(InvalidArgument, match="not unsigned 32-bit"):
            ioctl.Request("X", number)


@pytest.mark.parametrize("argument", [None, vhost.vhost_vring_file])
def test_only_integers_go_by_value(argument: type[layout.Struct] | None) -> None:
    with pytest.raises(InvalidArgument, match="only an integer"):
        ioctl.Request("X", 0, argument, by_value=True)


@pytest.mark.parametrize(("magic", "nr"), [(256, 0), (-1, 0), (0, 256), (0, -1)])
def test_type_and_nr_are_eight_bits(magic: int, nr: int) -> None:
    for make in (ioctl.ior, ioctl.iow, ioctl.iowr):
        with pytest.raises(InvalidArgument, match=r"is not in 0\.\.255"):
            make("X", magic, nr, ctypes.c_int)
    with pytest.raises(InvalidArgument, match=r"is not in 0\.\.255"):
        ioctl.io("X", magic, nr)


def test_argument_of_16_kib_does_not_fit_the_number() -> None:
    with pytest.raises(InvalidArgument, match=r"X: ioctl size 16384 is not in 0\.\.16383"):
        ioctl.iow("X", 0xAF, 0, Oversized)
