"""The strict ctypes base refuses what plain ctypes accepts, also under ``python -O``."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

import vhostctl.abi
from vhostctl.abi import layout, tun, vhost
from vhostctl.errors import InvalidArgument

ROOT = Path(vhostctl.abi.__file__).parents[2]


class Sample(layout.Struct):
    __slots__ = ()
    _fields_ = (
        ("u8", ctypes.c_uint8),
        ("s8", ctypes.c_int8),
        ("u16", ctypes.c_uint16),
        ("s32", ctypes.c_int),
        ("u64", ctypes.c_uint64),
        ("s64", ctypes.c_int64),
        ("name", ctypes.c_char * 4),
    )


EDGES = [
    ("u8", 0, 255),
    ("s8", -128, 127),
    ("u16", 0, 65535),
    ("s32", -(2**31), 2**31 - 1),
    ("u64", 0, 2**64 - 1),
    ("s64", -(2**63), 2**63 - 1),
]


@pytest.mark.parametrize(("field", "low", "high"), EDGES)
def test_integer_fields_take_their_whole_range_and_no_more(field: str, low: int, high: int) -> None:
    for value in (low, high):
        assert getattr(Sample(**{field: value}), field) == value
    for value in (low - 1, high + 1):
        with pytest.raises(InvalidArgument, match=f"{field} = {value} does not fit {low}..{high}"):
            Sample(**{field: value})
        kept = Sample(**{field: high})
        with pytest.raises(InvalidArgument):
            setattr(kept, field, value)
        assert getattr(kept, field) == high


def test_70000_does_not_fit_a_u16() -> None:
    with pytest.raises(InvalidArgument, match=r"u16 = 70000 does not fit 0\.\.65535"):
        Sample(u16=70000)


def test_positional_values_are_checked_too() -> None:
    assert Sample(1, -1).s8 == -1
    with pytest.raises(InvalidArgument, match="u8 = 256"):
        Sample(256)
    with pytest.raises(InvalidArgument, match="has 7 fields, not 8"):
        Sample(0, 0, 0, 0, 0, 0, b"", 0)


def test_misspelt_keyword_names_the_fields_there_are() -> None:
    with pytest.raises(InvalidArgument, match="no field 'nmu'; its fields are index, num"):
        vhost.vhost_vring_state(index=0, nmu=256)


def test_misspelt_assignment_is_an_error() -> None:
    state = vhost.vhost_vring_state()
    with pytest.raises(AttributeError, match="nmu"):
        state.nmu = 256


def test_bytes_too_long_for_a_char_array() -> None:
    assert Sample(name=b"abcd").name == b"abcd"
    with pytest.raises(InvalidArgument, match="Sample: name: bytes too long"):
        Sample(name=b"abcde")


def test_fields_of_anonymous_members_are_checked() -> None:
    request = tun.ifreq(ifr_flags=tun.IFF_TAP | tun.IFF_TUN_EXCL)
    assert request.ifr_flags == 0x8002
    with pytest.raises(InvalidArgument, match="ifr_flags = 65536"):
        tun.ifreq(ifr_flags=65536)


def test_a_subclass_without_slots_is_refused() -> None:
    metaclass: type = type(layout.Struct)
    with pytest.raises(TypeError, match="loose needs __slots__"):
        metaclass("loose", (layout.Struct,), {"_fields_": [("a", ctypes.c_int)]})


def test_repr_shows_values_once_and_large_ones_in_hex() -> None:
    state = vhost.vhost_vring_state(index=1, num=256)
    assert repr(state) == "vhost_vring_state(index=1, num=256)"
    region = vhost.vhost_memory_region(memory_size=4096, userspace_addr=0x7F00_0000_0000)
    assert repr(vhost.vhost_memory_table([region])) == (
        "vhost_memory(nregions=1, padding=0, regions=[vhost_memory_region(guest_phys_addr=0,"
        " memory_size=4096, userspace_addr=0x7f0000000000, flags_padding=0)])"
    )
    assert repr(vhost.vhost_msg(type=1)) == (
        "vhost_msg(type=1, iotlb=vhost_iotlb_msg(iova=0, size=0, uaddr=0, perm=0, type=0))"
    )
    assert repr(tun.ifreq(ifr_name=b"tap0")) == "ifreq(ifr_name=b'tap0', ifr_flags=0)"


UNDER_O = """
import ctypes
from vhostctl.abi import ioctl, layout, virtio
from vhostctl.abi.vhost import VHOST_GET_FEATURES, vhost_vring_state
from vhostctl.errors import InvalidArgument

class oversized(layout.Struct):
    __slots__ = ()
    _fields_ = (("data", ctypes.c_uint8 * 16384),)

def refused(call):
    try:
        call()
    except InvalidArgument:
        return True
    return False

print(
    __debug__,
    hex(VHOST_GET_FEATURES.number),
    refused(lambda: ioctl.iow("X", 0xAF, 0, oversized)),
    refused(lambda: ioctl.io("X", 0xAF, 256)),
    refused(lambda: ioctl.Request("X", -1)),
    refused(lambda: vhost_vring_state(nmu=1)),
    refused(lambda: vhost_vring_state(num=2**32)),
    refused(lambda: virtio.vring_desc(flags=70000)),
    refused(lambda: virtio.vring_desc_size(3)),
)
"""


def test_checks_hold_without_assertions() -> None:
    run = subprocess.run(
        [sys.executable, "-O", "-c", UNDER_O],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert run.stdout.split() == ["False", "0x8008af00", *["True"] * 7]
