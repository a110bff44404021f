"""The module: built for each kernel without a warning, loaded, worn, and gone without a trace."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.vm.conftest import ROOT, headers_of, run
from vhostctl.kmod import NAME, NODE
from vhostctl.lab import process
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine

LOADS = 200
OPENS = 1000

# What a kernel logs when something is wrong; the marks of an out-of-tree module are not among it.
TROUBLE = re.compile(
    r"BUG|WARNING|Oops|Call Trace|general protection|page fault|refcount|stall|hung|blocked for|"
    r"lockup|KFENCE|Redzone|Poison|Slab|leaked|use-after|UBSAN|Bad page|scheduling while"
)


@dataclass(frozen=True)
class Built:
    kernel: Kernel
    path: Path


@pytest.fixture
def built(kernel: Kernel, module: Path) -> Built:
    return Built(kernel, module)


def in_vm(built: Built, script: str, append: str = "", cpus: int = 1) -> str:
    """Run a shell script that finds the module in $1; return its output, the log looked over."""
    log = "dmesg | sed 's/^/dmesg: /'"
    argv = ["sh", "-ec", f"dmesg -C\n{script}\n{log}", "sh", str(built.path)]
    outcome = run(Machine(built.kernel, cpus, append=append), argv, 900)
    print(outcome)
    assert outcome.status == 0
    lines = outcome.stdout.splitlines()
    assert not [line for line in lines if line.startswith("dmesg: ") and TROUBLE.search(line)]
    return "\n".join(line for line in lines if not line.startswith("dmesg: "))


USE = f"""
vhostctl kmod load "$1" max_mem_regions=16
vhostctl kmod status --json
exec 9<>{NODE}
if vhostctl kmod unload; then exit 9; fi
exec 9>&-
vhostctl kmod unload
test ! -e {NODE}
"""


@pytest.mark.vm
def test_it_is_loaded_shown_and_unloaded(built: Built) -> None:
    state = json.loads(in_vm(built, USE))
    assert (state["loaded"], state["node"], state["taint"]) == (True, True, "OE")
    assert state["parameters"]["max_mem_regions"] == "16"
    assert state["kernel"] == built.kernel.release


@pytest.mark.vm
@pytest.mark.parametrize(
    ("append", "prepare", "match"),
    [
        ("module.sig_enforce=1", "", "module.sig_enforce"),
        ("lockdown=integrity", "mount -t securityfs none /sys/kernel/security", r"\(integrity\)"),
        ("", "echo 1 >/proc/sys/kernel/modules_disabled", "kernel.modules_disabled"),
    ],
)
def test_a_kernel_that_takes_no_module_says_so(
    built: Built, append: str, prepare: str, match: str
) -> None:
    said = in_vm(built, f'{prepare}\nvhostctl kmod load "$1" 2>&1 || echo "status $?"', append)
    assert re.search(match, said)
    assert said.splitlines()[-1] == "status 3"


@pytest.mark.vm
def test_it_can_be_loaded_often(built: Built) -> None:
    said = in_vm(built, f'python -m tests.vm.kmod_wear loads {LOADS} "$1"')
    assert json.loads(said) == {"cycles": LOADS}


@pytest.mark.vm
def test_it_can_be_closed_at_work(built: Built) -> None:
    # Every allocation is checked and remembered; KFENCE is not built into every kernel.
    append = "slub_debug=FZPU,kmalloc-* kfence.sample_interval=20"
    script = f"""
        vhostctl kmod load "$1"
        python -m tests.vm.kmod_wear opens {OPENS}
        vhostctl kmod unload
    """
    outcome = json.loads(in_vm(built, script, append, cpus=2))
    assert outcome["cycles"] == OPENS
    assert min(outcome["used"]["rx"], outcome["used"]["tx"]) > OPENS
    assert outcome["left"] == {}
    assert outcome["lost_mib"] < 8


def test_dkms_builds_it(kernel: Kernel, tmp_path: Path) -> None:
    build = headers_of(kernel)
    dkms = shutil.which("dkms", path=process.search_path())
    if dkms is None:
        pytest.skip("no dkms")
    trees = ["--sourcetree", str(tmp_path / "src"), "--dkmstree", str(tmp_path / "tree")]
    for path in trees[1::2]:
        Path(path).mkdir()
    shutil.copytree(ROOT / "kmod", tmp_path / "kmod")
    target = ["-k", kernel.release, "--kernelsourcedir", str(build)]
    for words in (["add", str(tmp_path / "kmod")], ["build", "vhost-net-mirror/0.1.0", *target]):
        done = subprocess.run(
            [dkms, *words, *trees], capture_output=True, text=True, timeout=300, check=False
        )
        print(done.stdout, done.stderr)
        assert done.returncode == 0
    (made,) = tmp_path.glob(f"tree/**/{kernel.release}/**/{NAME}.ko*")
    assert made.stat().st_size > 0
