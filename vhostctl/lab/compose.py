"""One boot, put together: what QEMU is called with, and the files that the guest's init reads.

virtme-run knows how to boot a kernel on the host's root: the machine, the initramfs with the
modules that reach the root, QEMU's quirks. It is asked for its QEMU line (``--dry-run
--show-command``); the ports, a cached 9p mount and a kernel command line that starts our own init
are added to that. virtme's init waits for udev and systemd-tmpfiles, about as long as a boot takes.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from vhostctl.errors import EnvironmentMissing, InvalidArgument
from vhostctl.lab import process
from vhostctl.lab.accel import Accel
from vhostctl.lab.kernels import Kernel

OWN_DIRECTORIES = tuple(Path(name) for name in ("/dev", "/proc", "/run", "/sys"))
"""What the guest has of its own instead of the host's."""

PORTS = ("control", "stdin", "stdout", "stderr")
"""The virtio-serial ports, ``lab.`` before each name in the guest."""

_MODULES = ("overlay", "tun", "vhost_net")
_ENVIRONMENT = ("HOME", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TERM", "TZ", "VIRTUAL_ENV")
_MSIZE = 512_000  # the most that 9p over virtio takes: 128 descriptors of a page, less two

# What a throw-away VM under emulation need not spend time on: measured at 0.7 s of a boot's 3.7 s.
# nokaslr also makes one boot like the next, which counting instructions needs.
_KERNEL_OPTIONS = (
    "console=ttyS0 panic=-1 oops=panic nokaslr mitigations=off tsc=reliable "
    "cryptomgr.notests random.trust_cpu=on"
)


@dataclass(frozen=True)
class Boot:
    """The machine of one boot; `memory` in MiB, `directory` as `write_guest_files` left it.

    `append` is added to the kernel's command line.
    """

    kernel: Kernel
    cpus: int
    memory: int
    accel: Accel
    icount: bool
    share: tuple[Path, ...]
    directory: Path
    verbose: bool
    append: str = ""


@dataclass(frozen=True)
class Command:
    """What the guest runs; `stdin` and `terminal` say what its standard input is."""

    argv: Sequence[str]
    cwd: Path
    env: Mapping[str, str]
    stdin: bool = False
    terminal: bool = False


def write_guest_files(
    directory: Path, kernel: Kernel, share: Iterable[Path], command: Command, marker: str
) -> None:
    """Fill the directory that the guest reads its orders from."""
    init = resources.files("vhostctl.lab").joinpath("init.sh").read_bytes()
    (directory / "init").write_bytes(init)
    setup = guest_setup(kernel, tuple(share), command, marker)
    (directory / "setup").write_bytes(os.fsencode(setup))
    (directory / "command").write_bytes(os.fsencode(guest_command(kernel, command)))


def guest_setup(kernel: Kernel, share: Sequence[Path], command: Command, marker: str) -> str:
    """Return the shell text that init.sh reads its parameters and lists from."""
    values = {
        "release": kernel.release,
        "modules": str(kernel.modules),
        "msize": str(_MSIZE),
        "marker": marker,
        "stdin": "yes" if command.stdin else "no",
        "terminal": "yes" if command.terminal else "no",
    }
    modules = [kernel.modules / path for path in kernel.load_order(_MODULES)]
    lists = {
        "load_modules": [f"insmod {_quote(f'/run/lower{path}')}" for path in modules],
        "mount_shares": [f"share lab.share{n} {_quote(path)}" for n, path in enumerate(share)],
        "sync_shares": ["sync"] if share else [],
    }
    lines = [f"{name}={_quote(value)}" for name, value in values.items()]
    for name, body in lists.items():
        lines += [f"{name}() {{", *body, ":", "}"]
    return "\n".join(lines) + "\n"


def guest_command(kernel: Kernel, command: Command) -> str:
    """Return the shell script that ends as the command: environment, directory, exec."""
    passed = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment = {"PATH": process.search_path(), **passed, **command.env}
    environment["VHOSTCTL_LAB"] = kernel.release
    lines = [f"export {name}={_quote(value)}" for name, value in environment.items()]
    if command.terminal:
        size = os.get_terminal_size()
        lines += ["exec 3>&-", f"stty rows {size.lines} cols {size.columns}"]
    else:
        lines.append("exec <&4 >&5 2>&6 3>&- 4<&- 5>&- 6>&-")
    lines.append(f"cd {_quote(command.cwd)} || exit 126")
    lines.append("exec " + " ".join(_quote(word) for word in command.argv))
    return "\n".join(lines) + "\n"


def qemu_command(boot: Boot, ports: Mapping[str, int]) -> list[str]:
    """Return QEMU's argv; `ports` are the descriptors that it inherits, by name.

    The initramfs is made in the boot's directory. Raises EnvironmentMissing for a missing QEMU,
    virtme-ng or busybox, and with virtme-run's own words when that refuses.
    """
    qemu = process.program("qemu-system-x86_64", "apt install qemu-system-x86")
    busybox = process.program("busybox", "apt install busybox-static")
    process.program("file", "apt install file")
    try:
        line = process.output_of([_virtme_run(), *virtme_options(boot, qemu, busybox)])
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        raise EnvironmentMissing(
            f"virtme-run: {said[-1]}", hint="apt install busybox-static, or update virtme-ng"
        ) from error
    return [*shlex.split(line.splitlines()[-1]), *qemu_options(boot, busybox, ports)]


def virtme_options(boot: Boot, qemu: str, busybox: str) -> list[str]:
    """Return what virtme-run is asked with.

    9p because QEMU 7's virtiofsd is not one that virtme can use; no microvm because it needs that.
    """
    options = ["--dry-run", "--show-command", "--disable-monitor", "--mods=auto"]
    options += ["--kimg", str(boot.kernel.image), "--qemu-bin", qemu, "--busybox", busybox]
    options += ["--force-9p", "--disable-microvm"]
    options += ["--cpus", str(boot.cpus), "--memory", f"{boot.memory}M"]
    options += ["--save-initramfs", str(boot.directory / "initramfs")]
    return options + ([] if boot.accel is not Accel.TCG else ["--disable-kvm"])


def qemu_options(boot: Boot, busybox: str, ports: Mapping[str, int]) -> list[str]:
    """Return what follows virtme's QEMU line; the last ``-append`` is the one that counts."""
    options = ["-no-reboot", "-append", kernel_command_line(boot, busybox)]
    if boot.icount:
        options += ["-icount", "shift=0,sleep=off"]
    mounts = [("lab.root", Path("/"), "readonly=on,")]
    mounts += [(f"lab.share{number}", path, "") for number, path in enumerate(boot.share)]
    for tag, path, access in mounts:
        name = str(path).replace(",", ",,")
        options += [
            "-fsdev",
            f"local,id={tag},path={name},security_model=none,{access}multidevs=remap",
        ]
        options += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    options += ["-device", "virtio-serial-pci,id=lab"]
    for name, fd in ports.items():
        options += ["-chardev", f"socket,id=lab.{name},fd={fd}"]
        options += ["-device", f"virtserialport,bus=lab.0,chardev=lab.{name},name=lab.{name}"]
    return options


def kernel_command_line(boot: Boot, busybox: str) -> str:
    """Return the kernel's command line; what follows ``--`` are init's arguments."""
    level = "loglevel=7" if boot.verbose else "quiet loglevel=1"
    if boot.icount:
        level += " norandmaps"  # the same layout, so the same instructions, in each run
    init = f'"{boot.directory}/init" "{busybox}" "{boot.directory}"'
    words = [_KERNEL_OPTIONS, level, *boot.append.split(), f"init={busybox}", "--", "sh", init]
    return " ".join(words)


def check_visible(path: Path, share: Sequence[Path]) -> None:
    """Raise InvalidArgument for a host directory that the guest cannot see."""
    if any(path.is_relative_to(shared) for shared in share):
        return
    for own in OWN_DIRECTORIES:
        if path.is_relative_to(own):
            raise InvalidArgument(
                f"{path}: the guest has a {own} of its own",
                hint="use another directory, or share this one",
            )


def _virtme_run() -> str:
    """Return virtme-run: beside our own Python, or on $PATH."""
    beside = Path(sys.executable).with_name("virtme-run")
    if os.access(beside, os.X_OK):
        return str(beside)
    return process.program("virtme-run", "pip install 'vhostctl[lab]', or apt install virtme-ng")


def _quote(word: str | Path) -> str:
    return shlex.quote(str(word))
