"""`vhostctl doctor`: what keeps vhost-net from working, and what to do about it."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence

import click

from vhostctl.cli import options, render
from vhostctl.doctor import examine as job
from vhostctl.doctor.examine import Repair, Report
from vhostctl.doctor.findings import Finding
from vhostctl.doctor.system import System
from vhostctl.errors import CheckFailed, EnvironmentMissing, InvalidArgument
from vhostctl.host.vhost import ENGINE
from vhostctl.lab import process


@click.command()
@click.argument("codes", nargs=-1, metavar="[CODE]...")
@options.node
@click.option("--fix", is_flag=True, help="Load the modules that are missing, then look again.")
@options.as_json
def doctor(codes: Sequence[str], device: str, fix: bool, as_json: bool) -> None:
    """Look for what keeps vhost-net from working here, and say what to do about it.

    \b
    Example: vhostctl doctor --json | jq -r '.findings[].code'

    With CODEs only those findings count. docs/doctor.md lists them all. The device is opened and
    owned for a moment, which loads its module if opening the node does that.
    Exit status 4: there is a finding of the severity error.
    """
    if device == ENGINE:
        raise InvalidArgument("the engine is looked at in any case", hint="--device names a node")
    system = System(device)
    report = job.examine(system, codes)
    repairs: tuple[Repair, ...] = ()
    if fix:
        repairs = job.repair(report, system, _run)
        report = job.examine(System(device), codes) if repairs else report
    if as_json:
        render.json_document("doctor/1", _document(report, repairs))
    else:
        _show(report, repairs, fix=fix)
    if report.errors:
        names = ", ".join(sorted({one.fault.code for one in report.errors}))
        raise CheckFailed(f"{device} cannot be used: {names}")


def _run(command: Sequence[str]) -> None:
    try:
        process.output_of([process.program(command[0], "apt install kmod"), *command[1:]])
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["it failed"])[-1]
        raise EnvironmentMissing(said) from error


def _document(report: Report, repairs: Sequence[Repair]) -> dict[str, object]:
    return {
        "device": report.device,
        "kernel": report.kernel,
        "findings": [_finding(one) for one in report.findings],
        "repairs": [dataclasses.asdict(one) for one in repairs],
        "means": [dataclasses.asdict(one) for one in report.means],
    }


def _finding(finding: Finding) -> dict[str, object]:
    return {
        "code": finding.fault.code,
        "severity": str(finding.fault.severity),
        "meaning": finding.fault.meaning,
        "evidence": finding.evidence,
        "remedy": finding.remedy,
        "fixable": bool(finding.fix),
    }


def _show(report: Report, repairs: Sequence[Repair], *, fix: bool) -> None:
    for one in repairs:
        click.echo(f"{one.command}: {one.failure or 'done'}")
    if fix and not repairs:
        click.echo("Nothing that --fix may change.")
    for finding in report.findings:
        fault = finding.fault
        click.echo(f"{fault.severity}: {fault.code}: {fault.meaning}")
        click.echo(f"  found   {finding.evidence}")
        click.echo(f"  remedy  {finding.remedy}{'  (--fix does it)' if finding.fix else ''}")
    if not report.findings:
        click.echo("Nothing is wrong.")
    click.echo(f"What works here, on Linux {report.kernel}:")
    width = max(len(one.name) for one in report.means)
    for means in report.means:
        click.echo(f"  {'yes' if means.works else 'no':3}  {means.name:{width}}  {means.command}")
