"""Kernels in the cache: what a series resolves to, fetching whole or not at all, finding."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from vhostctl.errors import EnvironmentMissing, InvalidArgument
from vhostctl.lab import apt, kernels
from vhostctl.lab.apt import Package

# Recorded from `apt-cache show --no-all-versions`, shortened.
BOOKWORM = """\
Package: linux-image-amd64
Version: 6.1.192-2
Depends: linux-image-6.1.0-56-amd64 (= 6.1.192-2)

Package: linux-image-6.12-amd64
Version: 6.12.117-1~deb12u1
Depends: linux-image-6.12.117+deb12-amd64 (= 6.12.117-1~deb12u1)

Package: linux-image-6.1.0-56-amd64
Version: 6.1.192-2
Installed-Size: 400652
Depends: kmod, linux-base (>= 4.3~), initramfs-tools (>= 0.120+deb8u2) | linux-initramfs-tool
Size: 70550672

Package: linux-image-6.12.117+deb12-amd64
Version: 6.12.117-1~deb12u1
Depends: kmod, linux-base (>= 4.3~), initramfs-tools (>= 0.120+deb8u2) | linux-initramfs-tool
"""
SID = """\
Package: linux-image-amd64
Version: 7.2.13-1
Depends: linux-image-7.2.13+deb14-amd64 (= 7.2.13-1)

Package: linux-image-7.2.13+deb14-amd64
Version: 7.2.13-1
Depends: dracut | initramfs-tools (>= 0.120+deb8u2), linux-base-7.2.13+deb14-amd64 (= 7.2.13-1),
 linux-binary-7.2.13+deb14-amd64 (= 7.2.13-1), linux-modules-7.2.13+deb14-amd64 (= 7.2.13-1)
Pre-Depends: linux-base (>= 4.17~)

Package: linux-binary-7.2.13+deb14-amd64
Version: 7.2.13-1
Depends: linux-base-7.2.13+deb14-amd64 (= 7.2.13-1)

Package: linux-modules-7.2.13+deb14-amd64
Version: 7.2.13-1
Depends: kmod, linux-base-7.2.13+deb14-amd64 (= 7.2.13-1)

Package: linux-base-7.2.13+deb14-amd64
Version: 7.2.13-1
"""


def suite(text: str) -> Callable[[str], Package]:
    packages = {record["Package"]: apt.parse_package(record) for record in apt.records(text)}
    return packages.__getitem__


@pytest.mark.parametrize(
    ("text", "series", "names"),
    [
        (BOOKWORM, "6.1", ["linux-image-6.1.0-56-amd64"]),
        (BOOKWORM, "6.12", ["linux-image-6.12.117+deb12-amd64"]),
        (
            SID,
            "7.2",
            [f"linux-{part}-7.2.13+deb14-amd64" for part in ("image", "base", "binary", "modules")],
        ),
    ],
)
def test_a_series_is_its_newest_release_in_all_its_parts(
    text: str, series: str, names: list[str]
) -> None:
    assert [package.name for package in kernels.resolve(suite(text), series)] == names


def test_sizes_are_bytes() -> None:
    (image,) = kernels.resolve(suite(BOOKWORM), "6.1")
    assert (image.size, image.unpacked) == (70_550_672, 400_652 * 1024)


def test_a_suite_that_moved_on_is_named() -> None:
    with pytest.raises(EnvironmentMissing, match=r"^sid now carries kernel 7\.3, not 7\.2; "):
        kernels.resolve(suite(SID.replace("7.2.13", "7.3.1")), "7.2")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VHOSTCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def install(cache: Path, *releases: str) -> None:
    for release in releases:
        (cache / "kernels" / release).mkdir(parents=True)


def test_find_takes_a_series_or_a_release(cache: Path) -> None:
    install(cache, "6.12.99+deb12-amd64", "6.12.117+deb12-amd64", "6.1.0-56-amd64")
    assert kernels.find("6.12").release == "6.12.117+deb12-amd64"
    assert kernels.find("6.12.99+deb12-amd64").series == "6.12"
    assert [kernel.series for kernel in kernels.installed()] == ["6.1", "6.12", "6.12"]


@pytest.mark.usefixtures("cache")
def test_find_tells_unknown_from_not_fetched() -> None:
    with pytest.raises(EnvironmentMissing, match=r"run vhostctl lab fetch 7\.2"):
        kernels.find("7.2")
    with pytest.raises(InvalidArgument, match=r"no kernel '5\.4'; known: 6\.1, 6\.12, 7\.2"):
        kernels.find("5.4")


def test_an_unknown_series_is_refused_before_anything_is_asked(cache: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"'5\.4'"):
        kernels.fetch("6.1", "5.4")
    assert not cache.exists()


APT_GET = """\
#!/bin/sh
case $* in
*indextargets*) printf 'Label: Debian\\nRepo-URI: http://m/debian\\nSigned-By: KEYRING\\n' ;;
*download*) echo dlstatus:1:50:x; touch image.deb ;;
esac
"""
APT_CACHE = """\
#!/bin/sh
for name; do :; done
cat "RECORDS/$name"
"""
DPKG_DEB = """\
#!/bin/sh
mkdir -p "$3/boot" "$3/usr/share/doc" "$3/lib/modules/6.1.0-56-amd64"
touch "$3/boot/vmlinuz-6.1.0-56-amd64" "$3/boot/System.map-6.1.0-56-amd64"
touch "$3/usr/share/doc/changelog"
"""
DEPMOD = '#!/bin/sh\ntouch "$2/lib/modules/$3/modules.dep"\n'


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make PATH begin with an apt and a dpkg-deb that carry kernel 6.1."""
    where = tmp_path / "bin"
    records = tmp_path / "records"
    where.mkdir()
    records.mkdir()
    for paragraph in BOOKWORM.split("\n\n"):
        (records / paragraph.split()[1]).write_text(paragraph)
    (tmp_path / "keyring").touch()
    scripts = {"apt-get": APT_GET, "apt-cache": APT_CACHE, "dpkg-deb": DPKG_DEB, "depmod": DEPMOD}
    for name, text in scripts.items():
        text = text.replace("KEYRING", str(tmp_path / "keyring"))
        (where / name).write_text(text.replace("RECORDS", str(records)))
        (where / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{where}:{os.environ['PATH']}")
    return where


def left(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.glob("**/*") if path.is_file())


@pytest.mark.usefixtures("programs")
def test_fetch_leaves_a_bootable_tree(cache: Path) -> None:
    seen: list[str] = []
    (kernel,) = kernels.fetch("6.1", progress=lambda what, _percent: seen.append(what))
    assert kernel == kernels.find("6.1")
    assert kernel.image == cache / "kernels/6.1.0-56-amd64/boot/vmlinuz-6.1.0-56-amd64"
    assert left(cache) == [
        "kernels/6.1.0-56-amd64/boot/vmlinuz-6.1.0-56-amd64",
        "kernels/6.1.0-56-amd64/lib/modules/6.1.0-56-amd64/modules.dep",
    ]
    assert list(dict.fromkeys(seen)) == [
        "linux-image-6.1.0-56-amd64 6.1.192-2",
        "unpack kernel 6.1.0-56-amd64",
    ]
    assert kernels.fetch("6.1") == [kernel]


HEADERS = """\
#!/bin/sh
build=$3/usr/src/linux-headers-6.1.0-56-amd64
mkdir -p "$build/include/config" "$build/include/generated"
touch "$build/Makefile" "$build/include/config/auto.conf" "$build/include/generated/autoconf.h"
"""


def test_headers_are_fetched_for_a_kernel_that_is_there(
    programs: Path, cache: Path, tmp_path: Path
) -> None:
    (kernel,) = kernels.fetch("6.1")
    assert not kernel.has_headers
    (programs / "dpkg-deb").write_text(HEADERS)
    record = tmp_path / "records" / "linux-headers-6.1.0-56-amd64"
    record.write_text("Package: linux-headers-6.1.0-56-amd64\nVersion: 6.1.192-2\n")
    assert kernels.fetch("6.1", with_headers=True) == [kernel]
    assert kernels.find("6.1").has_headers
    assert sorted(path.name for path in cache.iterdir()) == ["headers", "kernels"]


@pytest.mark.parametrize(
    ("name", "script", "reason"),
    [
        ("apt-get", APT_GET.replace("touch image.deb", "touch image.deb; exit 1"), "apt-get down"),
        ("dpkg-deb", DPKG_DEB + "echo 'tar: No space left on device' >&2; exit 2", "no space"),
        ("dpkg-deb", DPKG_DEB + "echo 'bad archive' >&2; exit 2", "dpkg-deb: bad archive"),
        ("dpkg-deb", "#!/bin/sh", "no image or no modules"),
        ("depmod", "#!/bin/sh\nexit 1", "depmod: exit status 1"),
    ],
)
def test_a_fetch_that_fails_leaves_nothing(
    programs: Path, cache: Path, name: str, script: str, reason: str
) -> None:
    (programs / name).write_text(script)
    with pytest.raises(Exception, match=reason):
        kernels.fetch("6.1")
    assert list(cache.glob("*")) == []


@pytest.mark.usefixtures("programs")
def test_an_interrupted_fetch_leaves_nothing(cache: Path) -> None:
    def interrupt(what: str, _percent: float) -> None:
        if what.startswith("unpack"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kernels.fetch("6.1", progress=interrupt)
    assert list(cache.glob("*")) == []


def test_too_little_space_is_told_before_the_download(
    programs: Path, cache: Path, tmp_path: Path
) -> None:
    record = tmp_path / "records" / "linux-image-6.1.0-56-amd64"
    record.write_text(record.read_text().replace("Size: 70550672", f"Size: {1 << 60}"))
    (programs / "apt-get").write_text(APT_GET.replace("touch image.deb", "echo 'E: asked' >&2"))
    with pytest.raises(EnvironmentMissing, match=r"MiB for kernel 6\.1"):
        kernels.fetch("6.1")
    assert list(cache.glob("*")) == []


@pytest.mark.usefixtures("programs")
def test_a_split_kernel_gets_lib(tmp_path: Path) -> None:
    release = "7.2.13+deb14-amd64"
    modules = tmp_path / "tree" / "usr" / "lib" / "modules" / release
    modules.mkdir(parents=True)
    (modules / "vmlinuz").touch()
    kernels.settle(tmp_path / "tree", release)
    kernel = kernels.Kernel(release, tmp_path / "tree")
    assert kernel.image.resolve() == modules / "vmlinuz"
    assert (modules / "modules.dep").exists()
