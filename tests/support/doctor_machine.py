"""A machine for the doctor: its files in a folder, its nodes and what opening them gives."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from vhostctl.doctor.access import Node
from vhostctl.doctor.system import System

RELEASE = "6.12.117+deb12-amd64"
_OPTIONS = ("VHOST_NET", "TUN", "EVENTFD", "NET_NS", "BPF_SYSCALL", "MEMBARRIER")

_FILES = {
    "/proc/sys/kernel/osrelease": f"{RELEASE}\n",
    "/proc/version": f"Linux version {RELEASE} (a@b) (gcc) #1 SMP Debian 6.12.117-1 (2026-11-01)\n",
    "/proc/self/status": "Name:\tx\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t \n"
    "CapEff:\t000001ffffffffff\n",
    "/proc/self/uid_map": "         0          0 4294967295\n",
    "/proc/self/cgroup": "0::/box\n",
    "/proc/self/attr/current": "unconfined\n",
    "/proc/self/mountinfo": "1 0 0:1 / / rw,nodev - x\n2 1 0:6 / /dev rw,nosuid - x\n",
    "/proc/self/limits": "Limit  Soft Limit  Hard Limit  Units\n"
    "Max processes             unlimited            unlimited            processes\n"
    "Max open files            1024                 4096                 files\n",
    "/proc/7/status": "Name:\ty\nUid:\t1000\t1000\t1000\t1000\nThreads:\t7\n",
    "/proc/8/status": "Name:\tz\nUid:\t0\t0\t0\t0\nThreads:\t99\n",
    "/proc/cmdline": "root=/dev/sda1 quiet\n",
    "/proc/sys/kernel/modules_disabled": "0\n",
    "/proc/sys/kernel/unprivileged_bpf_disabled": "2\n",
    "/proc/sys/vm/max_map_count": "65530\n",
    "/sys/class/misc/vhost-net/dev": "10:238\n",
    "/sys/class/misc/tun/dev": "10:200\n",
    "/sys/devices/system/cpu/nohz_full": "  (null)\n",
    "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "64\n",
    "/sys/kernel/security/lockdown": "[none] integrity confidentiality\n",
    "/sys/kernel/security/lsm": "capability,apparmor",
    "/sys/module/module/parameters/sig_enforce": "N\n",
    "/sys/module/tun/initstate": "live\n",
    "/sys/module/vhost/parameters/max_mem_regions": "64\n",
    "/sys/module/vhost_net/initstate": "live\n",
    "/sys/module/vhost_net/parameters/experimental_zcopytx": "0\n",
    f"/boot/config-{RELEASE}": "".join(f"CONFIG_{one}=y\n" for one in _OPTIONS),
    f"/lib/modules/{RELEASE}/modules.builtin": "kernel/fs/fuse/fuse.ko\n",
    f"/lib/modules/{RELEASE}/modules.dep": "kernel/drivers/net/tun.ko.xz:\n"
    "kernel/drivers/vhost/vhost.ko.xz:\n"
    "kernel/drivers/vhost/vhost_net.ko.xz: kernel/drivers/vhost/vhost.ko.xz "
    "kernel/drivers/net/tun.ko.xz\n",
    f"/lib/modules/{RELEASE}/kernel/drivers/vhost/vhost_net.ko.xz": "",
    f"/lib/modules/{RELEASE}/kernel/drivers/net/tun.ko.xz": "",
    "/etc/os-release": 'ID=debian\nVERSION_ID="12"\n',
    "/etc/passwd": "root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/:/bin/sh\n",
    "/etc/group": "root:x:0:\nkvm:x:108:\nalice:x:1000:\n",
}


@dataclass
class Machine:
    """What a `System` finds. `acts` stands for what it would try, by name, `errors` by node."""

    root: Path
    device: str = "/dev/vhost-net"
    nodes: dict[str, Node] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    acts: dict[str, object] = field(default_factory=dict)

    def look(self) -> System:
        """Return a `System` that sees the machine as it is now."""
        system = _Seen(self)
        vars(system).update(self.acts)  # where cached_property keeps its value
        return system

    def write(self, name: str, text: str) -> None:
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.root / name.lstrip("/")).read_text()
        assert old in text
        self.write(name, text.replace(old, new, 1))

    def remove(self, name: str) -> None:
        path = self.root / name.lstrip("/")
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def rename(self, name: str, new: str) -> None:
        (self.root / name.lstrip("/")).rename(self.root / new.lstrip("/"))


class _Seen(System):
    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.device, machine.root)
        self._machine = machine

    def node(self, name: str) -> Node | None:
        return self._machine.nodes.get(name)

    def open_error(self, name: str) -> int:
        return self._machine.errors.get(name, 0)

    def program(self, name: str) -> bool:  # noqa: ARG002
        return True


def healthy(root: Path) -> Machine:
    """Return a machine on which nothing is wrong, looked at by root."""
    machine = Machine(root, acts={"owning": None, "engine": None})
    for name, text in _FILES.items():
        machine.write(name, text)
    machine.nodes = {
        "/dev/vhost-net": Node(0o660, 0, 108, (10, 238)),
        "/dev/net/tun": Node(0o660, 0, 108, (10, 200)),
        "/dev/kvm": Node(0o660, 0, 108, (10, 232)),
    }
    return machine
