"""What docs/limits.md says is there, is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_code_and_tests_that_are_named_exist() -> None:
    section = (ROOT / "docs/limits.md").read_text(encoding="utf-8").split("## What is there")[1]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")]
    for what, *named in rows[1:]:
        for folder, cell in zip(("vhostctl", "tests"), named, strict=True):
            files = re.findall(r"`([\w/]+\.py)`", cell)
            assert files, what
            missing = [each for each in files if not (ROOT / folder / each).is_file()]
            assert missing == [], what
