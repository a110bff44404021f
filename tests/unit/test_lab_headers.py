"""Kernel headers in the cache: what they consist of, and that they work where they lie."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vhostctl.errors import EnvironmentMissing
from vhostctl.lab import apt, headers
from vhostctl.lab.apt import Package

# Recorded from `apt-cache show --no-all-versions`, shortened.
BOOKWORM = """\
Package: linux-headers-6.1.0-56-amd64
Version: 6.1.192-2
Depends: linux-headers-6.1.0-56-common (= 6.1.192-2), linux-kbuild-6.1 (>= 6.1.192-2),
 linux-compiler-gcc-12-x86

Package: linux-headers-6.1.0-56-common
Version: 6.1.192-2

Package: linux-kbuild-6.1
Version: 6.1.192-2
Depends: libc6 (>= 2.34), libelf1 (>= 0.131), libssl3 (>= 3.0.0)

Package: libelf1
Version: 0.188-2.1
Depends: libc6 (>= 2.33), zlib1g (>= 1:1.2.3.4)

Package: zlib1g
Version: 1:1.2.13.dfsg-1
Depends: libc6 (>= 2.14)

Package: libc6
Version: 2.36-9+deb12u10
Depends: libgcc-s1, libcrypt1 (>= 1:4.4.10-10~)
"""
SID = """\
Package: linux-headers-7.2.13+deb14-amd64
Version: 7.2.13-1
Depends: gcc-16-for-host, linux-base, linux-base-7.2.13+deb14-amd64 (= 7.2.13-1),
 linux-headers-7.2.13+deb14-common (= 7.2.13-1), linux-kbuild-7.2.13+deb14

Package: linux-headers-7.2.13+deb14-common
Version: 7.2.13-1

Package: linux-kbuild-7.2.13+deb14
Version: 7.2.13-1
Depends: pahole, libc6 (>= 2.38), libelf1t64 (>= 0.192), libssl3t64 (>= 3.0.0), zlib1g (>= 1:1.1.4)

Package: libelf1t64
Version: 0.196-1
Depends: libc6 (>= 2.38), libzstd1 (>= 1.5.5), zlib1g (>= 1:1.2.3.4)

Package: libzstd1
Version: 1.5.7

Package: zlib1g
Version: 1:1.3

Package: libc6
Version: 2.43-7
"""


def suite(text: str) -> Callable[[str], Package]:
    packages = {record["Package"]: apt.parse_package(record) for record in apt.records(text)}
    return packages.__getitem__


@pytest.mark.parametrize(
    ("text", "release", "libraries"),
    [
        (BOOKWORM, "6.1.0-56-amd64", {"libc6", "libelf1", "zlib1g"}),
        (SID, "7.2.13+deb14-amd64", {"libc6", "libelf1t64", "libzstd1", "zlib1g"}),
    ],
)
def test_headers_come_with_kbuild_and_its_libraries(
    text: str, release: str, libraries: set[str]
) -> None:
    names = [package.name for package in headers.resolve(suite(text), release)]
    assert names[0] == f"linux-headers-{release}"
    parts = {name for name in names[1:] if name.startswith("linux-")}
    assert len(parts) == 2
    assert all(name.endswith("-common") or "kbuild" in name for name in parts)
    assert set(names[1:]) - parts == libraries


RELEASE = "7.2.13+deb14-amd64"
COMMON = "7.2.13+deb14-common"
CONFIGURATION = """\
CONFIG_CC_HAS_COUNTED_BY=y
CONFIG_CC_HAS_COUNTED_BY_PTR=y
CONFIG_CC_HAS_INT128=y
CONFIG_DEBUG_INFO_BTF=y
CONFIG_DEBUG_INFO_BTF_MODULES=y
CONFIG_PAHOLE_VERSION=132
"""


def library(name: str) -> Path:
    """Return where this machine has a library."""
    asked = subprocess.run(
        ["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return Path(asked.stdout.strip())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return unpacked packages with the parts that matter; /bin/sh stands for modpost."""
    tree = tmp_path / "unpacked"
    build = tree / "usr/src" / f"linux-headers-{RELEASE}"
    common = tree / "usr/src" / f"linux-headers-{COMMON}"
    kbuild = tree / "usr/lib/linux-kbuild-7.2"
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    for directory in (
        build / "include/config",
        build / "include/generated",
        common,
        kbuild / "scripts/mod",
        libraries,
        tree / "usr/share/doc",
    ):
        directory.mkdir(parents=True)
    (build / "scripts").symlink_to("../../lib/linux-kbuild-7.2/scripts")
    (build / "Makefile").write_text(
        f"KBUILD_OUTPUT=/usr/src/linux-headers-{RELEASE}\n"
        f"include /usr/src/linux-headers-{COMMON}/Makefile\n"
    )
    (build / "vmlinux").touch()
    (build / ".kernelvariables").write_text("CC = no-such-gcc-16\n")
    (common / "Makefile").write_text(
        "PAHOLE_VERSION := 0\ninclude .kernelvariables\ninclude include/config/auto.conf\n"
        "$(info $(KBUILD_OUTPUT) $(CC) $(CONFIG_PAHOLE_VERSION))\n"
        "all:\n\t@scripts/mod/modpost -c 'echo $$0 $$1' scripts/mod/modpost 'a  b'\n"
    )
    (build / "include/config/auto.conf").write_text(CONFIGURATION)
    defines = CONFIGURATION.replace("=y", " 1").replace("=", " ").splitlines()
    (build / "include/generated/autoconf.h").write_text(
        "".join(f"#define {line}\n" for line in defines)
    )
    shutil.copy("/bin/sh", kbuild / "scripts/mod/modpost")
    (kbuild / "scripts/checker.sh").write_text("#!/bin/sh\n")
    for name in ("ld-linux-x86-64.so.2", "libc.so.6"):
        shutil.copy(library(name), libraries / name)
    return tree


def test_headers_work_where_they_lie_and_after_a_move(tree: Path, tmp_path: Path) -> None:
    headers.settle(tree, RELEASE)
    (tmp_path / "elsewhere").mkdir()
    moved = tree.rename(tmp_path / "elsewhere" / RELEASE)
    build = moved / "usr/src" / f"linux-headers-{RELEASE}"
    made = subprocess.run(
        ["make", "--no-print-directory", "-C", str(build)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.stderr == ""
    assert made.stdout.splitlines() == [f"{build} gcc 0", "scripts/mod/modpost a b"]
    assert not (build / "vmlinux").exists()
    assert not (moved / "usr/share").exists()


def test_a_program_runs_with_its_own_libraries_under_its_own_name(tree: Path) -> None:
    headers.settle(tree, RELEASE)
    program = tree / "usr/lib/linux-kbuild-7.2/scripts/mod/modpost"
    maps = subprocess.run(
        [program, "-c", "cat /proc/$$/maps; tr '\\0' ' ' </proc/$$/cmdline"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str((tree / "usr/lib/x86_64-linux-gnu/libc.so.6").resolve()) in maps
    assert f"--argv0 {program} {program}.elf -c" in maps
    script = tree / "usr/lib/linux-kbuild-7.2/scripts/checker.sh"
    assert script.read_text() == "#!/bin/sh\n"


def test_the_configuration_loses_what_an_older_compiler_lacks(tree: Path) -> None:
    headers.settle(tree, RELEASE)
    build = tree / "usr/src" / f"linux-headers-{RELEASE}"
    for_make = (build / "include/config/auto.conf").read_text().splitlines()
    assert for_make == [
        "CONFIG_CC_HAS_INT128=y",
        "CONFIG_DEBUG_INFO_BTF=y",
        "CONFIG_PAHOLE_VERSION=132",
    ]
    for_c = (build / "include/generated/autoconf.h").read_text().splitlines()
    assert "#define CONFIG_DEBUG_INFO_BTF_MODULES 1" in for_c  # it decides a struct's layout
    assert len(for_c) == 4


def test_packages_without_headers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentMissing, match="no headers of kernel 7"):
        headers.settle(tmp_path, RELEASE)


def test_find_says_how_to_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VHOSTCTL_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentMissing, match=r"run vhostctl lab fetch --headers 6\.1$"):
        headers.find("6.1.0-56-amd64")
    build = tmp_path / "headers/6.1.0-56-amd64/usr/src/linux-headers-6.1.0-56-amd64"
    build.mkdir(parents=True)
    assert headers.find("6.1.0-56-amd64") == build
