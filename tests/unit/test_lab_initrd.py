"""The guest's initramfs: what is in it, the format, and what makes it fail."""

from __future__ import annotations

import lzma
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from vhostctl.cli.main import main
from vhostctl.errors import EnvironmentMissing, InvalidArgument, KernelError
from vhostctl.lab import initrd, process
from vhostctl.lab.initrd import Entry
from vhostctl.lab.kernels import Kernel

RELEASE = "6.12.117+deb12-amd64"
MODULES = {
    "kernel/drivers/net/virtio_net.ko.xz": lzma.compress(b"virtio_net"),
    "kernel/drivers/net/net_failover.ko.xz": lzma.compress(b"net_failover"),
    "kernel/net/core/failover.ko": b"failover",
    "kernel/drivers/net/tun.ko": b"tun",
}
NET = "kernel/drivers/net"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel in a cache of its own, with virtio_pci built in."""
    monkeypatch.setenv("VHOSTCTL_CACHE", str(tmp_path))
    kernel = Kernel(RELEASE, tmp_path / "kernels" / RELEASE)
    for path, body in MODULES.items():
        file = kernel.modules / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(body)
    (kernel.modules / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    depends(kernel, "virtio_net.ko.xz")
    return kernel


@pytest.fixture(autouse=True)
def busybox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A busybox that is no program, and so linked to nothing; every other program is found."""
    path = tmp_path / "busybox"
    path.write_bytes(b"busybox")
    found = process.program
    monkeypatch.setattr(
        process, "program", lambda name, hint: str(path) if name == "busybox" else found(name, hint)
    )
    return path


def depends(kernel: Kernel, name: str) -> None:
    (kernel.modules / "modules.dep").write_text(
        f"{NET}/tun.ko:\n"
        f"{NET}/{name}: {NET}/net_failover.ko.xz kernel/net/core/failover.ko\n"
        f"{NET}/net_failover.ko.xz: kernel/net/core/failover.ko\n"
        "kernel/net/core/failover.ko:\n"
    )


def unpacked(data: bytes) -> dict[str, Entry]:
    """What a newc archive holds, read as buffer-format.rst describes it."""
    found: dict[str, Entry] = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        at = (at + 110 + name_size + 3) & ~3
        if name == b"TRAILER!!!\0":
            assert at == len(data)
            return found
        found[name[:-1].decode()] = Entry(mode, data[at : at + size])
        at = (at + size + 3) & ~3


def test_modules_are_those_that_are_needed_and_not_compressed(kernel: Kernel) -> None:
    files = initrd.module_files(kernel)
    assert files == {
        "modules.builtin": b"kernel/drivers/virtio/virtio_pci.ko\n",
        "modules.dep": (
            "kernel/net/core/failover.ko: \n"
            f"{NET}/net_failover.ko: kernel/net/core/failover.ko\n"
            f"{NET}/virtio_net.ko: {NET}/net_failover.ko kernel/net/core/failover.ko\n"
        ).encode(),
        f"{NET}/virtio_net.ko": b"virtio_net",
        f"{NET}/net_failover.ko": b"net_failover",
        "kernel/net/core/failover.ko": b"failover",
    }


def test_a_module_that_cannot_be_unpacked(kernel: Kernel) -> None:
    (kernel.modules / NET / "virtio_net.ko.zst").write_bytes(b"zstd")
    depends(kernel, "virtio_net.ko.zst")
    with pytest.raises(EnvironmentMissing, match=r"virtio_net\.ko\.zst is compressed, and not by"):
        initrd.module_files(kernel)


def test_the_archive_reads_back(kernel: Kernel, tmp_path: Path) -> None:
    odd = tmp_path / "a file"
    odd.write_bytes(b"12345")
    odd.chmod(0o640)
    out = tmp_path / "guest.cpio"
    words = ["lab", "initrd", "-k", "6.12", "--add", str(odd), str(out)]
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, result.output) == (0, "")
    found = unpacked(out.read_bytes())
    assert found[str(odd).lstrip("/")] == Entry(stat.S_IFREG | 0o640, b"12345")
    assert found["init"] == Entry(stat.S_IFLNK | 0o777, b"bin/busybox")
    assert found["bin/busybox"] == Entry(stat.S_IFREG | 0o755, b"busybox")
    assert found[f"lib/modules/{kernel.release}/{NET}/virtio_net.ko"].body == b"virtio_net"
    assert b"modprobe virtio_net\n" in found["etc/rc"].body
    assert b"::sysinit:/etc/rc\n" in found["etc/inittab"].body
    made: set[str] = set()
    for name, entry in found.items():
        assert name.rpartition("/")[0] in made | {""}, f"{name} comes before its directory"
        if stat.S_ISDIR(entry.mode):
            made.add(name)
    assert {"dev", "proc", "sys", "tmp", "usr/bin"} <= made
    assert out.read_bytes() == initrd.archive(initrd.entries(kernel, [odd]))


def test_a_program_brings_its_libraries(kernel: Kernel) -> None:
    program = Path(shutil.which("env") or sys.executable)
    found = initrd.entries(kernel, [program])
    for part in (program, *initrd.libraries(program)):
        assert found[str(part).lstrip("/")].body == part.read_bytes()
    names = [part.name for part in initrd.libraries(program)]
    assert any(name.startswith("libc.") for name in names)
    assert any(name.startswith("ld-") for name in names)


def test_a_library_that_is_not_there(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "\tlibjansson.so.4 => not found\n\tlibc.so.6 => /lib/libc.so.6 (0x00007f)\n"
    monkeypatch.setattr(process, "output_of", lambda _argv: said)
    with pytest.raises(EnvironmentMissing, match=r"its library libjansson\.so\.4 is not there"):
        initrd.entries(kernel, [Path("/usr/bin/env")])


def test_a_busybox_with_libraries_would_not_start(kernel: Kernel, busybox: Path) -> None:
    busybox.unlink()
    busybox.symlink_to(shutil.which("env") or sys.executable)
    with pytest.raises(EnvironmentMissing, match=r"is not static; apt install busybox-static"):
        initrd.entries(kernel)


def test_nothing_half_written_is_left(kernel: Kernel, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"write on .*/no/guest\.cpio: No such file"):
        initrd.write(kernel, tmp_path / "no" / "guest.cpio")
    with pytest.raises(InvalidArgument, match="nowhere: No such file"):
        initrd.write(kernel, tmp_path / "guest.cpio", [tmp_path / "nowhere"])
    with pytest.raises(KernelError, match="No space left on device"):
        initrd.write(kernel, Path("/dev/full"))
    assert Path("/dev/full").is_char_device()

    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(KernelError, match="File too large"):
            initrd.write(kernel, tmp_path / "guest.cpio")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "guest.cpio").exists()


def test_what_may_not_be_written_stays(kernel: Kernel, tmp_path: Path) -> None:
    busy = Path(shutil.copy("/bin/sleep", tmp_path / "busy"))
    with subprocess.Popen([busy, "100"]) as process:
        try:
            with pytest.raises(KernelError, match="Text file busy"):
                initrd.write(kernel, busy)
        finally:
            process.kill()
    assert busy.read_bytes() == Path("/bin/sleep").read_bytes()
