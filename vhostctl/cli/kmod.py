"""`vhostctl kmod`: the out-of-tree module."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import click

from vhostctl.cli import options, render
from vhostctl.errors import InvalidArgument
from vhostctl.kmod import NAME, NODE, building, loading
from vhostctl.kmod.status import status as ask
from vhostctl.lab import headers, kernels


@click.group()
def kmod() -> None:
    """Build, load and unload vhost_net_mirror, a vhost-net beside the kernel's own.

    \b
    Example: vhostctl kmod build && vhostctl kmod load && vhostctl kmod status
    """


@kmod.command()
@click.option("-k", "--kernel", metavar="NAME", help="A fetched series such as 6.12, or a release.")
@click.option(
    "--kernel-dir", type=click.Path(path_type=Path), help="The headers of any other kernel."
)
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Default: the cache."
)
@click.option("--strict", is_flag=True, help="Ask for more warnings (W=1); one is a failure.")
@click.option("--sparse", is_flag=True, help="Have sparse read it too; implies --strict.")
def build(
    kernel: str | None, kernel_dir: Path | None, output: Path | None, strict: bool, sparse: bool
) -> None:
    """Build the module, for the running kernel unless told otherwise, and print its path.

    \b
    Example: vhostctl lab fetch --headers 6.12 && vhostctl kmod build -k 6.12
    """
    if kernel is not None and kernel_dir is not None:
        raise InvalidArgument("both --kernel and --kernel-dir name a kernel", hint="leave one out")
    if kernel is not None:
        kernel_dir = headers.find(kernels.find(kernel).release)
    done = building.build(
        kernel_dir or building.running_kernel_dir(),
        output,
        strict=strict,
        sparse=sparse,
        log=lambda line: click.echo(line, err=True),
    )
    click.echo(done.path)


@kmod.command()
@click.argument("words", nargs=-1, metavar="[MODULE.ko] [PARAMETER=VALUE]...")
def load(words: Sequence[str]) -> None:
    """Load the module and what it depends on.

    \b
    Example: vhostctl kmod load

    Without a file it is the one that `kmod build` made for the running kernel, else the installed
    one.
    """
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise InvalidArgument(f"{files[1]}: one module at a time, and PARAMETER=VALUE")
    values = dict(word.split("=", 1) for word in words if "=" in word)
    loading.load(Path(files[0]) if files else None, values)


@kmod.command()
def unload() -> None:
    """Take the module out of the running kernel.

    \b
    Example: vhostctl kmod unload
    """
    loading.unload()


@kmod.command()
@options.as_json
def status(as_json: bool) -> None:
    """Show whether the module is loaded, how, who uses it, and which were built.

    \b
    Example: vhostctl kmod status --json | jq .loaded
    """
    state = ask()
    modules = building.built()
    if as_json:
        found = [
            {"release": one.release, "path": str(one.path), "srcversion": one.srcversion}
            for one in modules
        ]
        data = dataclasses.asdict(state)
        more = {"built": found, "sources": str(building.sources())}
        render.json_document("kmod.status/1", data | more)
        return
    rows = [("loaded", "yes" if state.loaded else "no"), ("node", NODE if state.node else "none")]
    if state.loaded:
        rows += [
            ("version", f"{state.version} {state.srcversion}".strip() or "none"),
            ("references", str(state.references)),
            ("used by", "\n".join([*state.holders, *(f"{p} ({n})" for p, n in state.users)])),
            ("taint", state.taint),
            *((f"{NAME}.{name}", value) for name, value in state.parameters.items()),
        ]
    rows.append(("kernel tainted", str(state.tainted)))
    rows.append(("built", "\n".join(str(one.path) for one in modules) or "none"))
    rows.append(("sources", str(building.sources())))
    render.table(rows, title=f"{NAME} on Linux {state.kernel}")
