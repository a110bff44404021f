"""`vhostctl probe`: what a device offers."""

from __future__ import annotations

import dataclasses

import click

from vhostctl.cli import options, render
from vhostctl.control.probe import Report
from vhostctl.control.probe import probe as ask


@click.command()
@options.device
@options.as_json
def probe(device: str, as_json: bool) -> None:
    """Show what a vhost-net device offers: features, requests, limits, worker.

    \b
    Example: vhostctl probe --json | jq .feature_names
    """
    report = ask(device)
    if as_json:
        data = dataclasses.asdict(report)
        render.json_document("probe/1", data | {"feature_names": report.feature_names})
    else:
        render.table(_rows(report), title=f"{report.device} on Linux {report.kernel}")


def _rows(report: Report) -> list[tuple[str, str]]:
    unanswered = [name for name, answered in report.requests.items() if not answered]
    rows = [
        ("features", f"{report.features:#x}\n" + "\n".join(report.feature_names)),
        ("backend features", f"{report.backend_features:#x}"),
        ("memory regions", f"at most {report.max_mem_regions}"),
        ("worker", report.worker),
        ("requests answered", f"{len(report.requests) - len(unanswered)}"),
        ("not answered", "\n".join(unanswered) or "none"),
    ]
    for module, parameters in report.modules.items():
        rows += [(f"{module}.{name}", value) for name, value in parameters.items()]
    return rows
