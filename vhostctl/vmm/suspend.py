"""A whole machine in a directory: what another process needs to go on with it.

``machine.json`` is everything but memory, which is in the file that it names, one region behind
the other. A save replaces both by one rename, so that there is always one whole machine.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO, Self

import msgspec

from vhostctl.errors import InvalidArgument, StateError, kernel_error
from vhostctl.host.memory import MappedRegion
from vhostctl.vmm import cpustate, layout
from vhostctl.vmm.cpustate import KvmState
from vhostctl.vmm.machine import Machine, MachineConfig
from vhostctl.vmm.net import NetDevice
from vhostctl.vmm.netconfig import NetState
from vhostctl.vmm.pci import PciBusState
from vhostctl.vmm.platform import PlatformState
from vhostctl.vmm.serial import SerialState
from vhostctl.vmm.virtio_pci import VirtioPciState

VERSION = 1
DOCUMENT = "machine.json"

_IMAGE_NAME = "memory-{}"
_CHUNK = 1 << 20
_MODE = 0o600


class NicState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A network card: its PCI function and transport, and the device behind them."""

    function: VirtioPciState
    device: NetState


ImageName = Annotated[str, msgspec.Meta(pattern="^memory-[0-9a-f]{8}$")]


class Head(msgspec.Struct, frozen=True):
    """What the document of every version has, as far as it can be told."""

    version: int
    image: ImageName | None = None


class MachineState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything of a machine but its memory, which is `memory` bytes in the file `image`.

    `nics` are in the order of the PCI slots; `running` is whether the vCPUs ran.
    """

    version: int
    running: bool
    memory: int
    image: ImageName
    transitional: bool
    kvm: KvmState
    serial: SerialState
    platform: PlatformState
    pci: PciBusState
    nics: tuple[NicState, ...]

    @property
    def cpus(self) -> int:
        """How many vCPUs there are."""
        return len(self.kvm.cpus)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the document of `directory`. Raises InvalidArgument and KernelError."""
        path = directory / DOCUMENT
        with _about("load", path):
            text = path.read_bytes()
        try:
            version = msgspec.json.decode(text, type=Head).version
            if version == VERSION:
                return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidArgument(f"{path}: {error}", hint="save the machine again") from error
        raise InvalidArgument(
            f"{path}: version {version}", hint=f"this vhostctl reads version {VERSION}"
        )

    def config(self, *, irqfd: bool = True, ioeventfd: bool = True) -> MachineConfig:
        """Return what a machine is to have to go on from here. Raises InvalidArgument."""
        return MachineConfig(
            memory=self.memory,
            cpus=self.cpus,
            irqfd=irqfd,
            ioeventfd=ioeventfd,
            transitional=self.transitional,
        )


def save(machine: Machine, nics: Sequence[NetDevice], directory: Path) -> None:
    """Pause `machine` and write it to `directory`, which is made; it stays paused.

    `nics` are the devices behind `machine.functions`, in their order. If it fails the machine
    goes on as before, or stays paused if it was, and what was in `directory` stays. Raises
    KernelError (ENOSPC...), StateError for a machine that has ended, or what ended it.
    """
    with ExitStack() as undo:
        if running := machine.running:
            undo.callback(machine.resume)
        machine.pause()
        with machine.lock:
            if (end := machine.wait(0)) is not None:
                raise StateError(f"the machine has ended: {end.value}", hint="boot another one")
            for nic in nics:
                undo.callback(_go_on, machine, nic)
            devices = [nic.save() for nic in nics]
            # Before the vCPUs: an interrupt on its way goes to their local APICs.
            functions = [function.save() for function in machine.functions]
            state = MachineState(
                version=VERSION,
                running=running,
                memory=machine.config.memory,
                image=_IMAGE_NAME.format(secrets.token_hex(4)),
                transitional=machine.config.transitional,
                kvm=cpustate.save(machine.kvm, machine.vm, [cpu.vcpu for cpu in machine.cpus]),
                serial=machine.serial.state(),
                platform=machine.platform.state(),
                pci=machine.pci.save(),
                nics=tuple(map(NicState, functions, devices)),
            )
            # Under the lock: what is typed or asked for now would be in neither machine.
            _write(machine, state, directory)
        undo.pop_all()


def _go_on(machine: Machine, nic: NetDevice) -> None:
    with machine.lock:
        nic.go_on()


def _write(machine: Machine, state: MachineState, directory: Path) -> None:
    with _about("save", directory), ExitStack() as undo:
        directory.mkdir(parents=True, exist_ok=True)
        before = _image(directory)
        # A new file: who was resumed from the old one has it mapped.
        image, fresh = directory / state.image, directory / f"{DOCUMENT}.new"
        undo.callback(_remove_unnamed, image)
        with _created(image) as file:
            start = 0
            for region in machine.ram:
                _write_region(file.fileno(), start, region)
                start += region.size
            file.truncate(start)
        undo.callback(fresh.unlink, missing_ok=True)
        with _created(fresh) as file:
            file.write(msgspec.json.encode(state))
        fresh.rename(directory / DOCUMENT)
        _flush(directory)
        if before is not None:
            before.unlink(missing_ok=True)


@contextmanager
def _created(path: Path) -> Iterator[BinaryIO]:
    """Yield the file, made for its owner alone: what a guest keeps secret is in it."""
    path.touch(_MODE)
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _flush(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _image(directory: Path) -> Path | None:
    """Return the memory of the machine that is in `directory`, if one is."""
    try:
        name = msgspec.json.decode((directory / DOCUMENT).read_bytes(), type=Head).image
    except (FileNotFoundError, msgspec.DecodeError, RecursionError):
        return None
    return None if name is None else directory / name


def _remove_unnamed(image: Path) -> None:
    """Remove the memory of a save that failed before its document was in place."""
    if _image(image.parent) != image:
        image.unlink(missing_ok=True)


def _write_region(fd: int, start: int, region: MappedRegion) -> None:
    """Write what `region` holds from `start` on, with holes where it is zero."""
    zero = bytes(_CHUNK)
    with region.view() as view:
        for begin, length in region.extents():
            for at in range(begin, begin + length, _CHUNK):
                chunk = view[at : min(at + _CHUNK, begin + length)]
                if bytes(chunk) == zero[: len(chunk)]:  # views are compared byte by byte
                    continue
                os.lseek(fd, start + at, os.SEEK_SET)
                while chunk:
                    chunk = chunk[os.write(fd, chunk) :]


@contextmanager
def saved_ram(state: MachineState, directory: Path) -> Iterator[list[MappedRegion]]:
    """Yield guest memory as it was saved; what is written to it stays in this process.

    The file is read as the guest comes to it, and must stay as it is meanwhile. Raises
    InvalidArgument (a file that is too short) and KernelError.
    """
    with ExitStack() as stack:
        regions, offset = [], 0
        for gpa, size in layout.ram(state.memory):
            region = MappedRegion.file(
                gpa, size, directory / state.image, offset, shared=False, name=f"RAM at {gpa:#x}"
            )
            regions.append(stack.enter_context(region))
            offset += size
        yield regions


def restore(machine: Machine, nics: Sequence[NetDevice], state: MachineState) -> None:
    """Have `machine`, with the memory of `saved_ram` and never run, be as `state`.

    It is paused then. Raises InvalidArgument (another number of cards or vCPUs, other
    features), NegotiationError and KernelError.
    """
    if len(nics) != len(state.nics):
        raise InvalidArgument(f"{len(nics)} network cards for the state of {len(state.nics)}")
    with machine.lock:
        cpustate.restore(state.kvm, machine.vm, [cpu.vcpu for cpu in machine.cpus])
        machine.serial.restore(state.serial)
        machine.platform.restore(state.platform)
        machine.pci.restore(state.pci)
        for function, device, nic in zip(machine.functions, nics, state.nics, strict=True):
            # Its interrupts go to controllers that are restored already.
            function.restore(nic.function)
            device.restore(nic.device, function.rings)


@contextmanager
def _about(operation: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else ""
        raise kernel_error(error.errno or 0, operation, str(path), hint) from error
