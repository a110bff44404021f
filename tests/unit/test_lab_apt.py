"""apt as a downloader: the machine's archives, the private configuration, what apt-get says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vhostctl.errors import EnvironmentMissing
from vhostctl.lab import apt

# Recorded from `apt-get indextargets 'Created-By: Packages'`, shortened.
TARGETS = """\
MetaKey: main/binary-amd64/Packages
Codename: bookworm
Label: Debian
Repo-URI: http://mirror.example/debian/
Release: bookworm
Sourcesentry: /etc/apt/sources.list.d/debian.sources:1

MetaKey: main/binary-amd64/Packages
Codename: bookworm-backports
Label: Debian Backports
Repo-URI: http://backports.example/debian/
Release: bookworm-backports

MetaKey: main/binary-amd64/Packages
Codename: bookworm-security
Label: Debian-Security
Repo-URI: http://security.example/debian-security/
Release: bookworm-security

MetaKey: main/binary-amd64/Packages
Label: Debian
Repo-URI: http://second.example/debian/
Release: trixie
"""


def test_the_machines_own_mirrors_are_used() -> None:
    found = apt.archives(TARGETS)
    assert found.debian == "http://mirror.example/debian"
    assert found.security == "http://security.example/debian-security"


def test_without_lists_the_uri_decides() -> None:
    text = "\n".join(line for line in TARGETS.splitlines() if not line.startswith("Label"))
    assert apt.archives(text).security == "http://security.example/debian-security"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Label: Ubuntu\nRepo-URI: http://archive.example/ubuntu/\n",
        "Label: Debian\nRepo-URI: cdrom:[Debian 12]/\n",
    ],
)
def test_a_machine_without_debian_gets_debians_own_servers(text: str) -> None:
    assert apt.archives(text) == apt.Archives()


def test_the_machines_key_goes_with_its_mirror() -> None:
    signed = TARGETS.replace("Codename: bookworm\n", "Signed-By: /etc/keys/mirror.gpg\n")
    assert apt.archives(signed).keyring == Path("/etc/keys/mirror.gpg")
    by_fingerprint = TARGETS.replace("Codename: bookworm\n", "Signed-By: 4CB50190207B4758\n")
    assert apt.archives(by_fingerprint).keyring == apt.Archives().keyring


def test_a_stable_suite_comes_with_its_security_suite() -> None:
    stable = apt.archives(TARGETS).sources("bookworm")
    assert list(apt.records(stable)) == [
        {
            "Types": "deb",
            "URIs": uri,
            "Suites": suite,
            "Components": "main",
            "Architectures": "amd64",
            "Targets": "Packages",
            "Signed-By": str(apt.Archives().keyring),
        }
        for uri, suite in [
            ("http://mirror.example/debian", "bookworm"),
            ("http://security.example/debian-security", "bookworm-security"),
        ]
    ]
    assert [record["Suites"] for record in apt.records(apt.Archives().sources("sid"))] == ["sid"]


def test_the_configuration_stays_below_its_root() -> None:
    text = apt.configuration(Path("/cache/x"))
    for directory in ("Dir::State", "Dir::State::status", "Dir::State::lists", "Dir::Cache"):
        assert f'{directory} "/cache/x' in text
    assert 'Dir::Etc::sourcelist "/cache/x/lab.sources"' in text
    assert 'APT::Update::Error-Mode "any";' in text
    assert "#clear APT::Update::Post-Invoke;" in text
    assert "Proxy" not in text


def test_folded_fields_are_joined() -> None:
    assert list(apt.records("A: one\n two\nB:\n\n\nC: three")) == [
        {"A": "one two", "B": ""},
        {"C": "three"},
    ]


@pytest.fixture
def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an apt-get first on PATH; the test writes its script."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("VHOSTCTL_CACHE", str(tmp_path / "cache"))
    (programs / "apt-get").touch(0o755)
    return programs / "apt-get"


def test_progress_is_reported(fake_apt: Path, tmp_path: Path) -> None:
    fake_apt.write_text(
        '#!/bin/sh\ntest "$1" = -c && test -s "$2" || exit 9\n'
        "echo dlstatus:1:12.5:Retrieving file 1 of 2\necho noise\necho dlstatus:2:100:done\n"
    )
    seen: list[tuple[str, float]] = []
    apt.PrivateApt(tmp_path / "apt", "").update(lambda what, percent: seen.append((what, percent)))
    assert seen == [("package index", 12.5), ("package index", 100.0)]


def test_the_first_error_is_the_cause(fake_apt: Path, tmp_path: Path) -> None:
    fake_apt.write_text(
        "#!/bin/sh\necho 'W: a warning' >&2\necho 'E: Could not resolve mirror.example' >&2\n"
        "echo 'E: Some index files failed to download.' >&2\nexit 100\n"
    )
    with pytest.raises(EnvironmentMissing) as caught:
        apt.PrivateApt(tmp_path / "apt", "").update(lambda _what, _percent: None)
    assert str(caught.value).startswith("apt-get update: Could not resolve mirror.example; ")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_named(fake_apt: Path, tmp_path: Path) -> None:
    fake_apt.write_text("#!/bin/sh\necho 'E: write (28: No space left on device)' >&2\nexit 100\n")
    with pytest.raises(EnvironmentMissing, match="cache: no space left; free some"):
        apt.PrivateApt(tmp_path / "apt", "").update(lambda _what, _percent: None)


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [("_LEAST_FREE", 1 << 62, "no space left"), ("_STALL_SECONDS", -1.0, "nothing came for")],
)
def test_standing_still_ends(
    fake_apt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    value: float,
    reason: str,
) -> None:
    fake_apt.write_text(
        "#!/bin/sh\necho dlstatus:1:5:x\necho dlstatus:1:5:x\nexec tail -f /dev/null\n"
    )
    monkeypatch.setattr(apt, limit, value)
    with pytest.raises(EnvironmentMissing, match=reason):
        apt.PrivateApt(tmp_path / "apt", "").update(lambda _what, _percent: None)
