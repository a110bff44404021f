"""Every snippet of the README is run, and every command behind a `$`.

But for the targets that run this. The blocks without a `$` are for machines of the reader's own.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests.vm.conftest import ROOT, fetched, run, search_path
from vhostctl.lab.vm import Machine

# Its commands depend on their order.
pytestmark = pytest.mark.xdist_group("readme")

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (.+)$", README, re.MULTILINE)
ON_THE_HOST = [c for c in COMMANDS if c.startswith(("vhostctl lab", "vhostctl kmod build"))]
EXAMPLES = ["examples/wire.py", "examples/change.py"]
MAKE = [command for command in COMMANDS if command.startswith("make ")]
IN_A_VM = [command for command in COMMANDS if command not in (*ON_THE_HOST, *MAKE)]


def bounded(command: str) -> str:
    """`up` runs until it is told to end, which is when it has said that it is up."""
    if not command.startswith("vhostctl up") or "--detach" in command:
        return command
    return f"mkfifo said; exec 9<>said; {command} >&9 & read -r line <&9; kill $!; wait $!"


def test_the_snippets_are_the_examples_that_are_run() -> None:
    snippets = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(snippets) == len(EXAMPLES)
    for snippet, example in zip(snippets, EXAMPLES, strict=True):
        assert snippet in (ROOT / example).read_text(encoding="utf-8")


@pytest.mark.vm
def test_the_commands_that_need_a_device() -> None:
    assert len(IN_A_VM) >= 4
    examples = [f"python {example}" for example in EXAMPLES]
    lines = [bounded(command) for command in (*IN_A_VM, *examples)]
    outcome = run(Machine(fetched("6.1"), 1), ["sh", "-exc", "\n".join(lines)], 600)
    print(outcome)
    assert outcome.status == 0


@pytest.mark.vm
@pytest.mark.parametrize("command", [*ON_THE_HOST, "make demo", "make demo-kernel"])
def test_the_commands_that_boot_a_vm(command: str) -> None:
    fetched("6.1")
    done = subprocess.run(
        # What an archive has newer must not appear while other tests use what is there.
        ["sh", "-c", command.replace("lab fetch", "lab fetch --missing")],
        cwd=ROOT,
        env=os.environ | {"PATH": search_path()},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"^[A-Z_]{5,}$", README, re.MULTILINE)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in {*MAKE, *re.findall(r"`(make [a-z-]+)`", README)}:
        assert re.search(rf"^{target.split()[1]}:", makefile, re.MULTILINE), target
