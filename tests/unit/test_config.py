"""net.toml: what is read, and how errors name file, line and key."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostctl import config
from vhostctl.cli import asking
from vhostctl.errors import InvalidArgument
from vhostctl.service.spec import DeviceSpec, NetConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "net.toml"
HEAD = '[[device]]\nname = "a"\ntap = "tap0"\n'


def complaint(text: str) -> str:
    with pytest.raises(InvalidArgument) as caught:
        config.loads(text, NetConfig, "net.toml")
    return str(caught.value)


def test_the_example_is_read() -> None:
    web, capture = asking.read_devices(EXAMPLE)
    assert (web.name, web.addresses, web.queues) == ("web", ("192.0.2.1/24", "2001:db8::1/64"), 1)
    assert (capture.mtu, capture.require, capture.queues) == (9000, ("mrg_rxbuf",), 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tap =\n", "net.toml:1: Invalid value"),
        ('x = "', "net.toml:1: Unterminated string (at end of document)"),
        ("[device\n", "net.toml:1: "),
        ("device = 3", "net.toml:1: device: Expected `array`, got `int`"),
        ("# none\n\nnet = 3", "net.toml:3: net: unknown key"),
        ('[[device]]\nname = "a"\n', "net.toml:1: device[0]: Object missing required field `tap`"),
        (HEAD + "tpa = 1", "net.toml:4: device[0].tpa: unknown key"),
        (HEAD + 'queues = "3"', "net.toml:4: device[0].queues: Expected `int`, got `str`"),
        (HEAD + "queues = 0", "net.toml:4: device[0].queues: Expected `int` >= 1"),
        (HEAD + "queue-size = 100", "net.toml:4: device[0].queue-size: queue size 100"),
        (HEAD + "\n\nmac = '01:2'", "net.toml:6: device[0].mac: MAC address '01:2'"),
        (HEAD + "guest = 'pcap'", "net.toml:4: device[0].guest: guest 'pcap'"),
        (HEAD + "require = ['nope']", "net.toml:4: device[0].require: unknown feature 'nope'"),
        (
            HEAD + "require = ['mrg_rxbuf']\nrefuse = ['VIRTIO_NET_F_MRG_RXBUF']",
            "net.toml:5: device[0].refuse: VIRTIO_NET_F_MRG_RXBUF is required too",
        ),
        (HEAD + "mtu = 9\n", "net.toml:4: device[0].mtu: Expected `int` >= 68"),
        (HEAD + "worker = 'boss'\n", "net.toml:4: device[0].worker: Invalid enum value 'boss'"),
        (
            HEAD + "addresses = [\n  '192.0.2.1/24',\n  5,\n]\n",
            "net.toml:4: device[0].addresses[1]: Expected `str`, got `int`",
        ),
        (HEAD + "addresses = ['here']", "net.toml:4: device[0].addresses: address 'here'"),
        (HEAD + "addresses = ['192.0.2.255/24']", "net.toml:4: device[0].addresses: 192.0.2.255"),
        (HEAD + HEAD, "net.toml:5: device[1].name: 'a' is another's already"),
        (
            HEAD + '[[device]]\nname = "b"\n# its tap:\ntap = "tap0"\n',
            "net.toml:7: device[1].tap: 'tap0' is another's already",
        ),
        (HEAD.replace('"a"', '"../a"'), "net.toml:2: device[0].name: Expected `str` matching"),
        (HEAD.replace("tap0", "tap 0"), "net.toml:3: device[0].tap: Expected `str` matching"),
        (HEAD.replace('"a"', '"""\na\n"""'), "net.toml:2: device[0].name: Expected `str` matching"),
    ],
)
def test_an_error_names_file_line_and_key(text: str, expected: str) -> None:
    assert complaint(text).startswith(expected)


def test_what_is_no_text_is_refused_by_line(tmp_path: Path) -> None:
    file = tmp_path / "net.toml"
    file.write_bytes(b"# x\n\xff\n")
    with pytest.raises(InvalidArgument, match=r"net\.toml:2: not UTF-8"):
        config.load(file, NetConfig)
    with pytest.raises(FileNotFoundError, match="check the path"):
        config.load(tmp_path / "none.toml", NetConfig)


class _Numbers(msgspec.Struct, forbid_unknown_fields=True):
    a: list[int]


@given(st.lists(st.sampled_from(["1", "'x'", "2"]), min_size=1, max_size=8), st.integers(0, 3))
def test_the_line_is_the_one_of_the_key_whatever_its_value(values: list[str], blank: int) -> None:
    text = "\n" * blank + "a = [\n" + ",\n".join(values) + "\n]\n"
    if "'x'" not in values:
        assert len(config.loads(text, _Numbers, "f").a) == len(values)
        return
    with pytest.raises(InvalidArgument) as caught:
        config.loads(text, _Numbers, "f")
    at = values.index("'x'")
    assert str(caught.value) == f"f:{blank + 1}: a[{at}]: Expected `int`, got `str`"


def test_a_capture_file_is_named_whole() -> None:
    spec = DeviceSpec(name="a", tap="tap0", guest="pcap:here.pcap")
    assert asking.absolute(spec).guest == f"pcap:{Path.cwd()}/here.pcap"
    assert asking.absolute(DeviceSpec(name="a", tap="tap0")).guest == "echo"


def test_a_spec_says_what_to_wire() -> None:
    spec = DeviceSpec(name="a", tap="t", queues=2, addresses=("192.0.2.1/24",), mtu=1400)
    wire = spec.wire()
    assert (wire.isolated, wire.session.tap, wire.session.queues, wire.mtu) == (False, "t", 2, 1400)
    assert spec.identity().ipv4 == "192.0.2.2"
    assert DeviceSpec(name="a", tap="t", addresses=("192.0.2.1/24",), guest="sink").identity() == (
        DeviceSpec(name="a", tap="t").identity()
    )
