"""`vhostctl migrate`: move a running wiring from device to device under traffic."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from vhostctl.cli import options, render
from vhostctl.cli.selftest import tallies_data, tallies_rows
from vhostctl.control.features import Policy
from vhostctl.control.wiring import SessionConfig
from vhostctl.host.vhost import DEFAULT_PATH, ENGINE
from vhostctl.jobs import migrate as job
from vhostctl.jobs.migrate import MigrateReport


@click.command()
@click.argument("devices", nargs=-1, metavar="[DEVICE...]")
@options.queues
@options.queue_size
@options.features
@click.option(
    "--frames",
    default=1000,
    show_default=True,
    metavar="N",
    help="Datagrams each way before and after each move; they go on during one.",
)
@options.as_json
def migrate(
    devices: tuple[str, ...],
    queues: int,
    queue_size: int,
    policy: Policy,
    frames: int,
    as_json: bool,
) -> None:
    """Move a running wiring over the DEVICEs, in the middle of numbered traffic.

    A tap is wired to the first DEVICE (a node, or engine). Then the rings are suspended and
    resumed on the next one by another process, which is handed a JSON document and the
    descriptors of memory, tap and eventfds; and so on. The guest notices nothing. Without
    DEVICE: from the kernel's vhost-net to the engine and back. Needs root, and leaves nothing.
    Exit status 4: a frame was lost, doubled or changed.

    \b
    Example: vhostctl migrate /dev/vhost-net engine /dev/vhost-net
    """
    config = SessionConfig(queues=queues, queue_size=queue_size, policy=policy)
    kernel = DEFAULT_PATH if Path(DEFAULT_PATH).exists() else ENGINE
    way = devices or (kernel, ENGINE, kernel)
    with render.progress("datagrams", 2 * frames * (len(way) + 1)) as progress:
        report = job.migrate(config, way, frames, progress)
    if as_json:
        data = dataclasses.asdict(report) | tallies_data(report.to_guest, report.to_host)
        render.json_document("migrate/1", data)
    else:
        render.table(_rows(report), title=f"{len(report.hops)} moves, {queues} x {queue_size}")
    job.raise_for(report)


def _rows(report: MigrateReport) -> list[tuple[str, str]]:
    rows = [("negotiated", ", ".join(report.features))]
    rows += [
        (
            f"{hop.source} to {hop.target}",
            f"down {hop.down_ms:.1f} ms, rings at {', '.join(map(str, hop.bases))}",
        )
        for hop in report.hops
    ]
    rows += tallies_rows(report.to_guest, report.to_host)
    rows.append(("result", "; ".join(report.problems) or "every frame accounted for"))
    return rows
