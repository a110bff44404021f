"""What a vhost-net device offers, asked of the device itself."""

from __future__ import annotations

import contextlib
import ctypes
import errno
from collections.abc import Callable
from dataclasses import dataclass

from vhostctl.abi import vhost, virtio
from vhostctl.abi.ioctl import Request
from vhostctl.errors import KernelError
from vhostctl.host import module, worker
from vhostctl.host.vhost import DEFAULT_PATH, VhostNet

_ROOM = 64


@dataclass(frozen=True, slots=True)
class Report:
    """What `probe` found; `requests` maps each request's name to whether it is answered."""

    device: str
    kernel: str
    features: int
    backend_features: int
    worker: str
    max_mem_regions: int
    modules: dict[str, dict[str, str]]
    requests: dict[str, bool]

    @property
    def feature_names(self) -> list[str]:
        """The offered bits by name, lowest first."""
        return virtio.feature_names(self.features)


def probe(path: str = DEFAULT_PATH, open_device: Callable[[str], VhostNet] = VhostNet.at) -> Report:
    """Open `path` or "engine", own it, ask, and close it again: no ring is started.

    Raises KernelError if the device cannot be opened or owned.
    """
    with open_device(path) as device:
        before = worker.workers()
        device.set_owner()
        new = worker.workers() - before
        kinds = {found.kind for found in new} or {"unknown"}
        features = device.get_features()
        with contextlib.suppress(KernelError):  # kernels before 6.17 have one word only
            features = device.get_features_array()
        return Report(
            device=device.label,
            kernel=module.kernel_release(),
            features=features,
            backend_features=device.get_backend_features(),
            worker="/".join(sorted(kinds)),
            max_mem_regions=module.max_mem_regions(),
            modules={name: module.parameters(name) for name in ("vhost", "vhost_net")},
            requests=_requests(device),
        )


def _requests(device: VhostNet) -> dict[str, bool]:
    """Return whether each request is answered; RESET_OWNER last, as it ends ownership."""
    ordered = sorted(vhost.VHOST_NET_REQUESTS, key=lambda r: r is vhost.VHOST_RESET_OWNER)
    answers = {request.name: _answers(device, request) for request in ordered}
    return {request.name: answers[request.name] for request in vhost.VHOST_NET_REQUESTS}


def _answers(device: VhostNet, request: Request) -> bool:
    """Ask with a zeroed argument, descriptors -1: only an unknown request gives ENOTTY.

    An unknown request reads a ring index from the argument, so there are always bytes for it.
    """
    argument = None
    if request.argument is not None:
        argument = (ctypes.c_uint8 * max(_ROOM, ctypes.sizeof(request.argument)))()
        typed = request.argument.from_buffer(argument)
        if isinstance(typed, vhost.vhost_vring_file):
            typed.fd = vhost.VHOST_FILE_UNBIND
        elif isinstance(typed, ctypes.c_int):
            typed.value = vhost.VHOST_FILE_UNBIND
    try:
        device.request(request, argument)
    except KernelError as error:
        return error.errno != errno.ENOTTY
    return True
