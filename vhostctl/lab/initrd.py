"""An initramfs for a small guest: busybox, the kernel's virtio-net, a shell on the console.

It is a cpio archive in the kernel's newc format (Documentation/driver-api/early-userspace/
buffer-format.rst), not compressed: unpacking takes an emulated machine longer than reading.
"""

from __future__ import annotations

import lzma
import re
import stat
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

from vhostctl.errors import EnvironmentMissing, InvalidArgument, kernel_error
from vhostctl.lab import process
from vhostctl.lab.kernels import Kernel

MODULES = ("virtio_pci", "virtio_net")
"""What the guest loads, as far as its kernel does not have it built in."""

_DIRECTORIES = ("dev", "proc", "sbin", "sys", "tmp", "usr/bin", "usr/sbin")
# cttyhack: without a controlling terminal ctrl-C would end nothing.
_INITTAB = """\
::sysinit:/etc/rc
::respawn:/bin/busybox cttyhack /bin/sh -l
::ctrlaltdel:/bin/busybox reboot
"""
# For a driver that was loaded again, too: its interface has no address.
_NETWORK = """\
#!/bin/sh
# Bring eth0 up with the address of vhostctl.ip= on the kernel's command line.
address=$(sed -n 's/.*vhostctl\\.ip=\\([^ ]*\\).*/\\1/p' /proc/cmdline)
[ -n "$address" ] || exit 0
ip addr add "$address" dev eth0 && ip link set eth0 up
"""


@dataclass(frozen=True)
class Entry:
    """A file of the archive: its st_mode, and its bytes or a symbolic link's target."""

    mode: int
    body: bytes = b""


def write(kernel: Kernel, path: Path, add: Iterable[Path] = ()) -> None:
    """Write the initramfs for `kernel` to `path`.

    `add` are files of this machine's that the guest has at the same place, programs with
    their shared libraries. Raises EnvironmentMissing without a static busybox, or for a
    library or module that cannot be had, InvalidArgument for a file that cannot be read, and
    KernelError if `path` cannot be written; nothing is left there then.
    """
    data = archive(entries(kernel, add))
    try:
        file = path.open("wb")  # if that is refused, what is there stays
        try:
            with file:
                file.write(data)
        except BaseException:
            if path.is_file():
                path.unlink()
            raise
    except OSError as error:
        raise kernel_error(error.errno or 0, "write", str(path)) from error


def entries(kernel: Kernel, add: Iterable[Path] = ()) -> dict[str, Entry]:
    """Return what is in the initramfs, by path without the leading slash."""
    script = resources.files("vhostctl.lab").joinpath("initrd.sh").read_bytes()
    found = {
        "init": Entry(stat.S_IFLNK | 0o777, b"bin/busybox"),
        "bin/sh": Entry(stat.S_IFLNK | 0o777, b"busybox"),
        "bin/busybox": _program(_busybox()),
        "bin/network": _program(_NETWORK.encode()),
        "etc/inittab": _file(_INITTAB.encode()),
        "etc/rc": _program(script),
    }
    for path, body in module_files(kernel).items():
        found[f"lib/modules/{kernel.release}/{path}"] = _file(body)
    for file in add:
        for part in (file.absolute(), *libraries(file)):
            found[str(part).lstrip("/")] = _copy(part)
    return found


def module_files(kernel: Kernel) -> dict[str, bytes]:
    """Return the guest's module directory: `MODULES`, what they need, and modprobe's lists.

    modprobe is busybox's, which cannot unpack, so what Debian compressed is unpacked here.
    """
    depends = kernel.dependencies
    files = {"modules.builtin": (kernel.modules / "modules.builtin").read_bytes()}
    lines = []
    for path in kernel.load_order(MODULES):
        plain = _unpacked_name(path)
        files[plain] = _module(kernel.modules / path)
        lines.append(f"{plain}: {' '.join(_unpacked_name(other) for other in depends[path])}\n")
    return files | {"modules.dep": "".join(lines).encode()}


def libraries(program: Path) -> list[Path]:
    """Return the shared libraries of a program, its loader among them (ldd(1)).

    Raises EnvironmentMissing for one that is not there.
    """
    try:
        said = process.output_of([process.program("ldd", "apt install libc-bin"), str(program)])
    except subprocess.CalledProcessError:
        return []  # a script, a static program, data
    if missing := re.search(r"(\S+) => not found", said):
        raise EnvironmentMissing(
            f"{program}: its library {missing[1]} is not there", hint="install it"
        )
    return [Path(word) for word in said.split() if word.startswith("/")]


def archive(files: Mapping[str, Entry]) -> bytes:
    """Return the newc archive of `files` and the directories that they are in."""
    parents = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    directories = (parents | set(_DIRECTORIES) | {"usr"}) - {"."}
    whole = {name: Entry(stat.S_IFDIR | 0o755) for name in sorted(directories)} | dict(files)
    parts = [
        part for number, name in enumerate(whole, 1) for part in _record(number, name, whole[name])
    ]
    parts += _record(0, "TRAILER!!!", Entry(0))
    return b"".join(parts)


def _record(number: int, name: str, entry: Entry) -> Iterator[bytes]:
    encoded = name.encode() + b"\0"
    # ino, mode, uid, gid, nlink, mtime, size, device and node numbers, name's size, checksum
    fields = (number, entry.mode, 0, 0, 1, 0, len(entry.body), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    for part in (head, entry.body):
        yield part
        yield bytes(-len(part) % 4)


def _busybox() -> bytes:
    path = process.program("busybox", "apt install busybox-static")
    if libraries(Path(path)):
        raise EnvironmentMissing(f"{path} is not static", hint="apt install busybox-static")
    return Path(path).read_bytes()


def _unpacked_name(path: str) -> str:
    return path.removesuffix(".xz")


def _module(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".ko":
        return data
    if path.suffix == ".xz":
        return lzma.decompress(data)
    raise EnvironmentMissing(
        f"{path} is compressed, and not by xz", hint="take another kernel, or unpack its modules"
    )


def _copy(path: Path) -> Entry:
    try:
        return Entry(stat.S_IFREG | path.stat().st_mode & 0o777, path.read_bytes())
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}", hint="name files to be read") from error


def _program(body: bytes) -> Entry:
    return Entry(stat.S_IFREG | 0o755, body)


def _file(body: bytes) -> Entry:
    return Entry(stat.S_IFREG | 0o644, body)
