"""`vhostctl selftest`: wire a tap to vhost-net and prove it with traffic."""

from __future__ import annotations

import dataclasses

import click

from vhostctl.cli import options, render
from vhostctl.control.features import Policy
from vhostctl.control.wiring import SessionConfig
from vhostctl.jobs import selftest as job
from vhostctl.jobs.hosttraffic import Tally
from vhostctl.jobs.selftest import SelftestReport


@click.command()
@options.device_or_engine
@options.queues
@options.queue_size
@options.features
@options.busyloop
@options.worker
@click.option("--translate", is_flag=True, help="I/O virtual addresses, and an IOTLB behind them.")
@click.option(
    "--frames", default=3000, show_default=True, metavar="N", help="Datagrams to send each way."
)
@options.as_json
@click.option("--dry-run", is_flag=True, help="Print the steps of bring-up and take none.")
def selftest(
    device: str,
    queues: int,
    queue_size: int,
    policy: Policy,
    busyloop: int,
    worker: str | None,
    translate: bool,
    frames: int,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Wire a tap to vhost-net in a namespace of its own and send real traffic through it.

    The host's network stack resolves the guest, which is a driver in this process, pings
    it and exchanges UDP datagrams of every size with it. Needs root, and leaves nothing.
    Exit status 4: a frame was lost or changed.

    \b
    Example: vhostctl selftest --queues 4 --no-event-idx
    """
    config = SessionConfig(
        device=device,
        queues=queues,
        queue_size=queue_size,
        policy=policy,
        busyloop=busyloop,
        worker=worker,
        translating=translate,
    )
    if dry_run:
        _print_plan(config, as_json)
        return
    with render.progress("datagrams", 2 * frames) as progress:
        report = job.selftest(config, frames, progress)
    if as_json:
        data = dataclasses.asdict(report) | tallies_data(report.to_guest, report.to_host)
        render.json_document("selftest/1", data)
    else:
        render.table(_rows(report), title=f"{report.device} on Linux {report.kernel}")
    job.raise_for(report)


def _print_plan(config: SessionConfig, as_json: bool) -> None:
    steps = job.plan(config)
    if as_json:
        data = [{"name": s.name, "target": s.target, "detail": s.detail} for s in steps]
        render.json_document("plan/1", {"steps": data})
    else:
        for number, step in enumerate(steps, 1):
            click.echo(f"{number:3} {step}")


def _rows(report: SelftestReport) -> list[tuple[str, str]]:
    rows = [
        ("negotiated", ", ".join(report.features)),
        ("queues", f"{report.queues} x {report.queue_size}, header {report.header_size} bytes"),
        ("bring-up", f"{report.bring_up_seconds * 1000:.0f} ms"),
        ("resolved", f"{report.arp} ARP, {report.neighbour} neighbour solicitations answered"),
        ("pings", f"{report.pings} answered"),
    ]
    rows += tallies_rows(report.to_guest, report.to_host)
    rows.append(("kicks, calls", f"{report.kicks}, {report.calls}"))
    rows.append(("result", "; ".join(report.problems) or "every frame accounted for"))
    return rows


def tallies_data(to_guest: Tally, to_host: Tally) -> dict[str, object]:
    """Return both tallies as a document has them."""
    named = {"to_guest": to_guest, "to_host": to_host}
    return {name: dataclasses.asdict(t) | {"lost": t.lost} for name, t in named.items()}


def tallies_rows(to_guest: Tally, to_host: Tally) -> list[tuple[str, str]]:
    """Return both tallies as a table has them."""
    named = {"host to guest": to_guest, "guest to host": to_host}
    return [
        (name, f"{t.frames} datagrams, {t.bytes} bytes, {t.lost} lost, {t.changed} changed")
        for name, t in named.items()
    ]
