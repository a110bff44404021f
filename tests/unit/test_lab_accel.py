"""The accelerator: what is asked for, what is remembered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vhostctl.errors import EnvironmentMissing, InvalidArgument
from vhostctl.lab import accel
from vhostctl.lab.accel import Accel


@pytest.fixture(autouse=True)
def kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for a /dev/kvm that opens, with nothing remembered."""
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accel, "_DEVICE", device)
    monkeypatch.setenv("VHOSTCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VHOSTCTL_ACCEL", raising=False)
    return device


def test_kvm_is_tried_once_and_the_verdict_kept() -> None:
    assert accel.choose("auto", icount=False) is Accel.TRIAL
    accel.remember(works=False)
    assert accel.choose(None, icount=False) is Accel.TCG
    accel.remember(works=True)
    assert accel.choose(None, icount=False) is Accel.KVM


def test_a_verdict_is_for_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    accel.remember(works=False)
    monkeypatch.setattr(accel, "host", lambda: "another kernel on another processor")
    assert accel.choose(None, icount=False) is Accel.TRIAL


@pytest.mark.parametrize("damage", ["", "[]", '{"x":', json.dumps({accel.host(): "no"})])
def test_a_damaged_memory_holds_nothing(tmp_path: Path, damage: str) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kvm.json").write_text(damage)
    assert accel.choose(None, icount=False) is Accel.TRIAL
    accel.remember(works=False)
    assert accel.choose(None, icount=False) is Accel.TCG


def test_without_kvm_there_is_emulation(kvm: Path) -> None:
    kvm.unlink()
    assert accel.choose(None, icount=False) is Accel.TCG
    with pytest.raises(EnvironmentMissing, match="No such file or directory; --accel tcg"):
        accel.choose("kvm", icount=False)


def test_what_is_asked_for_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    accel.remember(works=False)
    monkeypatch.setenv("VHOSTCTL_ACCEL", "kvm")
    assert accel.choose(None, icount=False) is Accel.KVM
    assert accel.choose("tcg", icount=False) is Accel.TCG


def test_counting_instructions_is_the_emulators() -> None:
    assert accel.choose("auto", icount=True) is Accel.TCG
    with pytest.raises(InvalidArgument, match="cannot count"):
        accel.choose("kvm", icount=True)


def test_an_unknown_accelerator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VHOSTCTL_ACCEL", "xen")
    with pytest.raises(InvalidArgument, match="'xen'; auto, kvm or tcg"):
        accel.choose(None, icount=False)
