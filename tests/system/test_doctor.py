"""The doctor's findings on a real kernel: the fault made, the remedy typed, the finding gone.

Each fault is made in a child with a /dev and an /etc of its own. Those that change the machine
itself, such as a module that is gone, are in tests/vm/doctor_faults.py.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import denying
from tests.support.doctor_box import (
    KVM,
    NOBODY,
    NUMBERS,
    TUN,
    as_nobody,
    drop,
    in_box,
    in_child,
    in_user_namespace,
    look,
    mknod,
    shell,
)
from vhostctl.abi import tun
from vhostctl.conformance import flags
from vhostctl.doctor import kernels
from vhostctl.doctor.system import CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN, System
from vhostctl.errors import KernelError
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap, TapQueue
from vhostctl.host.vhost import DEFAULT_PATH, VhostNet

pytestmark = pytest.mark.usefixtures("nothing_left")

# On the engine there is no node of vhost-net, and /dev/net/tun stands for both.
PATHS = [path for path in (DEFAULT_PATH, TUN) if Path(path).exists()]
FAMILY = {DEFAULT_PATH: "VHOST-NODE", TUN: "VHOST-TUN"}
each_node = pytest.mark.parametrize("path", PATHS)


def evidence_and_remedy(code: str) -> list[str] | None:
    """What a fresh look says of `code`; None without it."""
    finding = look().get(code)
    return None if finding is None else [finding.evidence, finding.remedy]


def cured(
    code: str,
    fault: Callable[[], object],
    cure: Callable[[str], object] = shell,
    who: Callable[[Callable[[], Any]], Any] = in_child,
) -> str:
    """Make a fault in a box, see `code` as `who`, apply its remedy, see it gone.

    Returns the evidence.
    """

    def work() -> list[Any]:
        fault()
        said = who(lambda: evidence_and_remedy(code))
        if said is not None:
            cure(said[1])
        return [said, who(lambda: evidence_and_remedy(code))]

    said, left = in_box(work)
    assert said is not None
    assert left is None
    return str(said[0])


def replace(path: str, number: tuple[int, int] | None) -> None:
    os.unlink(path)  # noqa: PTH108
    if number is None:
        Path(path).write_text("")
    else:
        mknod(path, number)


@each_node
def test_a_node_that_is_missing(path: str) -> None:
    assert "No such file" in cured(f"{FAMILY[path]}-MISSING", Path(path).unlink)


@each_node
def test_a_file_in_the_place_of_a_node(path: str) -> None:
    assert "no character" in cured(f"{FAMILY[path]}-TYPE", lambda: replace(path, None))


@each_node
def test_a_node_with_another_number(path: str) -> None:
    said = cured(f"{FAMILY[path]}-NUMBER", lambda: replace(path, (1, 3)))
    assert f"{path} is 1:3, the driver is 10:" in said


def give(path: str, mode: int, gid: int = 0) -> None:
    os.chown(path, 0, gid)
    Path(path).chmod(mode)


def test_a_node_of_a_group() -> None:
    """usermod(8) lets the user in."""
    path = PATHS[0]
    code = f"{FAMILY[path]}-ACCESS"

    def fault() -> None:
        with open("/etc/group", "a") as groups:
            groups.write("virt:x:4321:\n")
        give(path, 0o660, 4321)

    said = cured(code, fault, who=as_nobody)
    assert re.search(rf"{path} is 0660 root:virt with no ACL, .*EACCES; we are nobody", said)


@each_node
def test_a_mode_that_lets_nobody_in(path: str) -> None:
    """What tun gets is for all; vhost-net gets the group kvm, made here if there is none."""

    def fault() -> None:
        lines = Path("/etc/group").read_text().splitlines()
        others = [line for line in lines if not line.startswith("kvm:")]
        Path("/etc/group").write_text("\n".join([*others, "kvm:x:4321:", ""]))
        give(path, 0o600)

    assert f"{path} is 0600 root:root" in cured(f"{FAMILY[path]}-ACCESS", fault, who=as_nobody)


def test_an_access_control_list_counts() -> None:
    path, code = PATHS[0], f"{FAMILY[PATHS[0]]}-ACCESS"
    owner, group, other = 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF

    def acl(mask: int) -> None:
        entries = [
            (1, 6, owner),
            (2, 6, NOBODY),
            (4, 0, group),
            (16, mask, 0xFFFFFFFF),
            (32, 0, other),
        ]
        value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)
        os.setxattr(path, "system.posix_acl_access", value)

    said = cured(code, lambda: acl(4), lambda _: acl(6), as_nobody)
    assert f"ACL user:{NOBODY}:rw,mask::r-" in said


@each_node
def test_a_file_system_without_devices(path: str) -> None:
    said = cured(f"{FAMILY[path]}-NODEV", lambda: shell("mount -o remount,nodev /dev"))
    assert said == f"{path}: /dev is mounted with nodev"


@each_node
def test_a_device_cgroup(path: str) -> None:
    code = f"{FAMILY[path]}-CGROUP"
    with denying.device_group(NUMBERS[path][1]) as group:

        def join() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        said = cured(code, join, lambda _: denying.allow_devices(group))
    assert re.search(rf"EPERM; /proc/self/cgroup: .*/{group.name}", said)


@each_node
def test_a_security_module(path: str) -> None:
    code = f"{FAMILY[path]}-LSM"

    def restricted() -> list[str] | None:
        denying.write_only_to(["/proc", "/dev/null"])
        return evidence_and_remedy(code)

    said, left = in_box(lambda: [in_child(restricted), evidence_and_remedy(code)])
    assert said is not None
    assert re.search("EACCES; security modules .*", said[0])
    assert left is None


def test_a_node_that_is_no_vhost_device() -> None:
    path = "/dev/mine"

    def owner() -> str | None:
        finding = look(path).get("VHOST-NODE-OWNER")
        return finding.evidence if finding else None

    def work() -> list[str | None]:
        mknod(path, (1, 5))
        return [owner()]

    (said,) = in_box(work)
    assert said is not None
    assert said.startswith(f"VHOST_SET_OWNER on {path}: ")


def task_workers() -> bool:
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= (6, 4)


def test_a_limit_of_tasks() -> None:
    """From Linux 6.4 on a worker counts; before, the limit is no fault."""

    def limited() -> list[str]:
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        return sorted(look())

    before, after = in_box(lambda: [as_nobody(limited), as_nobody(lambda: sorted(look()))])
    assert ("VHOST-LIMIT-NPROC" in before) == task_workers()
    assert ("VHOST-NODE-OWNER" in before) == (task_workers() and DEFAULT_PATH in PATHS)
    assert not {"VHOST-LIMIT-NPROC", "VHOST-NODE-OWNER"} & set(after)


def test_a_limit_of_open_files() -> None:
    def fault() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))

    def cure(remedy: str) -> None:
        number = int(remedy.removeprefix("ulimit -n "))
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, 4096))

    assert "Max open files 64" in cured("VHOST-LIMIT-NOFILE", fault, cure)


def test_capabilities_that_were_dropped() -> None:
    codes = {"VHOST-TUN-CAPABILITY"}
    if System().number("/proc/sys/kernel/unprivileged_bpf_disabled"):
        codes.add("VHOST-BPF-DENIED")

    def dropped() -> list[str]:
        drop([CAP_NET_ADMIN, CAP_BPF, CAP_SYS_ADMIN])
        return sorted(look())

    before, after = in_box(lambda: [in_child(dropped), sorted(look())])
    assert codes <= set(before)
    assert not codes & set(after)


def test_a_user_namespace() -> None:
    before, after = in_box(lambda: [in_user_namespace(lambda: sorted(look())), sorted(look())])
    assert "VHOST-TUN-USERNS" in before
    assert "VHOST-TUN-USERNS" not in after


def test_without_kvm() -> None:
    def cure(_remedy: str) -> None:
        mknod(KVM, (10, 232))

    cured("VHOST-KVM-MISSING", lambda: Path(KVM).unlink(missing_ok=True), cure)


def test_a_kvm_that_does_not_open() -> None:
    def fault() -> None:
        Path(KVM).unlink(missing_ok=True)
        mknod(KVM, (1, 3), 0o600)

    def cure(_remedy: str) -> None:
        Path(KVM).chmod(0o666)

    assert "EACCES" in cured("VHOST-KVM-ACCESS", fault, cure, as_nobody)


def test_an_engine_that_was_not_built() -> None:
    name = "vhostctl.engine.device"

    def fault() -> None:
        sys.modules[name] = None  # type: ignore[assignment]

    assert name in cured("VHOST-ENGINE-BROKEN", fault, lambda _: sys.modules.pop(name))


# The kernels that were looked at: nothing else of the table is wrong with these and newer ones.
LOOKED_AT = {(6, 1): 192, (6, 12): 117, (7, 2): 13}


def a_stranger_attaches() -> bool:
    """Whether nobody may have a persistent tap that has neither owner nor group."""

    def attach() -> int | None:
        # Nobody may be unable to import what a Tap would.
        with TapQueue("tap0") as queue:
            try:
                queue.attach("tap0", tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR)
            except KernelError as error:
                return error.errno
            return None

    def work() -> Any:
        with NetNamespace() as namespace:
            with namespace.run(lambda: Tap.open("tap0")) as tap:
                tap.queues[0].set_persist(True)
            return namespace.run(lambda: as_nobody(attach))

    refusal = in_box(work)
    assert refusal in (None, errno.EPERM)
    return refusal is None


def rings_forget() -> bool:
    """Whether their addresses go when ACCESS_PLATFORM comes and goes."""
    return flags.probe(lambda: VhostNet.at(DEFAULT_PATH), node=True).platform_toggles


def test_known_faults_of_this_kernel() -> None:
    """What the table says of a version is what the kernel does, where that can be seen."""
    codes = {one for one in look() if one.startswith("VHOST-KERNEL-")}
    rings, tap = "VHOST-KERNEL-CVE-2026-97988", "VHOST-KERNEL-CVE-2026-99281"
    version = kernels.stable_version(System())
    if version is None or version[:2] not in LOOKED_AT:
        assert not codes & {rings, tap}, "nobody looked at this kernel"
        return
    assert (tap in codes) == a_stranger_attaches()
    if DEFAULT_PATH in PATHS:
        assert (rings in codes) == (not rings_forget())
    if version[2] >= LOOKED_AT[version[:2]]:
        assert codes <= {rings, tap}


def test_the_box_leaves_this_machine_alone() -> None:
    nodes = [os.stat(path) for path in PATHS]  # noqa: PTH116

    def spoil() -> None:
        shutil.rmtree("/dev/net")
        Path("/etc/group").unlink()

    in_box(spoil)
    assert [os.stat(path) for path in PATHS] == nodes  # noqa: PTH116
    assert Path("/etc/group").exists()
