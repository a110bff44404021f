"""The document of a suspended session: what is refused, and by what name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vhostctl.abi import virtio
from vhostctl.control.snapshot import Snapshot
from vhostctl.errors import InvalidArgument

RING = {"size": 64, "desc": 0x1000, "avail": 0x2000, "used": 0x3000, "base": 7}
DOCUMENT: dict[str, Any] = {
    "version": 1,
    "device": "/dev/vhost-net",
    "features": ["VIRTIO_NET_F_MRG_RXBUF", "VIRTIO_NET_F_MAC", "VIRTIO_F_VERSION_1"],
    "vmm": ["VIRTIO_NET_F_MAC"],
    "memory": [{"gpa": 0, "size": 4096, "name": "ram"}],
    "rings": [RING | {"masked": True}, RING, RING, RING],
    "order": [1],
    "link": True,
    "busyloop": 50,
    "worker": None,
    "translating": False,
    "tap": {"name": "tap0", "header_size": 12, "offload": 3, "endian": "little", "sndbuf": 4096},
}


def test_a_document_comes_back_as_it_went() -> None:
    snapshot = Snapshot.from_json(json.dumps(DOCUMENT))
    assert Snapshot.from_json(snapshot.to_json()) == snapshot
    assert snapshot.rings[0].masked
    assert snapshot.rings[1].placement.used == 0x3000


def test_the_session_that_goes_on_wants_these_features_and_no_others() -> None:
    snapshot = Snapshot.from_json(json.dumps(DOCUMENT))
    config = snapshot.config("engine")
    assert config.driver == config.policy.required == snapshot.feature_bits
    assert config.vmm == 1 << virtio.VIRTIO_NET_F_MAC
    assert (config.device, config.queues, config.queue_size) == ("engine", 2, 64)
    assert (config.sndbuf, config.busyloop) == (4096, 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; this vhostctl reads version 1"),
        ({"colour": 1}, "unknown field `colour`"),
        ({"link": "up"}, r"Expected `bool`, got `str` - at `\$.link`"),
        ({"rings": [RING]}, "1 rings; a pair has two"),
        ({"rings": []}, "0 rings"),
        ({"rings": [RING, RING | {"base": 65536}] * 2}, r"\$.rings\[1\].base is 65536"),
        ({"rings": [RING, RING | {"size": 100}] * 2}, "queue size 100"),
        ({"order": [0, 0]}, r"\$.order is \[0, 0\]"),
        ({"order": []}, r"\$.order is \[\]"),
        ({"order": [2]}, r"\$.order is \[2\]"),
        ({"features": ["VIRTIO_F_TELEPORT"]}, "unknown feature 'VIRTIO_F_TELEPORT'"),
        ({"memory": [{"gpa": 0}]}, r"missing required field `size` - at `\$.memory\[0\]`"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Snapshot.from_json(json.dumps(DOCUMENT | change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_what_is_no_document_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="snapshot: "):
        Snapshot.from_json(text)
