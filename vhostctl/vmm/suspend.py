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
from typing import Annotated, Self

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
_IMAGE_PATTERN = "^memory-[0-9a-f]{8}$"
_CHUNK = 1 << 20
_MODE = 0o600


class NicState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A network card: its PCI function and transport, and the device behind them."""

    function: VirtioPciState
    device: NetState


class MachineState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything of a machine but its memory, which is `memory` bytes in the file `image`.

    `nics` are in the order of the PCI slots.
    """

    version: int
    memory: int
    image: Annotated[str, msgspec.Meta(pattern=_IMAGE_PATTERN)]
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
        with _about(path):
            text = path.read_bytes()
        try:
            state = msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise InvalidArgument(f"{path}: {error}") from error
        if state.version != VERSION:
            raise InvalidArgument(
                f"{path}: version {state.version}", hint=f"this vhostctl reads version {VERSION}"
            )
        return state

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
        if machine.running:
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
                memory=machine.config.memory,
                image=_IMAGE_NAME.format(secrets.token_hex(4)),
                transitional=machine.config.transitional,
                kvm=cpustate.save(machine.kvm, machine.vm, [cpu.vcpu for cpu in machine.cpus]),
                serial=machine.serial.state(),
                platform=machine.platform.state(),
                pci=machine.pci.save(),
                nics=tuple(map(NicState, functions, devices)),
            )
        _write(machine, state, directory)
        undo.pop_all()


def _go_on(machine: Machine, nic: NetDevice) -> None:
    with machine.lock:
        nic.go_on()


def _write(machine: Machine, state: MachineState, directory: Path) -> None:
    with _about(directory), ExitStack() as undo:
        directory.mkdir(parents=True, exist_ok=True)
        before = set(directory.glob(_IMAGE_NAME.format("?" * 8)))
        # A new file: who was resumed from the old one has it mapped.
        image = directory / state.image
        undo.callback(image.unlink, missing_ok=True)
        # What a guest keeps secret is in both files.
        image.touch(_MODE)
        with image.open("wb") as file:
            start = 0
            for region in machine.ram:
                _write_region(file.fileno(), start, region)
                start += region.size
            file.truncate(start)
        fresh = directory / f"{DOCUMENT}.new"
        undo.callback(fresh.unlink, missing_ok=True)
        fresh.touch(_MODE)
        fresh.write_bytes(msgspec.json.encode(state))
        fresh.rename(directory / DOCUMENT)
        undo.pop_all()
        for old in before:
            old.unlink(missing_ok=True)


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
def _about(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else ""
        raise kernel_error(error.errno or 0, "save or load", str(path), hint) from error
