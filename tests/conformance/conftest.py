"""Tests here need root, the node of --device (or the engine) and /dev/net/tun."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vhostctl.host.vhost import ENGINE


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    nodes = {str(config.getoption("--device")), "/dev/net/tun"} - {ENGINE}
    missing = [node for node in sorted(nodes) if not Path(node).exists()]
    reason = f"no {' and no '.join(missing)}" if missing else "not root" if os.geteuid() else ""
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
