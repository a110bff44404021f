"""Loading and unloading: what is checked before, and what each refusal is told as."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vhostctl.errors import EnvironmentMissing, InvalidArgument, KernelError, StateError
from vhostctl.kmod import NAME, loading, status
from vhostctl.kmod.kmsg import KernelLog
from vhostctl.kmod.modinfo import ModuleInfo

VERMAGIC = "6.1.0-1-amd64 SMP preempt mod_unload modversions"


class System:
    """A machine whose kernel answers as it is told."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.answer = 0
        self.calls: list[tuple[int | bytes, ...]] = []
        self.probed: list[str] = []
        self.log: list[str] = []
        self.modules = {"tun": ModuleInfo(Path("tun.ko"), "tun", VERMAGIC, "", "", (), ())}
        files = {
            "_OWN_STATUS": "Name:\tx\nCapEff:\t000001ffffffffff\n",
            "_MODULES_DISABLED": "0\n",
            "_LOCKDOWN": "[none] integrity confidentiality\n",
        }
        for name, text in files.items():
            self.write(name, text)
            monkeypatch.setattr(loading, name, root / name)
        monkeypatch.setattr(status, "_SYS_MODULE", root / "module")
        monkeypatch.setattr(loading, "_system_call", self._system_call)
        monkeypatch.setattr(loading, "_modprobe", self.probed.append)
        monkeypatch.setattr(loading, "inspect", self._inspect)
        monkeypatch.setattr(loading, "kernel_release", lambda: VERMAGIC.split()[0])
        monkeypatch.setattr(KernelLog, "messages", lambda _self: self.log)
        monkeypatch.setenv("VHOSTCTL_CACHE", str(root / "cache"))

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def add_module(
        self, vermagic: str = VERMAGIC, name: str = NAME, file: str = f"{NAME}.ko"
    ) -> Path:
        path = self.root / file
        path.touch()
        self.modules[str(path)] = ModuleInfo(
            path, name, vermagic, "1", "", ("tap", "tun"), ("depth", "name")
        )
        return path

    def set_loaded(self, references: int = 0) -> None:
        (self.root / "module" / "holders").mkdir(parents=True)
        (self.root / "module" / "refcnt").write_text(f"{references}\n")

    def _inspect(self, module: Path | str) -> ModuleInfo:
        try:
            return self.modules[str(module)]
        except KeyError:
            raise InvalidArgument(f"{module}: not found") from None

    def _system_call(self, _number: int, *arguments: int | bytes) -> int:
        self.calls.append(arguments)
        return self.answer


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    return System(tmp_path, monkeypatch)


def test_a_module_is_loaded_after_what_it_needs(system: System) -> None:
    path = system.add_module()
    assert loading.load(path, {"depth": "3", "name": "a b"}).path == path
    assert system.probed == ["tap", "tun"]
    assert [call[1:] for call in system.calls] == [(b'depth=3 name="a b"', 0)]


def test_without_a_file_it_is_the_one_for_this_kernel(system: System) -> None:
    with pytest.raises(EnvironmentMissing, match="build one with vhostctl kmod build"):
        loading.load()
    installed = system.add_module()
    system.modules[NAME] = system.modules[str(installed)]
    assert loading.load().path == installed
    cached = system.root / "cache/modules" / VERMAGIC.split()[0] / f"{NAME}.ko"
    cached.parent.mkdir(parents=True)
    cached.touch()
    system.modules[str(cached)] = ModuleInfo(cached, NAME, VERMAGIC, "", "", (), ())
    assert loading.load().path == cached


def test_a_compressed_module_is_the_kernels_to_unpack(system: System) -> None:
    path = system.add_module(file=f"{NAME}.ko.xz")
    system.answer = errno.EOPNOTSUPP
    with pytest.raises(KernelError, match="unpack it"):
        loading.load(path)
    assert system.calls[0][2] == 4


@pytest.mark.parametrize(
    ("vermagic", "own", "match"),
    [
        ("6.12.0-1-amd64 SMP", VERMAGIC, f"'6.12.0-1-amd64 SMP', this one is '{VERMAGIC}'"),
        ("6.1.0-1-amd64 SMP", VERMAGIC, "'6.1.0-1-amd64 SMP', this one is"),
        ("6.12.0-1-amd64 SMP", "", "'6.12.0-1-amd64', this one is '6.1.0-1-amd64'"),
    ],
)
def test_a_module_of_another_kernel(system: System, vermagic: str, own: str, match: str) -> None:
    system.modules["tun"] = ModuleInfo(Path(), "tun", own, "", "", (), ())
    with pytest.raises(InvalidArgument, match=match):
        loading.load(system.add_module(vermagic))
    assert system.calls == []


def test_a_kernel_without_module_files_is_known_by_its_release(system: System) -> None:
    del system.modules["tun"]
    loading.load(system.add_module())
    assert len(system.calls) == 1


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"deep": "1", "xx": ""}, "has no parameter deep, xx; it has depth, name"),
        ({"name": 'a"b'}, "cannot hold a quote"),
    ],
)
def test_parameters_are_checked(system: System, values: dict[str, str], match: str) -> None:
    with pytest.raises(InvalidArgument, match=match):
        loading.load(system.add_module(), values)
    assert system.calls == []


def test_another_module_is_refused(system: System) -> None:
    with pytest.raises(InvalidArgument, match="is the module dummy"):
        loading.load(system.add_module(name="dummy"))


def test_it_is_loaded_once(system: System) -> None:
    system.set_loaded()
    with pytest.raises(StateError, match="loaded already"):
        loading.load(system.add_module())


@pytest.mark.parametrize("action", [loading.load, loading.unload])
def test_it_takes_a_capability(system: System, action: Callable[[], object]) -> None:
    system.write("_OWN_STATUS", "CapEff:\t000001fffffeffff\n")
    system.modules[NAME] = system.modules[str(system.add_module())]
    if action is loading.unload:
        system.set_loaded()
    with pytest.raises(EnvironmentMissing, match="CAP_SYS_MODULE; run it as root"):
        action()
    assert system.calls == []


@pytest.mark.parametrize(
    ("answer", "files", "match"),
    [
        (errno.EKEYREJECTED, {}, r"module\.sig_enforce"),
        (errno.EPERM, {"_MODULES_DISABLED": "1\n"}, r"kernel\.modules_disabled.*reboot"),
        (errno.EPERM, {"_LOCKDOWN": "none [integrity] x\n"}, r"locked down \(integrity\)"),
    ],
)
def test_what_the_administrator_forbade(
    system: System, answer: int, files: dict[str, str], match: str
) -> None:
    for name, text in files.items():
        system.write(name, text)
    system.answer = answer
    with pytest.raises(EnvironmentMissing, match=match):
        loading.load(system.add_module())


def test_other_refusals_come_with_the_kernels_words(system: System) -> None:
    system.answer = errno.ENOENT
    system.log = ["eth0: up", f"{NAME}: Unknown symbol x (err -2)", "usb 1: new"]
    with pytest.raises(FileNotFoundError, match=r"kernel says: .*Unknown symbol x") as caught:
        loading.load(system.add_module())
    assert isinstance(caught.value, KernelError)
    system.log = []
    system.answer = errno.EPERM
    with pytest.raises(PermissionError, match=r"\(EPERM\)$"):
        loading.load(system.add_module())


def test_unloading(system: System) -> None:
    with pytest.raises(StateError, match="is not loaded"):
        loading.unload()
    system.set_loaded()
    loading.unload()
    assert system.calls == [(NAME.encode(), os.O_NONBLOCK)]


def test_a_module_in_use_names_its_users(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    system.set_loaded(references=2)
    (system.root / "module/holders/other").touch()
    monkeypatch.setattr(loading, "users", lambda: ((12, "qemu"),))
    system.answer = errno.EWOULDBLOCK
    with pytest.raises(StateError, match=r"refcount 2\) by 12 \(qemu\), other; close /dev/"):
        loading.unload()
