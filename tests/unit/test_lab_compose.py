"""One boot put together: virtme's options, QEMU's, the shell text for the guest."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vhostctl.errors import EnvironmentMissing, InvalidArgument
from vhostctl.lab import compose, process
from vhostctl.lab.accel import Accel
from vhostctl.lab.compose import Boot, Command
from vhostctl.lab.kernels import Kernel

NASTY = """it's "$HOME" `id` \\ \n\t* é \udcff"""


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """Return a kernel with modules.dep as depmod writes it."""
    kernel = Kernel("6.12.117+deb12-amd64", tmp_path / "a tree")
    kernel.modules.mkdir(parents=True)
    (kernel.modules / "modules.dep").write_text(
        "kernel/drivers/net/tun.ko.xz:\n"
        "kernel/drivers/vhost/vhost_net.ko.xz: d/tap.ko.xz kernel/drivers/net/tun.ko.xz"
        " d/vhost.ko.xz d/vhost_iotlb.ko.xz\n"
        "kernel/drivers/net/dummy.ko.xz:\n"
    )
    return kernel


@pytest.fixture
def boot(kernel: Kernel, tmp_path: Path) -> Boot:
    return Boot(kernel, 2, 768, Accel.TCG, False, (), tmp_path, verbose=False)


def test_modules_come_after_what_they_need(kernel: Kernel) -> None:
    setup = compose.guest_setup(kernel, [], Command(("true",), Path("/"), {}), "marker")
    order = re.findall(r"insmod .*/(\w+)\.ko\.xz'?$", setup, re.MULTILINE)
    assert order == ["tun", "vhost_iotlb", "vhost", "tap", "vhost_net"]


def test_virtme_is_asked_for_what_works_everywhere(boot: Boot) -> None:
    text = " ".join(compose.virtme_options(boot, "/q", "/b"))
    assert "--dry-run --show-command" in text
    assert "--force-9p --disable-microvm --cpus 2 --memory 768M" in text
    assert text.endswith("--disable-kvm")


@pytest.mark.parametrize("accel", [Accel.KVM, Accel.TRIAL])
def test_kvm_is_virtmes_to_add(boot: Boot, accel: Accel) -> None:
    options = compose.virtme_options(dataclasses.replace(boot, accel=accel), "/q", "/b")
    assert "--disable-kvm" not in options


def test_qemu_gets_ports_mounts_and_our_init(boot: Boot) -> None:
    shared = dataclasses.replace(boot, share=(Path("/srv/a,b"),))
    options = compose.qemu_options(shared, "/bin/busybox", {"control": 7, "stdout": 9})
    text = " ".join(options)
    assert "socket,id=lab.control,fd=7" in options
    assert "virtserialport,bus=lab.0,chardev=lab.stdout,name=lab.stdout" in options
    assert "local,id=lab.root,path=/,security_model=none,readonly=on,multidevs=remap" in options
    assert "local,id=lab.share0,path=/srv/a,,b,security_model=none,multidevs=remap" in options
    assert "-icount" not in options
    assert options.count("-append") == 1
    assert "-no-reboot" in text


def test_the_kernel_is_told_to_die_of_its_troubles(boot: Boot) -> None:
    line = compose.kernel_command_line(boot, "/bin/busybox")
    assert {"panic=-1", "oops=panic", "quiet", "loglevel=1"} <= set(line.split())
    directory = boot.directory
    assert line.endswith(
        f' init=/bin/busybox -- sh "{directory}/init" "/bin/busybox" "{directory}"'
    )
    assert "loglevel=7" in compose.kernel_command_line(
        dataclasses.replace(boot, verbose=True), "/bin/busybox"
    )


def test_more_for_the_kernel_comes_before_init(boot: Boot) -> None:
    more = dataclasses.replace(boot, append="slub_debug=FZPU  oops=continue")
    line = compose.kernel_command_line(more, "/bin/busybox")
    assert " loglevel=1 slub_debug=FZPU oops=continue init=/bin/busybox -- " in line


def test_counting_instructions_fixes_the_layout(boot: Boot) -> None:
    counted = dataclasses.replace(boot, icount=True)
    options = compose.qemu_options(counted, "/b", {})
    assert options[options.index("-icount") + 1] == "shift=0,sleep=off"
    assert "norandmaps" in compose.kernel_command_line(counted, "/b").split()


def test_the_setup_is_what_init_reads(kernel: Kernel, tmp_path: Path) -> None:
    share = [tmp_path / "it's one", tmp_path / "two"]
    text = compose.guest_setup(kernel, share, Command(["true"], tmp_path, {}, stdin=True), "\4m")
    (tmp_path / "setup").write_text(text)
    script = f""". {tmp_path}/setup
        share() {{ echo "share $1 $2"; }}
        insmod() {{ echo "insmod $1"; }}
        sync() {{ echo sync; }}
        load_modules; mount_shares; sync_shares
        echo "$release $modules $stdin $terminal $marker"
    """
    output = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=True)
    lines = output.stdout.splitlines()
    assert lines[0] == f"insmod /run/lower{kernel.modules}/kernel/drivers/net/tun.ko.xz"
    assert lines[-4:] == [
        f"share lab.share0 {share[0]}",
        f"share lab.share1 {share[1]}",
        "sync",
        f"{kernel.release} {kernel.modules} yes no \4m",
    ]


def run_guest_command(
    kernel: Kernel, tmp_path: Path, argv: list[str], env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run the script for the guest here, with the descriptors that init gives it."""
    directory = tmp_path / "here it's"
    directory.mkdir(exist_ok=True)
    script = tmp_path / "command"
    command = Command(argv, directory, env or {})
    script.write_bytes(os.fsencode(compose.guest_command(kernel, command)))
    return subprocess.run(
        ["sh", "-c", f"exec 3</dev/null 4</dev/null 5>&1 6>&2; exec sh {script}"],
        capture_output=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "SECRET": "x"},
    )


def test_the_command_arrives_as_it_was_given(kernel: Kernel, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import os, sys; print(os.fsencode(sys.argv[1]))", NASTY]
    done = run_guest_command(kernel, tmp_path, argv)
    assert done.stdout.decode() == f"{os.fsencode(NASTY)!r}\n"
    long = "x" * 100_000
    assert run_guest_command(kernel, tmp_path, ["echo", long]).stdout.decode() == f"{long}\n"


def test_the_command_has_place_environment_and_streams(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "y")
    script = 'pwd; echo "$VHOSTCTL_LAB $OWN $SECRET"; echo err >&2; ls /proc/self/fd; exit 7'
    done = run_guest_command(kernel, tmp_path, ["sh", "-c", script], {"OWN": "it's"})
    lines = done.stdout.decode().splitlines()
    assert lines[:2] == [str(tmp_path / "here it's"), f"{kernel.release} it's x"]
    assert lines[2:6] == ["0", "1", "2", "3"], "the ports' descriptors are closed"
    assert len(lines) == 6
    assert done.stderr == b"err\n"
    assert done.returncode == 7


@pytest.mark.parametrize(("argv", "status"), [(["no-such-command"], 127), (["/dev/null"], 126)])
def test_what_cannot_run_ends_as_in_a_shell(
    kernel: Kernel, tmp_path: Path, argv: list[str], status: int
) -> None:
    assert run_guest_command(kernel, tmp_path, argv).returncode == status


@pytest.mark.parametrize("path", ["/dev/shm", "/run/user/0", "/proc"])
def test_what_the_guest_cannot_see_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument, match="the guest has a /"):
        compose.check_visible(Path(path), ())
    compose.check_visible(Path(path), [Path(path)])
    compose.check_visible(Path("/running"), ())


@pytest.fixture
def virtme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the programs of a boot first on PATH, and no Python environment beside them."""
    for name in ("virtme-run", "qemu-system-x86_64", "busybox", "file"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    return tmp_path / "virtme-run"


def test_virtmes_line_is_extended(virtme: Path, boot: Boot) -> None:
    virtme.write_text("#!/bin/sh\necho a note\necho \"/q -append 'old line' -m 1\"\n")
    argv = compose.qemu_command(boot, {"control": 5})
    assert argv[:5] == ["/q", "-append", "old line", "-m", "1"]
    assert argv[-1].endswith("name=lab.control")


def test_virtmes_refusal_is_passed_on(virtme: Path, boot: Boot) -> None:
    virtme.write_text("#!/bin/sh\necho 'no busybox was found' >&2\nexit 1\n")
    with pytest.raises(EnvironmentMissing, match=r"^virtme-run: no busybox was found; "):
        compose.qemu_command(boot, {})


def test_a_missing_qemu_is_told(
    boot: Boot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "SYSTEM_DIRECTORIES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentMissing, match=r"^qemu-system-x86_64 is not installed; apt"):
        compose.qemu_command(boot, {})
