"""apt as a downloader: Debian's archive through this machine's mirrors, the machine untouched.

`PrivateApt` has lists, cache and status of its own below one directory; of the machine's
configuration it keeps what reaches the network: proxies, credentials, timeouts. sources.list(5),
apt.conf(5) and apt-get(8) are the sources.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vhostctl.errors import EnvironmentMissing
from vhostctl.lab import cache, process

Progress = Callable[[str, float], None]
"""Called with what is being done and how far it is, in percent."""

_DEBIAN = "http://deb.debian.org/debian"
_SECURITY = "http://deb.debian.org/debian-security"
_STALL_SECONDS = 120.0  # apt itself gives up on a server after 30 s, and tries again twice
_LEAST_FREE = 1 << 20  # bytes
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@dataclass(frozen=True)
class Archives:
    """The URIs of Debian's archive and its security archive, and the keys that sign them."""

    debian: str = _DEBIAN
    security: str = _SECURITY
    keyring: Path = _KEYRING

    def sources(self, suite: str) -> str:
        """Return the deb822 sources for a suite; a stable one comes with its security suite."""
        places = [(self.debian, suite)]
        if suite != "sid":
            places.append((self.security, f"{suite}-security"))
        # Only the package index: apt-file and others make their kinds a default on some machines.
        return "\n".join(
            f"Types: deb\nURIs: {uri}\nSuites: {name}\nComponents: main\nArchitectures: amd64\n"
            f"Targets: Packages\nSigned-By: {self.keyring}\n"
            for uri, name in places
        )


@dataclass(frozen=True)
class Package:
    """A package that can be downloaded; sizes in bytes, `unpacked` as it says of itself."""

    name: str
    version: str
    depends: tuple[str, ...]
    size: int
    unpacked: int


def records(text: str) -> Iterator[dict[str, str]]:
    """Yield the paragraphs of deb822 text; folded lines are joined by a blank."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line[:1].isspace():
                fields[name] = f"{fields.get(name, '')} {line.strip()}".strip()
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if any(fields):
            yield fields


def archives(targets: str) -> Archives:
    """Return the archives that a machine uses, from what ``apt-get indextargets`` printed.

    A machine whose lists were never fetched prints no Label, so the URI decides then. Each
    archive that it has no source for is Debian's own.
    """
    found: dict[str, str] = {}
    keyring = _KEYRING
    for record in records(targets):
        uri = record.get("Repo-URI", "").rstrip("/")
        tail = uri.rpartition("/")[2]
        label = record.get("Label") or {
            "debian": "Debian",
            "debian-security": "Debian-Security",
        }.get(tail)
        if label not in ("Debian", "Debian-Security") or not uri or uri.startswith("cdrom:"):
            continue
        if label not in found and Path(record.get("Signed-By", "")).is_absolute():
            keyring = Path(record["Signed-By"])
        found.setdefault(label, uri)
    return Archives(found.get("Debian", _DEBIAN), found.get("Debian-Security", _SECURITY), keyring)


def machine_archives() -> Archives:
    """Return the archives of this machine; EnvironmentMissing without apt or Debian's keys."""
    apt_get = process.program(
        "apt-get",
        "fetch on Debian or a derivative, and copy its cache, or set VHOSTCTL_CACHE to it",
    )
    try:
        found = archives(process.output_of([apt_get, "indextargets", "Created-By: Packages"]))
    except subprocess.CalledProcessError as error:
        raise EnvironmentMissing(
            f"apt-get indextargets: {_cause(error.stderr)}", hint="repair the sources in /etc/apt"
        ) from error
    if not found.keyring.exists():
        raise EnvironmentMissing(
            f"{found.keyring} is missing", hint="apt install debian-archive-keyring"
        )
    return found


class PrivateApt:
    """apt with everything of its own below `root`, for the sources that it is given."""

    def __init__(self, root: Path, sources: str) -> None:
        self._root = root
        self._options = ["-c", str(root / "apt.conf")]
        for name in ("lists/partial", "cache/archives/partial", "empty"):
            (root / name).mkdir(parents=True)
        (root / "status").touch()
        (root / "lab.sources").write_text(sources, encoding="utf-8")
        (root / "apt.conf").write_text(configuration(root), encoding="utf-8")

    def update(self, progress: Progress) -> None:
        """Fetch the package index; EnvironmentMissing when an archive cannot be reached."""
        self._fetch(["update"], self._root, lambda percent: progress("package index", percent))

    def package(self, name: str) -> Package:
        """Return the newest version of a package; EnvironmentMissing if there is none."""
        try:
            text = process.output_of(
                ["apt-cache", *self._options, "show", "--no-all-versions", name]
            )
        except subprocess.CalledProcessError as error:
            raise EnvironmentMissing(f"{name}: {_cause(error.stderr)}") from error
        return parse_package(next(records(text)))

    def download(self, packages: Sequence[Package], into: Path, progress: Progress) -> list[Path]:
        """Download packages into a directory and return their files."""
        names = [f"{package.name}={package.version}" for package in packages]
        what = f"{packages[0].name} {packages[0].version}"
        self._fetch(["download", *names], into, lambda percent: progress(what, percent))
        return sorted(into.glob("*.deb"))

    def _fetch(self, verb: list[str], into: Path, report: Callable[[float], None]) -> None:
        """Run apt-get; its progress comes as ``dlstatus:item:percent:text`` lines."""
        argv = ["apt-get", *self._options, "-qq", "-o", "APT::Status-Fd=1", *verb]
        options = {"cwd": into, "env": os.environ | {"LC_ALL": "C.UTF-8"}}
        with (
            tempfile.TemporaryFile() as log,
            process.owned(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, **options
            ) as child,
        ):
            moving = Moving(verb[0], into)
            for line in child.stdout or ():
                if line.startswith(b"dlstatus:"):
                    percent = float(line.split(b":")[2])
                    report(percent)
                    moving.check(percent)
            status = child.wait()
            log.seek(0)
            complaint = log.read().decode(errors="replace")
        if status != 0:
            if "No space left" in complaint:
                raise cache.no_space(cache.directory())
            raise EnvironmentMissing(
                f"apt-get {verb[0]}: {_cause(complaint)}",
                hint="check the network, and the proxy in /etc/apt/apt.conf.d if there is one",
            )


class Moving:
    """Notices that apt-get stands still: on a full disk it waits for ever, reporting as it does.

    `what` it does is with files on the disk of `directory`.
    """

    def __init__(self, what: str, directory: Path) -> None:
        self._what = what
        self._directory = directory
        self._percent = -1.0
        self._since = time.monotonic()

    def check(self, percent: float) -> None:
        """Raise EnvironmentMissing if nothing moves and nothing will."""
        now = time.monotonic()
        if percent != self._percent:
            self._percent, self._since = percent, now
        elif shutil.disk_usage(self._directory).free < _LEAST_FREE:
            raise cache.no_space(cache.directory())
        elif now - self._since > _STALL_SECONDS:
            raise EnvironmentMissing(
                f"apt-get {self._what}: nothing came for {_STALL_SECONDS:g} s",
                hint="check the network",
            )


def configuration(root: Path) -> str:
    """Return the text of an apt.conf(5) that keeps all of apt's state below `root`.

    It is meant for ``-c``, which is read after the machine's own files: $APT_CONFIG is read
    before them, and their hooks and index targets would win.
    """
    return f"""\
Dir::State "{root}";
Dir::State::status "{root}/status";
Dir::State::lists "{root}/lists";
Dir::Cache "{root}/cache";
Dir::Etc::sourcelist "{root}/lab.sources";
Dir::Etc::sourceparts "{root}/empty";
Dir::Etc::preferences "{root}/empty/preferences";
Dir::Etc::preferencesparts "{root}/empty";
APT::Architecture "amd64";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::GzipIndexes "true";
Acquire::Retries "2";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


def parse_package(record: Mapping[str, str]) -> Package:
    """Return the package that a record of ``apt-cache show`` describes."""
    alternatives = record.get("Depends", "").split(",")
    return Package(
        record["Package"],
        record["Version"],
        tuple(words[0] for one in alternatives if (words := one.split())),
        int(record.get("Size", 0)),
        int(record.get("Installed-Size", 0)) * 1024,
    )


def closure(
    package: Callable[[str], Package], names: Iterable[str], part: re.Pattern[str]
) -> list[Package]:
    """Return the packages `names` and what they depend on as far as `part` matches the names.

    `package` looks one up by name.
    """
    wanted = list(names)
    packages: dict[str, Package] = {}
    while wanted:
        name = wanted.pop(0)
        if name not in packages:
            packages[name] = package(name)
            wanted += [found for found in packages[name].depends if part.fullmatch(found)]
    return list(packages.values())


def _cause(complaint: str) -> str:
    """Return the line of apt's stderr that says why, in one line."""
    lines = complaint.strip().splitlines() or ["it failed without a word"]
    errors = [line for line in lines if line.startswith("E:")]
    return (errors or lines)[0].removeprefix("E:").strip()
