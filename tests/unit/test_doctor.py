"""Every finding of the doctor, made on a machine that is files in a folder."""

from __future__ import annotations

import errno
import gzip
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.doctor_machine import RELEASE, Machine, healthy
from vhostctl.doctor.access import Entry, Node, Tag
from vhostctl.doctor.examine import FAULTS, examine
from vhostctl.errors import VhostctlError, kernel_error

Break = Callable[[Machine], object]

NODE, TUN, KVM = "/dev/vhost-net", "/dev/net/tun", "/dev/kvm"
MODPROBE_D = "/etc/modprobe.d/local.conf"
MODULE = "vhost_net"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return healthy(tmp_path)


def found(machine: Machine) -> dict[str, str]:
    """The findings of a fresh look: what was found and the remedy, by code."""
    report = examine(machine.look())
    return {one.fault.code: f"{one.evidence} => {one.remedy}" for one in report.findings}


def on_node(path: str, **changes: object) -> Break:
    def change(machine: Machine) -> None:
        machine.nodes[path] = replace(machine.nodes[path], **changes)  # type: ignore[arg-type]

    return change


def refuse(path: str, number: int, *more: Break) -> Break:
    return all_of(lambda machine: machine.errors.update({path: number}), *more)


def all_of(*changes: Break) -> Break:
    def change(machine: Machine) -> None:
        for one in changes:
            one(machine)

    return change


def write(name: str, text: str) -> Break:
    return lambda machine: machine.write(name, text)


def status(old: str, new: str) -> Break:
    return lambda machine: machine.edit("/proc/self/status", old, new)


def option_off(option: str) -> Break:
    def change(machine: Machine) -> None:
        machine.edit(f"/boot/config-{RELEASE}", f"{option}=y", f"# {option} is not set")

    return change


def version(text: str) -> Break:
    return write(
        "/proc/version", f"Linux version 0 (Debian {text}-1) #1 SMP Debian {text}-1 (2026)"
    )


def unload(machine: Machine) -> None:
    machine.remove(f"/sys/module/{MODULE}")
    machine.remove("/sys/class/misc/vhost-net")
    machine.nodes.pop(NODE)


def own_refusal(number: int) -> Break:
    def change(machine: Machine) -> None:
        machine.acts["owning"] = kernel_error(number, "VHOST_SET_OWNER", NODE)

    return change


ordinary = all_of(
    status("Uid:\t0\t0\t0\t0", "Uid:\t1000\t1000\t1000\t1000"),
    status("Gid:\t0\t0\t0\t0", "Gid:\t1000\t1000\t1000\t1000"),
    status("CapEff:\t000001ffffffffff", "CapEff:\t0000000000000000"),
)


def node_cases(prefix: str, path: str, module: str, minor: int) -> list[tuple[str, Break, str]]:
    """The family of faults that every node has."""
    name = path.rpartition("/")[2]
    return [
        (f"{prefix}-MISSING", lambda m: m.nodes.pop(path), rf"No such file.*mknod .* c 10 {minor}"),
        (f"{prefix}-TYPE", on_node(path, number=None), f"no character device.*rm {path} && mkdir"),
        (f"{prefix}-NUMBER", on_node(path, number=(1, 3)), rf"is 1:3, .* is 10:{minor} => rm"),
        (
            f"{prefix}-ACCESS",
            refuse(path, errno.EACCES, ordinary),
            rf"{name} is 06\d0 root:kvm with no ACL.*EACCES; we are alice, groups alice =>",
        ),
        (
            f"{prefix}-NODEV",
            refuse(path, errno.EACCES, write("/proc/self/mountinfo", "1 0 0:6 / /dev rw,nodev - ")),
            "mounted with nodev => mount -o remount,dev /dev",
        ),
        (
            f"{prefix}-CGROUP",
            refuse(path, errno.EPERM),
            rf"EPERM; /proc/self/cgroup: 0::/box.*DeviceAllow='{path} rw'.*c 10:{minor} rw",
        ),
        (
            f"{prefix}-LSM",
            refuse(path, errno.EACCES, write("/proc/self/attr/current", "box (enforce)")),
            r"security modules capability,apparmor.*current: box \(enforce\) => dmesg",
        ),
        (f"{prefix}-DRIVER", refuse(path, errno.ENODEV), f"ENODEV => modprobe {module}"),
        (f"{prefix}-OPEN", refuse(path, errno.EMFILE), "EMFILE => see the evidence"),
    ]


CASES: list[tuple[str, Break, str]] = [
    *node_cases("VHOST-NODE", NODE, "vhost_net", 238),
    *node_cases("VHOST-TUN", TUN, "tun", 200),
    ("VHOST-NODE-OWNER", own_refusal(errno.ENOMEM), r"ENOMEM\) => ulimit -u"),
    ("VHOST-KVM-MISSING", lambda m: m.nodes.pop(KVM), "modprobe kvm_intel"),
    ("VHOST-KVM-ACCESS", refuse(KVM, errno.EACCES, ordinary), "EACCES => usermod -aG kvm alice"),
    ("VHOST-MODULE-NOT-LOADED", unload, f"/sys/module/{MODULE} is not .* => modprobe vhost_net"),
    (
        "VHOST-MODULE-ABSENT",
        all_of(unload, write(f"/lib/modules/{RELEASE}/modules.dep", "kernel/x.ko:\n")),
        "do not list vhost_net => apt install linux-image-amd64",
    ),
    (
        "VHOST-MODULE-DIRECTORY",
        all_of(unload, lambda m: m.rename(f"/lib/modules/{RELEASE}", "/lib/modules/9.9.9")),
        "No such file or directory; there is 9.9.9 => reboot",
    ),
    (
        "VHOST-MODULE-BLACKLISTED",
        all_of(unload, write(MODPROBE_D, "# no\n\nblacklist vhost-net\n")),
        f"{MODPROBE_D}:3: blacklist vhost-net => sed -i 3d {MODPROBE_D}",
    ),
    (
        "VHOST-MODULE-INSTALL-FALSE",
        all_of(unload, write(MODPROBE_D, "install vhost /bin/false\n")),
        f"{MODPROBE_D}:1: install vhost /bin/false => sed -i 1d {MODPROBE_D}",
    ),
    (
        "VHOST-MODULE-CMDLINE",
        all_of(unload, write("/proc/cmdline", "quiet module_blacklist=floppy,vhost-net")),
        "module_blacklist=floppy,vhost-net => remove",
    ),
    (
        "VHOST-MODULE-DISABLED",
        all_of(unload, write("/proc/sys/kernel/modules_disabled", "1\n")),
        "modules_disabled: 1 => reboot",
    ),
    (
        "VHOST-MODULE-SIGNED-ONLY",
        write("/sys/kernel/security/lockdown", "none [integrity] confidentiality\n"),
        "lockdown: integrity => sign",
    ),
    (
        "VHOST-MIRROR-LOADED",
        write("/sys/module/vhost_net_mirror/taint", "OE"),
        "taint: OE => vhostctl kmod unload",
    ),
    (
        "VHOST-MIRROR-NODE",
        write("/sys/module/vhost_net_mirror/taint", "OE"),
        "/dev/vhost-net-mirror is not there => vhostctl kmod unload",
    ),
    (
        "VHOST-CONFIG-VHOST-NET",
        all_of(unload, option_off("CONFIG_VHOST_NET")),
        "CONFIG_VHOST_NET is not set => boot a kernel with CONFIG_VHOST_NET",
    ),
    (
        "VHOST-CONFIG-TUN",
        all_of(
            lambda m: m.remove("/sys/class/misc/tun"),
            lambda m: m.remove("/sys/module/tun"),
            option_off("CONFIG_TUN"),
        ),
        "CONFIG_TUN is not set",
    ),
    ("VHOST-CONFIG-EVENTFD", option_off("CONFIG_EVENTFD"), "not set"),
    ("VHOST-CONFIG-NET-NS", option_off("CONFIG_NET_NS"), "not set"),
    ("VHOST-CONFIG-BPF-SYSCALL", option_off("CONFIG_BPF_SYSCALL"), "not set"),
    ("VHOST-CONFIG-MEMBARRIER", option_off("CONFIG_MEMBARRIER"), "not set"),
    ("VHOST-KERNEL-CVE-2026-74356", version("6.12.95"), r"Linux 6.12.95, fixed in 6.12.100 => apt"),
    ("VHOST-KERNEL-PAGE-LEAK", version("6.12.93"), "fixed in 6.12.94"),
    ("VHOST-KERNEL-BUSYLOOP-SLEEP", version("6.1.175"), "fixed in 6.1.176"),
    ("VHOST-KERNEL-TASK-REFCOUNT", version("6.12.56"), "fixed in 6.12.57"),
    ("VHOST-KERNEL-WORKER-KILLED", version("6.9.8"), "fixed in 6.9.9"),
    ("VHOST-KERNEL-FORK-NUMBER", version("6.12.43"), "fixed in 6.12.48"),
    ("VHOST-KERNEL-STALE-METADATA", version("6.12.104"), "fixed in 6.12.105"),
    ("VHOST-KERNEL-TRANSLATE-RANGE", version("6.1.6"), "fixed in 6.1.7"),
    ("VHOST-KERNEL-PENDING-MISSES", version("6.1.10"), "fixed in 6.1.11"),
    ("VHOST-KERNEL-HUGE-ENTRY", version("5.16.17"), "fixed in 5.16.18"),
    ("VHOST-KERNEL-BATCH-OVERFLOW", version("5.14.8"), "fixed in 5.14.9"),
    (
        "VHOST-KERNEL-ZEROCOPY",
        all_of(
            version("6.1.179"), write("/sys/module/vhost_net/parameters/experimental_zcopytx", "1")
        ),
        "fixed in 6.1.180 => modprobe -r vhost_net",
    ),
    ("VHOST-KERNEL-CVE-2026-97988", version("6.1.192"), "not fixed up to 6.1.192"),
    ("VHOST-KERNEL-CVE-2026-99281", version("7.2.13"), "7.2.13 => ip tuntap add"),
    (
        "VHOST-TUN-CAPABILITY",
        ordinary,
        "CapEff 0000000000000000 => sudo ip tuntap add .* user alice vnet_hdr",
    ),
    (
        "VHOST-TUN-USERNS",
        write("/proc/self/uid_map", "         0       1000          1\n"),
        "uid_map: 0 1000 1 =>",
    ),
    (
        "VHOST-LIMIT-NOFILE",
        lambda m: m.edit("/proc/self/limits", "1024  ", "64    "),
        "Max open files 64, 16 pairs need 152 => ulimit -n 1024",
    ),
    (
        "VHOST-LIMIT-NPROC",
        all_of(ordinary, lambda m: m.edit("/proc/self/limits", "unlimited  ", "20         ")),
        "Max processes 20, this user has 7 now => ulimit -u 1031",
    ),
    (
        "VHOST-LIMIT-REGIONS",
        write("/sys/module/vhost/parameters/max_mem_regions", "8\n"),
        "max_mem_regions: 8 => modprobe -r vhost_net",
    ),
    ("VHOST-LIMIT-MAPS", write("/proc/sys/vm/max_map_count", "1000\n"), "1000 => sysctl -w"),
    (
        "VHOST-LIMIT-HUGEPAGES",
        write("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "0\n"),
        "nr_hugepages: 0 => sysctl",
    ),
    (
        "VHOST-BPF-DENIED",
        all_of(ordinary, write("/proc/sys/kernel/unprivileged_bpf_disabled", "2\n")),
        "disabled: 2, no CAP_BPF =>",
    ),
    ("VHOST-BPF-NOHZ", write("/sys/devices/system/cpu/nohz_full", "2-7\n"), "nohz_full: 2-7 =>"),
    (
        "VHOST-ENGINE-BROKEN",
        lambda m: m.acts.update(engine=VhostctlError("no module named _native")),
        "no module named _native =>",
    ),
]


def test_a_healthy_machine_has_no_finding(machine: Machine) -> None:
    assert found(machine) == {}


@pytest.mark.parametrize(("code", "fault", "match"), CASES, ids=[case[0] for case in CASES])
def test_a_fault_is_found(machine: Machine, code: str, fault: Break, match: str) -> None:
    fault(machine)
    findings = found(machine)
    assert code in findings
    assert re.search(match, findings[code])


def test_each_fault_has_a_case() -> None:
    assert {code for code, _, _ in CASES} == set(FAULTS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (write("/etc/group", "root:x:0:\nalice:x:1000:\nkvm:x:108:alice\n"), "newgrp kvm"),
        (on_node(NODE, mode=0o600), r"chgrp kvm .* chmod 0660 .* usermod -aG kvm alice"),
        (on_node(NODE, uid=1000, mode=0o460), "chmod u.rw"),
        (status("Groups:\t", "Groups:\t108"), None),
        (on_node(NODE, acl=(Entry(Tag.USER, 6, 1000),)), None),
        (on_node(NODE, acl=(Entry(Tag.USER, 6, 1000), Entry(Tag.MASK, 4))), "mask::r-.*=> setfacl"),
        (all_of(on_node(NODE, mode=0o600), write("/etc/group", "alice:x:1000:\n")), "setfacl"),
    ],
)
def test_how_a_user_gets_in(machine: Machine, change: Break, match: str | None) -> None:
    """The remedy fits the node's group; None: mode and list let the user in, so it is no mode."""
    all_of(ordinary, refuse(NODE, errno.EACCES), change)(machine)
    findings = found(machine)
    if match is None:
        assert "VHOST-NODE-LSM" in findings
    else:
        assert re.search(match, findings["VHOST-NODE-ACCESS"])


def test_root_of_a_user_namespace_may_not_open_what_is_not_mapped(machine: Machine) -> None:
    change = on_node(NODE, uid=65534, gid=65534)
    all_of(refuse(NODE, errno.EACCES), change, write("/proc/self/uid_map", "0 1000 1"))(machine)
    assert "VHOST-NODE-ACCESS" in found(machine)


def test_a_module_that_is_listed_and_not_there(machine: Machine) -> None:
    unload(machine)
    machine.remove(f"/lib/modules/{RELEASE}/kernel/drivers/vhost/vhost_net.ko.xz")
    assert "which is not there" in found(machine)["VHOST-MODULE-ABSENT"]


def test_a_module_that_is_built_in_is_not_asked_for(machine: Machine) -> None:
    machine.remove(f"/sys/module/{MODULE}")
    assert found(machine) == {}
    unload_node = "/sys/class/misc/vhost-net"
    machine.remove(unload_node)
    machine.write(f"/lib/modules/{RELEASE}/modules.builtin", "kernel/drivers/vhost/vhost_net.ko\n")
    assert found(machine) == {}


def test_a_file_of_modprobe_hides_those_of_its_name(machine: Machine) -> None:
    unload(machine)
    machine.write("/usr/lib/modprobe.d/local.conf", "blacklist vhost_net\n")
    assert "VHOST-MODULE-BLACKLISTED" in found(machine)
    machine.write(MODPROBE_D, "# nothing\n")
    assert "VHOST-MODULE-BLACKLISTED" not in found(machine)


def test_another_way_to_load_it_is_left_alone(machine: Machine) -> None:
    unload(machine)
    machine.write(MODPROBE_D, "install vhost_net /sbin/modprobe -i vhost_net && logger loaded\n")
    assert set(found(machine)) == {"VHOST-NODE-MISSING", "VHOST-MODULE-NOT-LOADED"}


def test_a_blacklist_on_the_command_line_forbids_less(machine: Machine) -> None:
    unload(machine)
    machine.write("/proc/cmdline", "modprobe.blacklist=vhost_net")
    assert "VHOST-MODULE-CMDLINE" not in found(machine)
    assert "=> modprobe vhost_net" in found(machine)["VHOST-MODULE-BLACKLISTED"]


def test_the_configuration_in_proc_comes_first(machine: Machine) -> None:
    machine.root.joinpath("proc/config.gz").write_bytes(gzip.compress(b"# CONFIG_X is not set\n"))
    assert "/proc/config.gz" in found(machine)["VHOST-CONFIG-EVENTFD"]


def test_an_unreadable_configuration_is_no_finding(machine: Machine) -> None:
    machine.remove(f"/boot/config-{RELEASE}")
    assert found(machine) == {}


def test_the_mirror_needs_nothing_of_the_kernels_own_module(machine: Machine) -> None:
    unload(machine)
    machine.device = "/dev/vhost-net-mirror"
    assert set(found(machine)) == {"VHOST-NODE-MISSING"}
    assert "=> vhostctl kmod load" in found(machine)["VHOST-NODE-MISSING"]
    machine.write("/sys/module/vhost_net_mirror/version", "0.1.0")
    machine.write("/sys/class/misc/vhost-net-mirror/dev", "10:119\n")
    assert "mknod -m 0660 /dev/vhost-net-mirror c 10 119" in found(machine)["VHOST-NODE-MISSING"]
    machine.nodes[machine.device] = Node(0o600, 0, 0, (10, 119))
    machine.write("/dev/vhost-net-mirror", "")
    assert set(found(machine)) == {"VHOST-MIRROR-LOADED"}


def test_a_node_of_the_mirror_without_it(machine: Machine) -> None:
    machine.write("/dev/vhost-net-mirror", "")
    assert "=> rm /dev/vhost-net-mirror" in found(machine)["VHOST-MIRROR-NODE"]
