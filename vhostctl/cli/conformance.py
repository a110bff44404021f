"""`vhostctl conformance`: is a device what the in-tree vhost-net is?"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from vhostctl.cli import options, render
from vhostctl.conformance import run, wanted
from vhostctl.conformance.case import all_cases, select
from vhostctl.conformance.report import Report, Result, compare, load
from vhostctl.errors import CheckFailed
from vhostctl.host.module import kernel_release


@click.group(invoke_without_command=True)
@options.device
@click.option("-k", "word", default="", metavar="WORD", help="Only cases with WORD in their name.")
@click.option("--json", "json_file", metavar="FILE", help="Write a JSON document; - is stdout.")
@click.option("--junit", "junit_file", metavar="FILE", help="Write a JUnit document.")
@click.pass_context
def conformance(
    context: click.Context, device: str, word: str, json_file: str | None, junit_file: str | None
) -> None:
    """Check a device against the rules that the in-tree vhost-net follows.

    Every case runs in a process and network namespace of its own. Needs root. Exit status
    4: a case failed, or a difference that is listed as wanted did not happen.

    \b
    Example: vhostctl conformance --json in-tree.json -k owner
    """
    if context.invoked_subcommand is not None:
        return
    cases, listed = all_cases(), wanted.read()
    wanted.check_titles(listed, (case.title for case in cases))
    chosen = select(cases, word)
    subject = run.examine(device)
    results = list(_shown(run.run(chosen, subject, listed), len(chosen)))
    found = dataclasses.asdict(subject.flags)
    report = Report(device, subject.kind, kernel_release(), found, results)
    if junit_file is not None:
        Path(junit_file).write_text(report.junit(), encoding="utf-8")
    if json_file is not None:
        with click.open_file(json_file, "w", encoding="utf-8") as file:
            file.write(json.dumps(report.document(), indent=2) + "\n")
    if json_file != "-":
        _print(report)
    if report.failed:
        raise CheckFailed(f"{device}: {len(report.failed)} cases did not pass")


def _shown(results: Iterable[Result], total: int) -> Iterator[Result]:
    """Pass results on and count them on stderr, if that is a terminal.

    Not rich's bar: it refreshes from a thread, and the cases are forked.
    """
    for number, result in enumerate(results, 1):
        if sys.stderr.isatty():
            end = "\n" if number == total else ""
            click.echo(f"\r{number} of {total} cases{end}", err=True, nl=False)
        yield result


def _print(report: Report) -> None:
    rows = [
        (r.status, r.group, "\n  ".join([r.name, *r.details]), f"{r.seconds:.1f} s")
        for r in report.results
    ]
    title = f"{report.device} ({report.kind}) on Linux {report.kernel}"
    render.table(rows, title, header=("status", "group", "rule", "time"))
    click.echo(report.summary)


@conformance.command()
@click.argument("first", metavar="A.json")
@click.argument("second", metavar="B.json")
def diff(first: str, second: str) -> None:
    """Print what differs between two runs: a status, or an observation of a case.

    Exit status 4: something does.

    \b
    Example: vhostctl conformance diff in-tree.json mirror.json
    """
    found = list(compare(load(first), load(second)))
    for title, rows in itertools.groupby(found, key=lambda row: row[0]):
        click.echo(title)
        for _, what, one, other in rows:
            click.echo(f"  {what}: {one} | {other}")
    if found:
        raise CheckFailed(f"{first} and {second} differ in {len(found)} places")
