"""Mirror of ``linux/if_tun.h``, and of the ``struct ifreq`` that its requests take.

The header encodes most requests with ``int`` or ``unsigned int`` whatever they really
take. `Request.argument` and `Request.by_value` say what drivers/net/tun.c does with the
third argument of ioctl(2); the request number is the header's all the same. Packet
filters are left out.
"""

from __future__ import annotations

import ctypes

from vhostctl.abi.ioctl import io, ior, iow
from vhostctl.abi.layout import Struct

HEADERS = ("linux/if.h", "linux/if_tun.h")

IFNAMSIZ = 16  # bytes, with the terminating zero

IFF_TUN = 0x0001
IFF_TAP = 0x0002
IFF_NAPI = 0x0010
IFF_NAPI_FRAGS = 0x0020
IFF_NO_CARRIER = 0x0040
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400
IFF_PERSIST = 0x0800
IFF_NO_PI = 0x1000
IFF_NOFILTER = 0x1000  # read-only, in the answer of TUNGETIFF
IFF_ONE_QUEUE = 0x2000
IFF_VNET_HDR = 0x4000
IFF_TUN_EXCL = 0x8000

TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08
TUN_F_UFO = 0x10
TUN_F_USO4 = 0x20
TUN_F_USO6 = 0x40
TUN_F_UDP_TUNNEL_GSO = 0x80
TUN_F_UDP_TUNNEL_GSO_CSUM = 0x100


class _ifr_ifru(ctypes.Union):
    _fields_ = (
        ("ifr_flags", ctypes.c_uint16),
        ("ifr_ifindex", ctypes.c_int),
        ("_unused", ctypes.c_uint64 * 3),
    )


class ifreq(Struct):
    """Name of an interface and one value (40 bytes on 64-bit hosts), from ``linux/if.h``.

    `ifr_flags` is a ``short`` in the header; here it is unsigned, for IFF_TUN_EXCL is its
    sign bit. `ifr_name` is bytes of at most IFNAMSIZ - 1 plus a zero.
    """

    __slots__ = ()
    _anonymous_ = ("_ifr_ifru",)
    _fields_ = (("ifr_name", ctypes.c_char * IFNAMSIZ), ("_ifr_ifru", _ifr_ifru))


_int = ctypes.c_int
_uint = ctypes.c_uint
_MAGIC = ord("T")

TUNSETDEBUG = iow("TUNSETDEBUG", _MAGIC, 201, _int, by_value=True)
TUNSETIFF = iow("TUNSETIFF", _MAGIC, 202, _int, argument=ifreq)
TUNSETPERSIST = iow("TUNSETPERSIST", _MAGIC, 203, _int, by_value=True)
TUNSETOWNER = iow("TUNSETOWNER", _MAGIC, 204, _int, argument=_uint, by_value=True)
TUNSETLINK = iow("TUNSETLINK", _MAGIC, 205, _int, by_value=True)
TUNSETGROUP = iow("TUNSETGROUP", _MAGIC, 206, _int, argument=_uint, by_value=True)
TUNGETFEATURES = ior("TUNGETFEATURES", _MAGIC, 207, _uint)
TUNSETOFFLOAD = iow("TUNSETOFFLOAD", _MAGIC, 208, _uint, by_value=True)
TUNGETIFF = ior("TUNGETIFF", _MAGIC, 210, _uint, argument=ifreq)
TUNGETSNDBUF = ior("TUNGETSNDBUF", _MAGIC, 211, _int)
TUNSETSNDBUF = iow("TUNSETSNDBUF", _MAGIC, 212, _int)
TUNGETVNETHDRSZ = ior("TUNGETVNETHDRSZ", _MAGIC, 215, _int)
TUNSETVNETHDRSZ = iow("TUNSETVNETHDRSZ", _MAGIC, 216, _int)
TUNSETQUEUE = iow("TUNSETQUEUE", _MAGIC, 217, _int, argument=ifreq)
TUNSETIFINDEX = iow("TUNSETIFINDEX", _MAGIC, 218, _uint)
TUNSETVNETLE = iow("TUNSETVNETLE", _MAGIC, 220, _int)
TUNGETVNETLE = ior("TUNGETVNETLE", _MAGIC, 221, _int)
TUNSETVNETBE = iow("TUNSETVNETBE", _MAGIC, 222, _int)
TUNGETVNETBE = ior("TUNGETVNETBE", _MAGIC, 223, _int)
TUNSETSTEERINGEBPF = ior("TUNSETSTEERINGEBPF", _MAGIC, 224, _int)
TUNSETFILTEREBPF = ior("TUNSETFILTEREBPF", _MAGIC, 225, _int)
TUNSETCARRIER = iow("TUNSETCARRIER", _MAGIC, 226, _int)
TUNGETDEVNETNS = io("TUNGETDEVNETNS", _MAGIC, 227)  # returns a new descriptor
