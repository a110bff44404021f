"""What tests on a vhost-net device need, and the skip where it is not there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from vhostctl.host.vhost import ENGINE


def skip_without_device(config: pytest.Config, items: Iterable[pytest.Item], folder: Path) -> None:
    """Skip the tests of `folder` without root, /dev/net/tun or the node of --device."""
    nodes = {str(config.getoption("--device")), "/dev/net/tun"} - {ENGINE}
    missing = [node for node in sorted(nodes) if not Path(node).exists()]
    reason = f"no {' and no '.join(missing)}" if missing else "not root" if os.geteuid() else ""
    for item in items:
        if reason and folder in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
