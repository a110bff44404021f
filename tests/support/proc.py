"""A /proc with vhost workers in it, made of files."""

from __future__ import annotations

import os
from pathlib import Path

KTHREAD, USER_WORKER, BOUND = 0x0020_0000, 0x0000_4000, 0x0400_0000
NODES = {"vhost-net": 238, "vhost-vsock": 241, "vhost-net-mirror": 120}


class Proc:
    """A /proc with as much of each task as is read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "misc").write_text(
            "".join(f"{minor:3} {name}\n" for name, minor in {**NODES, "tun": 200}.items())
        )

    def task(self, tid: int, name: str, tgid: int = 0, flags: int = 0, started: int = 50) -> None:
        """A task; a thread of `tgid`, or a process by itself."""
        folder = self.root / str(tgid or tid) / "task" / str(tid)
        folder.mkdir(parents=True)
        fields = ["0"] * 50
        fields[0], fields[6], fields[16], fields[19] = "S", str(flags), "-5", str(started)
        fields[37], fields[38] = "7", "1"
        files = {
            "comm": f"{name}\n",
            "stat": f"{tid} ({name}) {' '.join(fields)}\n",
            "status": f"Name:\t{name}\nTgid:\t{tgid or tid}\nCpus_allowed_list:\t0-3\n",
            "schedstat": f"{tid * 1000} 5 6\n",
            "cgroup": "4:memory:/old\n0::/machine/vm\n",
        }
        for file, text in files.items():
            (folder / file).write_text(text)
        if tgid:
            (self.root / str(tid)).symlink_to(folder)
        else:
            for file in files:
                (self.root / str(tid) / file).symlink_to(folder / file)

    def descriptors(self, pid: int, held: dict[int, str]) -> None:
        """Descriptors of files called so; a node's name leads to its device."""
        for fd, path in held.items():
            link = self.root / str(pid) / "fd" / str(fd)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path)


def device_number(path: Path) -> int | None:
    name = path.readlink().name
    return os.makedev(10, NODES[name]) if name in NODES else None
