"""Building the module: what make is told, what is made of what it says, where the result goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vhostctl.errors import CheckFailed, EnvironmentMissing, InvalidArgument, VhostctlError
from vhostctl.kmod import building
from vhostctl.kmod.modinfo import inspect

ROOT = Path(__file__).parents[2]
RELEASE = "6.1.0-1-amd64"
MODULE = r"""
const char info[] __attribute__((section(".modinfo"), used)) =
    "name=vhost_net_mirror\0vermagic=6.1.0-1-amd64 SMP preempt mod_unload \0"
    "depends=tun,tap\0parm=depth:A number (int)\0parmtype=depth:int\0srcversion=ABC";
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file that modinfo takes for our module."""
    path = tmp_path_factory.mktemp("module") / "vhost_net_mirror.ko"
    subprocess.run(["cc", "-c", "-xc", "-", "-o", str(path)], input=MODULE, text=True, check=True)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VHOSTCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kernel_dir(tmp_path: Path, recipe: str) -> Path:
    """Return headers whose kbuild runs this recipe for the target modules."""
    path = tmp_path / "headers"
    path.mkdir()
    lines = "".join(f"\t{line}\n" for line in recipe.splitlines())
    (path / "Makefile").write_text(f"modules:\n{lines}")
    return path


BUILDS = """\
@echo '  CC [M]  core/a.o'
@echo '  MODPOST Module.symvers'
@test -f $(M)/Kbuild -a -d $(M)/core
@cp {module} $(M)/vhost_net_mirror.ko"""
WARNS = "@echo '$(M)/core/a.c:3:5: warning: unused' >&2\n"


def test_a_module_is_kept_by_release(tmp_path: Path, cache: Path, module: Path) -> None:
    said: list[str] = []
    built = building.build(kernel_dir(tmp_path, BUILDS.format(module=module)), log=said.append)
    assert said == []
    assert built.path == cache / "modules" / RELEASE / "vhost_net_mirror.ko"
    assert built.release == RELEASE
    assert built.vermagic == f"{RELEASE} SMP preempt mod_unload"
    assert built.depends == ("tun", "tap")
    assert built.parameters == ("depth",)
    assert built.srcversion == "ABC"
    assert building.built() == [built]
    assert [path.name for path in cache.iterdir()] == ["modules"]
    assert [path.name for path in built.path.parent.iterdir()] == ["vhost_net_mirror.ko"]


@pytest.mark.usefixtures("cache")
def test_a_warning_is_passed_on_and_fails_a_strict_build(tmp_path: Path, module: Path) -> None:
    headers = kernel_dir(tmp_path, WARNS + BUILDS.format(module=module))
    said: list[str] = []
    built = building.build(headers, tmp_path / "out", log=said.append)
    assert built.path == tmp_path / "out" / "vhost_net_mirror.ko"
    assert said == ["core/a.c:3:5: warning: unused"]
    with pytest.raises(CheckFailed, match=r"core/a\.c:3:5: warning: unused"):
        building.build(headers, strict=True)
    assert building.built() == []


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("@echo '$(M)/a.c:1:1: error: no' >&2\n@false", r"headers: a\.c:1:1: error: no$"),
        ("@false", r"headers: make: \*\*\* \[Makefile:2: modules\] Error 1$"),
    ],
)
def test_a_failure_says_why(tmp_path: Path, recipe: str, reason: str) -> None:
    with pytest.raises(VhostctlError, match=reason):
        building.build(kernel_dir(tmp_path, recipe))
    assert building.built() == []


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("options", "asked"),
    [({}, ",,"), ({"strict": True}, "1,,"), ({"sparse": True}, "1,2,-D__CHECK_ENDIAN__")],
)
def test_what_kbuild_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], asked: str
) -> None:
    sparse = tmp_path / "sparse"
    sparse.write_text("#!/bin/sh\n")
    sparse.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("MAKEFLAGS", "W=5 --jobserver-auth=3,4")
    headers = kernel_dir(tmp_path, "@echo 'error: $(W),$(C),$(CF)'; false")
    with pytest.raises(VhostctlError, match=f"error: {asked}$"):
        building.build(headers, **options)


def test_headers_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentMissing, match=r"no Makefile.*linux-headers"):
        building.build(tmp_path)
    monkeypatch.setattr(building, "kernel_release", lambda: "9.9-none")
    with pytest.raises(EnvironmentMissing, match=r"apt install linux-headers-9\.9-none"):
        building.running_kernel_dir()


def test_a_cache_that_make_cannot_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VHOSTCTL_CACHE", str(tmp_path / "a cache"))
    with pytest.raises(InvalidArgument, match="set VHOSTCTL_CACHE"):
        building.build(kernel_dir(tmp_path, "@true"))


@pytest.mark.usefixtures("cache")
def test_an_interrupt_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    def interrupt(_line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        building.build(kernel_dir(tmp_path, "@echo warning: x; sleep 60"), log=interrupt)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"text\n"])
def test_what_is_no_module_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.ko").write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"a\.ko: "):
        inspect(tmp_path / "a.ko")


def test_the_sources_travel(tmp_path: Path) -> None:
    """A built package has them beside it, a checkout uses its own."""
    assert building.sources() == ROOT / "kmod"
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    asked = subprocess.run(
        [sys.executable, "-c", "from vhostctl.kmod.building import sources; print(sources())"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    travelled = Path(asked.stdout.strip())
    assert travelled == tmp_path / "vhostctl/kmod/src"
    for name in ("Kbuild", "Makefile", "dkms.conf"):
        assert (travelled / name).read_text() == (ROOT / "kmod" / name).read_text()
    for part in ("core", "linux"):
        wanted = {path.name for path in (ROOT / "kmod" / part).glob("*.[ch]")}
        assert {path.name for path in (travelled / part).iterdir()} == wanted


def test_dkms_knows_the_version() -> None:
    text = (ROOT / "kmod/dkms.conf").read_text()
    version = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[-1]
    assert f'PACKAGE_VERSION="{version}"' in text
