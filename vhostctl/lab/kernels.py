"""Debian's kernels in the cache: which there are, fetching one, finding one.

A kernel is a directory named after its release below ``kernels`` in the cache. It holds the
unpacked packages: the image where Debian puts it, and always ``lib/modules/RELEASE`` with what
depmod wrote. It appears there by a rename, so one that exists is whole.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path, PurePosixPath

from vhostctl.errors import EnvironmentMissing, InvalidArgument, VhostctlError
from vhostctl.lab import apt, cache, headers, process
from vhostctl.lab.apt import Package, PrivateApt, Progress

SERIES: dict[str, tuple[str, str]] = {
    "6.1": ("bookworm", "linux-image-amd64"),
    "6.12": ("bookworm", "linux-image-6.12-amd64"),
    "7.2": ("sid", "linux-image-amd64"),
}
"""Series -> the suite that carries it and the package that depends on its newest release.

The generic flavour: the cloud one has no 9p, and the guest's root is a 9p file system.
"""

_RELEASE = re.compile(r"(\d+\.\d+)\.\d.*-amd64")
# A split kernel: linux-image-R depends on linux-binary-R, linux-modules-R and linux-base-R.
_PART = re.compile(r"linux-(?:image|binary|modules|base)-(\d+\.\d+\.\d.*-amd64)")


@dataclass(frozen=True)
class Kernel:
    """A kernel in the cache; `release` is what ``uname -r`` says in its VM."""

    release: str
    tree: Path

    @property
    def series(self) -> str:
        """The first two numbers of the release, such as ``6.12``."""
        return series_of(self.release)

    @property
    def image(self) -> Path:
        """The bootable image: in ``boot``, or beside the modules since Debian 14."""
        boot = self.tree / "boot" / f"vmlinuz-{self.release}"
        return boot if boot.exists() else self.modules / "vmlinuz"

    @property
    def modules(self) -> Path:
        """The module directory, with modules.dep."""
        return self.tree / "lib" / "modules" / self.release

    @cached_property
    def dependencies(self) -> dict[str, list[str]]:
        """modules.dep: each module file, and all that it needs, the nearest first.

        Paths are below `modules`.
        """
        lines = (self.modules / "modules.dep").read_text(encoding="utf-8").splitlines()
        return {path: rest.split() for path, _, rest in (line.partition(":") for line in lines)}

    def load_order(self, names: Iterable[str]) -> list[str]:
        """Return the files of modules and of all that they need, each after what it needs.

        What the kernel has built in, or not at all, is not among them.
        """
        depends = self.dependencies
        files = {PurePosixPath(path).name.partition(".")[0]: path for path in depends}
        wanted = [files[name] for name in names if name in files]
        return list(
            dict.fromkeys(part for file in wanted for part in (*reversed(depends[file]), file))
        )

    @property
    def has_headers(self) -> bool:
        """Whether the cache also has what modules for it are built with."""
        return headers.place(self.release).exists()


def series_of(release: str) -> str:
    """Return the series of a release; InvalidArgument if it does not look like one."""
    match = _RELEASE.fullmatch(release)
    if match is None:
        raise InvalidArgument(f"{release!r} is not a release such as 6.12.117+deb12-amd64")
    return match[1]


def installed() -> list[Kernel]:
    """Return the kernels in the cache, oldest release first."""
    places = (cache.directory() / "kernels").glob("*")
    kernels = [Kernel(path.name, path) for path in places if _RELEASE.fullmatch(path.name)]
    return sorted(kernels, key=lambda kernel: _order(kernel.release))


def find(name: str) -> Kernel:
    """Return the kernel of a release, or the newest one of a series.

    Raises InvalidArgument for a name that is neither, EnvironmentMissing if it was not fetched.
    """
    kernels = [kernel for kernel in installed() if name in (kernel.series, kernel.release)]
    if kernels:
        return kernels[-1]
    if name not in SERIES:
        known = sorted({*SERIES, *(kernel.release for kernel in installed())})
        raise InvalidArgument(f"no kernel {name!r}", hint=f"known: {', '.join(known)}")
    raise EnvironmentMissing(
        f"kernel {name} is not in {cache.directory()}", hint=f"run vhostctl lab fetch {name}"
    )


def fetch(
    *series: str, with_headers: bool = False, progress: Progress = lambda _what, _percent: None
) -> list[Kernel]:
    """Bring the newest kernel of each series into the cache and return them in that order.

    `with_headers` also brings what modules for it are built with (`headers`). What is there
    already is not downloaded again. Raises InvalidArgument for an unknown
    series, EnvironmentMissing for a missing program, an archive that cannot be reached or
    does not carry the series, and a full disk; the cache is as it was then.
    """
    for name in series:
        if name not in SERIES:
            raise InvalidArgument(
                f"no kernel series {name!r}", hint=f"known series: {', '.join(SERIES)}"
            )
    process.program("dpkg-deb", "apt install dpkg")
    process.program("depmod", "apt install kmod")
    archives = apt.machine_archives()
    fetched = {}
    with cache.scratch() as directory:
        by_suite = sorted(set(series), key=lambda name: SERIES[name][0])
        for suite, names in groupby(by_suite, key=lambda name: SERIES[name][0]):
            source = PrivateApt(directory / suite, archives.sources(suite))
            source.update(progress)
            for name in names:
                kernel = _fetch_one(source, name, directory / name, progress)
                if with_headers:
                    _fetch_headers(source, kernel.release, directory / f"{name}-headers", progress)
                fetched[name] = kernel
    return [fetched[name] for name in series]


def resolve(package: Callable[[str], Package], series: str) -> list[Package]:
    """Return the packages that make up the newest kernel of a series, the image first.

    `package` looks one up by name. EnvironmentMissing if the suite has moved on to another series.
    """
    suite, meta = SERIES[series]
    names = [name for name in package(meta).depends if _PART.fullmatch(name)]
    packages = apt.closure(package, names, _PART)
    if not packages:
        raise EnvironmentMissing(f"{meta} in {suite} depends on no kernel")
    carried = series_of(_release(packages))
    if carried != series:
        raise EnvironmentMissing(
            f"{suite} now carries kernel {carried}, not {series}",
            hint="kernels that were fetched before stay usable, see vhostctl lab list",
        )
    return packages


def settle(tree: Path, release: str) -> None:
    """Make an unpacked kernel bootable: module directory below lib, depmod's files, no ballast."""
    shutil.rmtree(tree / "usr" / "share", ignore_errors=True)
    (tree / "boot" / f"System.map-{release}").unlink(missing_ok=True)
    if not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")
    kernel = Kernel(release, tree)
    if not kernel.image.exists() or not kernel.modules.is_dir():
        raise EnvironmentMissing(f"the packages of kernel {release} hold no image or no modules")
    _run([process.program("depmod", "apt install kmod"), "-b", str(tree), release])


def _fetch_one(source: PrivateApt, series: str, directory: Path, progress: Progress) -> Kernel:
    packages = resolve(source.package, series)
    release = _release(packages)
    kernel = Kernel(release, cache.directory() / "kernels" / release)
    if not kernel.tree.exists():
        tree = _unpack(source, packages, f"kernel {release}", directory, progress)
        settle(tree, release)
        _place(tree, kernel.tree)
    return kernel


def _fetch_headers(source: PrivateApt, release: str, directory: Path, progress: Progress) -> None:
    place = headers.place(release)
    if not place.exists():
        packages = headers.resolve(source.package, release)
        tree = _unpack(source, packages, f"headers of {release}", directory, progress)
        headers.settle(tree, release)
        _place(tree, place)


def _unpack(
    source: PrivateApt, packages: Sequence[Package], what: str, directory: Path, progress: Progress
) -> Path:
    """Download packages into a directory, and return the tree below it that they unpack to."""
    tree = directory / "tree"
    tree.mkdir(parents=True)
    # The packages and the tree exist at the same time.
    needed = sum(package.size + package.unpacked for package in packages)
    if shutil.disk_usage(tree).free < needed:
        raise cache.no_space(cache.directory(), f"{needed >> 20} MiB for {what}")
    for number, archive in enumerate(source.download(packages, directory, progress)):
        progress(f"unpack {what}", 100 * number / len(packages))
        _run(["dpkg-deb", "-x", str(archive), str(tree)])
        archive.unlink()
    progress(f"unpack {what}", 100)
    return tree


def _place(tree: Path, place: Path) -> None:
    """Put a tree where it belongs; whoever fetched the same meanwhile was as good."""
    place.parent.mkdir(exist_ok=True)
    try:
        tree.rename(place)
    except OSError:
        if not place.exists():
            raise


def _release(packages: Iterable[Package]) -> str:
    """Return the release that the parts of a kernel are named after."""
    return next(match[1] for one in packages if (match := _PART.fullmatch(one.name)))


def _order(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)]


def _run(argv: Sequence[str]) -> None:
    try:
        process.output_of(argv)
    except subprocess.CalledProcessError as error:
        if "No space left" in error.stderr:
            raise cache.no_space(cache.directory()) from error
        reason = (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]
        raise VhostctlError(f"{Path(argv[0]).name}: {reason}") from error
