"""Package metadata and the native modules; tool settings live in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Copies the module's sources beside the package that builds it; a checkout has them once."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            others = shutil.ignore_patterns("user", "*.o", "*.ko", "*.mod", "*.mod.c", ".*")
            place = Path(self.build_lib, "vhostctl", "kmod", "src")
            shutil.copytree("kmod", place, ignore=others, dirs_exist_ok=True)


setup(
    name="vhostctl",
    version="0.1.0",
    description="QEMU's role for the Linux kernel's vhost-net, in Python and C",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="GPL-2.0-or-later",
    python_requires=">=3.11",
    packages=find_packages(include=["vhostctl", "vhostctl.*"]),
    package_data={
        "vhostctl": ["py.typed"],
        "vhostctl.conformance": ["*.toml"],
        "vhostctl.engine": ["*.cdef", "*.pyi"],
        "vhostctl.guest": ["*.cdef", "*.pyi", "src/*.c", "src/*.h"],
        "vhostctl.lab": ["*.sh"],
    },
    cmdclass={"build_py": BuildPy},
    cffi_modules=["vhostctl/guest/build.py:ffi", "vhostctl/engine/build.py:ffi"],
    install_requires=[
        "cffi>=1.16",
        "click>=8.1",
        "ioctl-opt>=1.3",
        "msgspec>=0.18",
        "pyroute2>=0.9",
        "rich>=13",
    ],
    extras_require={
        "lab": ["virtme-ng>=1.40"],
        "test": [
            "hypothesis>=6",
            "mypy>=1.11",
            "pytest>=9",
            "pytest-xdist>=3",
            "qemu.qmp>=0.0.6",
            "ruff>=0.8",
        ],
    },
    entry_points={"console_scripts": ["vhostctl=vhostctl.cli.main:main"]},
)
