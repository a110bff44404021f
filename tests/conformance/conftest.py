"""Tests here need root, the node of --device (or the engine) and /dev/net/tun."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.needs import skip_without_device


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_without_device(config, items, Path(__file__).parent)
