"""Mirror of ``linux/virtio_pci.h``: virtio 1.2, section 4.1, modern and legacy.

Fields are little-endian, which is the host's order too wherever this is used. The header's
offset macros of the modern structures are left out: the structs say the same.
"""

from __future__ import annotations

import ctypes

from vhostctl.abi.layout import Struct

HEADERS = ("linux/virtio_pci.h",)

_u8 = ctypes.c_uint8
_u16 = ctypes.c_uint16
_u32 = ctypes.c_uint32

VIRTIO_PCI_HOST_FEATURES = 0  # the legacy registers, offsets into an I/O BAR
VIRTIO_PCI_GUEST_FEATURES = 4
VIRTIO_PCI_QUEUE_PFN = 8
VIRTIO_PCI_QUEUE_NUM = 12
VIRTIO_PCI_QUEUE_SEL = 14
VIRTIO_PCI_QUEUE_NOTIFY = 16
VIRTIO_PCI_STATUS = 18
VIRTIO_PCI_ISR = 19
VIRTIO_MSI_CONFIG_VECTOR = 20  # there while MSI-X is enabled, as is the next
VIRTIO_MSI_QUEUE_VECTOR = 22
VIRTIO_PCI_QUEUE_ADDR_SHIFT = 12
VIRTIO_PCI_VRING_ALIGN = 4096

VIRTIO_PCI_ISR_CONFIG = 0x2
VIRTIO_MSI_NO_VECTOR = 0xFFFF

VIRTIO_PCI_CAP_COMMON_CFG = 1
VIRTIO_PCI_CAP_NOTIFY_CFG = 2
VIRTIO_PCI_CAP_ISR_CFG = 3
VIRTIO_PCI_CAP_DEVICE_CFG = 4
VIRTIO_PCI_CAP_PCI_CFG = 5


class virtio_pci_cap(Struct):
    """A vendor capability (16 bytes): `length` bytes at `offset` of BAR `bar`."""

    __slots__ = ()
    _fields_ = (
        ("cap_vndr", _u8),
        ("cap_next", _u8),
        ("cap_len", _u8),
        ("cfg_type", _u8),
        ("bar", _u8),
        ("id", _u8),
        ("padding", _u8 * 2),
        ("offset", _u32),
        ("length", _u32),
    )


class virtio_pci_notify_cap(Struct):
    """VIRTIO_PCI_CAP_NOTIFY_CFG (20 bytes); queue_notify_off times the multiplier is in bytes."""

    __slots__ = ()
    _fields_ = (("cap", virtio_pci_cap), ("notify_off_multiplier", _u32))


class virtio_pci_cfg_cap(Struct):
    """VIRTIO_PCI_CAP_PCI_CFG (20 bytes): a window through which `cap` is accessed."""

    __slots__ = ()
    _fields_ = (("cap", virtio_pci_cap), ("pci_cfg_data", _u8 * 4))


class virtio_pci_common_cfg(Struct):
    """The common configuration (56 bytes); from `queue_size` on of queue `queue_select`."""

    __slots__ = ()
    _fields_ = (
        ("device_feature_select", _u32),
        ("device_feature", _u32),
        ("guest_feature_select", _u32),
        ("guest_feature", _u32),
        ("msix_config", _u16),
        ("num_queues", _u16),
        ("device_status", _u8),
        ("config_generation", _u8),
        ("queue_select", _u16),
        ("queue_size", _u16),
        ("queue_msix_vector", _u16),
        ("queue_enable", _u16),
        ("queue_notify_off", _u16),
        ("queue_desc_lo", _u32),
        ("queue_desc_hi", _u32),
        ("queue_avail_lo", _u32),
        ("queue_avail_hi", _u32),
        ("queue_used_lo", _u32),
        ("queue_used_hi", _u32),
    )
