"""Output: one table or one JSON document, on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click


def json_document(schema: str, data: dict[str, Any]) -> None:
    """Print `data` as one JSON object that names its schema, such as vhostctl.probe/1."""
    click.echo(json.dumps({"schema": f"vhostctl.{schema}", **data}, indent=2))


@contextmanager
def progress(label: str, total: float) -> Iterator[Callable[[float], None]]:
    """Show a bar on stderr, if that is a terminal; yields what advances it."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda step: bar.update(task, advance=step)


def table(rows: Iterable[Sequence[str]], title: str = "", header: Sequence[str] = ()) -> None:
    """Print rows of cells; without `header` the first column is a label."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title or None, title_justify="left", show_header=bool(header), box=None)
    for number, name in enumerate(header or ("", "")):
        grid.add_column(name, style="bold" if number == 0 and not header else None, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    Console(highlight=False).print(grid)


def rate(count: float, unit: str) -> str:
    """Return a count a second with a decimal prefix, such as ``1.25 MB/s``."""
    prefixes = ["", "k", "M", "G"]
    while abs(count) >= 1000 and len(prefixes) > 1:
        count /= 1000
        prefixes.pop(0)
    return f"{count:.3g} {prefixes[0]}{unit}/s"
