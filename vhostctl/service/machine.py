"""The commands that a virtual machine's QMP socket has; QEMU's names where it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from vhostctl.jobs.vmm import NIC, Vm
from vhostctl.service.schema import Command, DeviceNotFound, Nothing
from vhostctl.vmm.machine import Counters


class Status(msgspec.Struct, frozen=True):
    """Whether the vCPUs run."""

    running: bool
    status: Literal["running", "paused"]


class SetLink(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A network card by name, and what its link is to be."""

    name: str
    up: bool


class Save(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A directory, which is made if it is missing."""

    directory: str


def machine_commands(vm: Vm) -> list[Command[Any]]:
    """Return the commands that act on `vm`."""

    def status(_: Nothing) -> Status:
        running = vm.machine.running
        return Status(running, "running" if running else "paused")

    def set_link(arguments: SetLink) -> None:
        if arguments.name != NIC:
            raise DeviceNotFound(f"there is no network card {arguments.name!r}", hint=NIC)
        vm.set_link(arguments.up)

    return [
        Command("query-status", "Say whether the vCPUs run.", Nothing, Status, status),
        Command("stop", "Pause the vCPUs.", Nothing, Nothing, lambda _: vm.machine.pause()),
        Command(
            "cont", "Let the vCPUs run again.", Nothing, Nothing, lambda _: vm.machine.resume()
        ),
        Command("set_link", f"Take the link of {NIC} down or up.", SetLink, Nothing, set_link),
        Command(
            "query-counters",
            "Say how often the guest left KVM for this process.",
            Nothing,
            Counters,
            lambda _: vm.counters(),
        ),
        Command(
            "save",
            "Write the whole machine to a directory and end it: see `vhostctl vmm resume`.",
            Save,
            Nothing,
            lambda arguments: vm.save(Path(arguments.directory)),
        ),
    ]
