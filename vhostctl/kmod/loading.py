"""Loading the module and taking it out again: finit_module(2), delete_module(2)."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from vhostctl.errors import (
    EnvironmentMissing,
    InvalidArgument,
    StateError,
    VhostctlError,
    kernel_error,
)
from vhostctl.host.module import kernel_release
from vhostctl.kmod import NAME, NODE
from vhostctl.kmod.building import store
from vhostctl.kmod.kmsg import KernelLog
from vhostctl.kmod.modinfo import ModuleInfo, inspect
from vhostctl.kmod.status import holders, is_loaded, reference_count, users
from vhostctl.lab import process

# asm/unistd_64.h; glibc has no wrappers.
_FINIT_MODULE = 313
_DELETE_MODULE = 176
_COMPRESSED_FILE = 4  # MODULE_INIT_COMPRESSED_FILE of linux/module.h

_CAP_SYS_MODULE = 16  # linux/capability.h
_OWN_STATUS = Path("/proc/self/status")
_MODULES_DISABLED = Path("/proc/sys/kernel/modules_disabled")
_LOCKDOWN = Path("/sys/kernel/security/lockdown")


def load(module: Path | None = None, parameters: Mapping[str, str] | None = None) -> ModuleInfo:
    """Load a module file, or the one for the running kernel, and return what it says of itself.

    Without `module` it is the one in the cache, else the one that modprobe would take. What it
    depends on is loaded before. Raises InvalidArgument for a module of another kernel and for a
    parameter that it does not have, StateError if it is loaded already, EnvironmentMissing if
    there is none, or the permission, or a signature that the kernel asks for; KernelError for
    any other refusal.
    """
    info = inspect(module) if module is not None else _for_running_kernel()
    values = dict(parameters or {})
    if info.name != NAME:
        raise InvalidArgument(f"{info.path} is the module {info.name}, not {NAME}")
    if unknown := sorted(set(values) - set(info.parameters)):
        raise InvalidArgument(
            f"{NAME} has no parameter {', '.join(unknown)}",
            hint=f"it has {', '.join(info.parameters) or 'none'}",
        )
    _check_kernel(info)
    if is_loaded():
        raise StateError(f"{NAME} is loaded already", hint="vhostctl kmod unload takes it out")
    _check_capability(f"loading {NAME}")
    for needed in info.depends:
        _modprobe(needed)
    with open(info.path, "rb") as file, KernelLog() as log:
        flags = 0 if info.path.suffix == ".ko" else _COMPRESSED_FILE
        number = _system_call(_FINIT_MODULE, file.fileno(), _arguments(values), flags)
        if number:
            raise _refusal(number, "finit_module", str(info.path), log.messages())
    return info


def unload() -> None:
    """Take the module out.

    Raises StateError if it is not loaded, or in use, naming who uses it; EnvironmentMissing
    without the permission.
    """
    if not is_loaded():
        raise StateError(f"{NAME} is not loaded")
    _check_capability(f"unloading {NAME}")
    number = _system_call(_DELETE_MODULE, NAME.encode(), os.O_NONBLOCK)
    if number in (errno.EWOULDBLOCK, errno.EBUSY):
        who = [f"{pid} ({name})" for pid, name in users()] + list(holders())
        raise StateError(
            f"{NAME} is in use (refcount {reference_count()}) by {', '.join(who) or 'the kernel'}",
            hint=f"close {NODE} there",
        )
    if number:
        raise _refusal(number, "delete_module", NAME, [])


def _for_running_kernel() -> ModuleInfo:
    release = kernel_release()
    cached = store() / release / f"{NAME}.ko"
    if cached.is_file():
        return inspect(cached)
    with suppress(InvalidArgument):
        return inspect(NAME)
    raise EnvironmentMissing(
        f"no {NAME} for Linux {release}", hint="build one with vhostctl kmod build"
    )


def _check_kernel(info: ModuleInfo) -> None:
    """Compare with a module that the kernel came with: both were built with its configuration."""
    own = kernel_release()
    with suppress(InvalidArgument):
        own = inspect("tun").vermagic or own
    theirs = info.vermagic if " " in own else info.release
    if theirs != own:
        raise InvalidArgument(
            f"{info.path} is for the kernel {theirs!r}, this one is {own!r}",
            hint="build it with vhostctl kmod build",
        )


def _check_capability(what: str) -> None:
    text = _OWN_STATUS.read_text(encoding="ascii")
    effective = next(line.split()[1] for line in text.splitlines() if line.startswith("CapEff:"))
    if not int(effective, 16) & (1 << _CAP_SYS_MODULE):
        raise EnvironmentMissing(f"{what} needs CAP_SYS_MODULE", hint="run it as root")


def _modprobe(name: str) -> None:
    try:
        process.output_of([process.program("modprobe", "apt install kmod"), name])
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["it failed"])[-1]
        raise EnvironmentMissing(
            f"{NAME} needs the kernel's module {name}: {said.removeprefix('modprobe: ')}",
            hint="install the modules of the running kernel",
        ) from error


def _arguments(values: Mapping[str, str]) -> bytes:
    words = []
    for name, value in values.items():
        if '"' in value or "\n" in value:
            raise InvalidArgument(f"{name}: a parameter cannot hold a quote or a line break")
        words.append(f'{name}="{value}"' if " " in value else f"{name}={value}")
    return " ".join(words).encode()


def _system_call(number: int, *arguments: int | bytes) -> int:
    """Return the errno of a system call, 0 if it worked."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    # Variadic: an int would travel as 32 bits, with rubbish above them.
    passed = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return ctypes.get_errno() if libc.syscall(ctypes.c_long(number), *passed) < 0 else 0


def _refusal(number: int, request: str, target: str, log: list[str]) -> VhostctlError:
    """Return the error for a refusal; `log` is what the kernel said meanwhile."""
    if number in (errno.EKEYREJECTED, errno.ENOKEY):
        return EnvironmentMissing(
            f"{target}: the kernel takes signed modules only (module.sig_enforce)",
            hint="sign it with a key of /proc/keys (.builtin_trusted_keys, .machine)",
        )
    if number == errno.EPERM and (reason := _locked()):
        return EnvironmentMissing(f"{target}: {reason[0]}", hint=reason[1])
    if number == errno.EOPNOTSUPP:
        return kernel_error(
            number, request, target, "this kernel does not unpack modules: unpack it"
        )
    said = [line for line in log if NAME in line or "module" in line]
    return kernel_error(number, request, target, f"the kernel says: {said[-1]}" if said else "")


def _locked() -> tuple[str, str] | None:
    """Return what forbids loading and what to do about it, or None."""
    with suppress(OSError):
        if _MODULES_DISABLED.read_text().strip() != "0":
            return "modules cannot be loaded any more (kernel.modules_disabled)", "reboot"
    with suppress(OSError):
        text = _LOCKDOWN.read_text()
        level = text.partition("[")[2].partition("]")[0]
        if level not in ("", "none"):
            return (
                f"the kernel is locked down ({level}) and takes signed modules only",
                "sign it with a key that the kernel has, or switch Secure Boot off",
            )
    return None
