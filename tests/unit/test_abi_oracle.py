"""The C compiler has the last word on the mirror: sizes, offsets, request numbers, bits.

A probe program is generated from everything that the modules of `vhostctl.abi` define, so
that a newly mirrored name is checked without being listed here. Names that the installed
headers lack are allowed only if NEWER says that they are of a later kernel.
"""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

import vhostctl.abi
from vhostctl.abi.ioctl import Request
from vhostctl.abi.layout import Struct, members

# Modules with nothing of a header in them.
MACHINERY = {"layout", "ioctl"}

# The name of a macro, "struct S" or "S.field" -> a kernel whose headers are known to have it.
NEWER = dict.fromkeys(
    (
        "struct vhost_worker_state",
        "struct vhost_vring_worker",
        "VHOST_NEW_WORKER",
        "VHOST_FREE_WORKER",
        "VHOST_ATTACH_VRING_WORKER",
        "VHOST_GET_VRING_WORKER",
        "VHOST_BACKEND_F_RESUME",
        "VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK",
        "VHOST_BACKEND_F_DESC_ASID",
        "VHOST_BACKEND_F_IOTLB_PERSIST",
        "VIRTIO_F_NOTIFICATION_DATA",
        "VIRTIO_F_NOTIF_CONFIG_DATA",
        "VIRTIO_F_ADMIN_VQ",
        "VIRTIO_NET_F_DEVICE_STATS",
        "VIRTIO_NET_F_VQ_NOTF_COAL",
        "VIRTIO_NET_F_GUEST_USO4",
        "VIRTIO_NET_F_GUEST_USO6",
        "VIRTIO_NET_F_HOST_USO",
        "VIRTIO_NET_F_GUEST_HDRLEN",
        "VIRTIO_NET_HDR_GSO_UDP_L4",
        "TUN_F_USO4",
        "TUN_F_USO6",
    ),
    (6, 12),
) | dict.fromkeys(
    (
        "struct vhost_features_array",
        "VHOST_GET_FEATURES_ARRAY",
        "VHOST_SET_FEATURES_ARRAY",
        "VHOST_FORK_OWNER_KTHREAD",
        "VHOST_FORK_OWNER_TASK",
        "VHOST_SET_FORK_FROM_OWNER",
        "VHOST_GET_FORK_FROM_OWNER",
        "VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO",
        "VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_CSUM",
        "VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO",
        "VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO_CSUM",
        "VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM",
        "VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4",
        "VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV6",
        "TUN_F_UDP_TUNNEL_GSO",
        "TUN_F_UDP_TUNNEL_GSO_CSUM",
        "virtio_net_hdr_v1_hash.hash_value_lo",
        "virtio_net_hdr_v1_hash.hash_value_hi",
        "struct virtio_net_hdr_v1_hash_tunnel",
    ),
    (7, 2),
)

Facts = dict[str, dict[str, int]]
"""Name of a macro, struct or field -> C expression -> the value that we have for it."""


def mirrored() -> tuple[list[str], Facts]:
    """Return the headers that the modules mirror and every fact that they state."""
    headers: list[str] = []
    facts: Facts = {}
    for info in pkgutil.iter_modules(vhostctl.abi.__path__):
        if info.name in MACHINERY:
            continue
        module = importlib.import_module(f"vhostctl.abi.{info.name}")
        headers += module.HEADERS
        for name, value in vars(module).items():
            if name.startswith("_"):
                continue
            if isinstance(value, int):
                facts[name] = {name: value}
            elif isinstance(value, Request):
                facts[name] = {name: value.number}
            elif isinstance(value, type) and issubclass(value, Struct) and value is not Struct:
                facts |= struct_facts(value)
    return headers, facts


def is_macro(name: str) -> bool:
    return not name.startswith("struct ") and "." not in name


def struct_of(field: str) -> str:
    return f"struct {field.partition('.')[0]}"


def struct_facts(struct: type[Struct]) -> Facts:
    tag = f"struct {struct.__name__}"
    facts: Facts = {tag: {f"sizeof({tag})": ctypes.sizeof(struct)}}
    for name, kind in members(struct).items():
        if name.startswith("_"):
            continue
        about = {f"offsetof({tag}, {name})": int(getattr(struct, name).offset)}
        if ctypes.sizeof(kind):  # a flexible array has no size in C
            about[f"sizeof((({tag} *)0)->{name})"] = ctypes.sizeof(kind)
        facts[f"{struct.__name__}.{name}"] = about
    return facts


class Headers:
    """The installed headers, asked by compiling."""

    def __init__(self, compiler: str, headers: Iterable[str], scratch: Path) -> None:
        self._compiler = compiler
        self._includes = "".join(
            f"#include <{name}>\n"
            for name in ("stddef.h", "stdio.h", "linux/version.h", *dict.fromkeys(headers))
        )
        self._scratch = scratch

    def compile(self, body: str, *flags: str) -> subprocess.CompletedProcess[str]:
        source = self._scratch / "probe.c"
        source.write_text(f"{self._includes}int main(void)\n{{\n{body}\treturn 0;\n}}\n")
        return subprocess.run(
            [self._compiler, "-Wall", "-Werror", *flags, str(source)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def has(self, name: str) -> bool:
        """Tell whether a macro, a ``struct S`` or a field ``S.field`` is known."""
        if is_macro(name):
            test = f"#ifndef {name}\n#error {name}\n#endif\n"
        elif "." in name:
            test = f"\t(void)offsetof({struct_of(name)}, {name.partition('.')[2]});\n"
        else:
            test = f"\t(void)sizeof({name});\n"
        return self.compile(test, "-fsyntax-only").returncode == 0

    def values(self, facts: Facts) -> dict[str, int]:
        """Return C expression -> value; expressions of macros that are absent are left out."""
        body = []
        for name, about in facts.items():
            prints = "".join(
                f'\tprintf("%lld %s\\n", (long long)({expression}), "{expression}");\n'
                for expression in about
            )
            body.append(f"#ifdef {name}\n{prints}#endif\n" if is_macro(name) else prints)
        program = self._scratch / "probe"
        built = self.compile("".join(body), "-o", str(program))
        assert built.returncode == 0, built.stderr
        run = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60)
        lines = (line.split(" ", 1) for line in run.stdout.splitlines())
        return {expression: int(value) for value, expression in lines}


HEADER_NAMES, FACTS = mirrored()


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Headers:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    return Headers(compiler, HEADER_NAMES, tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def present(headers: Headers) -> Facts:
    """The facts less those about structs and fields that these headers do not have yet."""
    absent = {name for name in NEWER if not is_macro(name) and not headers.has(name)}
    return {
        name: about
        for name, about in FACTS.items()
        if name not in absent and struct_of(name) not in absent
    }


def test_the_compiler_agrees_with_every_fact(headers: Headers, present: Facts) -> None:
    measured = headers.values(present)
    ours = {key: value for about in present.values() for key, value in about.items()}
    assert len(measured) > 200
    assert {key: ours[key] for key in measured} == measured


def test_what_the_headers_lack_is_newer_than_they_are(headers: Headers, present: Facts) -> None:
    measured = headers.values(present)
    absent = FACTS.keys() - present.keys() | {
        name for name, about in present.items() if not about.keys() <= measured.keys()
    }
    code = headers.values({"LINUX_VERSION_CODE": {"LINUX_VERSION_CODE": 0}})["LINUX_VERSION_CODE"]
    version = (code >> 16, code >> 8 & 0xFF)
    allowed = {name for name, known in NEWER.items() if known > version}
    assert {name for name in absent if struct_of(name) not in allowed} <= allowed


def test_every_name_called_newer_is_mirrored() -> None:
    assert NEWER.keys() <= FACTS.keys()


def test_the_oracle_would_notice(headers: Headers) -> None:
    asked: Facts = {
        "VHOST_PAGE_SIZE": {"VHOST_PAGE_SIZE": 1},
        "VHOST_SET_OWNRE": {"VHOST_SET_OWNRE": 0xAF01},
        "struct vhost_msg": {"sizeof(struct vhost_msg)": 1},
    }
    assert headers.values(asked) == {"VHOST_PAGE_SIZE": 4096, "sizeof(struct vhost_msg)": 72}
    assert headers.has("VHOST_SET_OWNER")
    assert not headers.has("VHOST_SET_OWNRE")
    assert headers.has("vhost_msg.iotlb")
    assert not headers.has("vhost_msg.iotbl")
    assert not headers.has("struct vhost_mgs")
