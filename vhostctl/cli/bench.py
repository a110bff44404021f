"""`vhostctl bench`: frames a second and what each costs."""

from __future__ import annotations

import dataclasses

import click

from vhostctl.cli import options, render
from vhostctl.control.features import Policy
from vhostctl.control.wiring import SessionConfig
from vhostctl.jobs import bench as job
from vhostctl.jobs.bench import BenchResult


@click.command()
@options.device
@options.queue_size
@options.features
@click.option(
    "--direction", type=click.Choice(["tx", "rx", "both"]), default="both", show_default=True
)
@click.option("--frame", default=64, show_default=True, metavar="BYTES", help="Frame length.")
@click.option("--seconds", default=2.0, show_default=True, metavar="N", help="Time a direction.")
@options.as_json
def bench(
    device: str,
    queue_size: int,
    policy: Policy,
    direction: str,
    frame: int,
    seconds: float,
    as_json: bool,
) -> None:
    """Run the driver at full speed through the device and count what each frame costs.

    tx sends out of the guest, rx receives what the kernel's packet generator puts into the
    tap (it needs the module pktgen; its own time is left out). CPU time is in nanoseconds a
    frame; under `vhostctl lab run --icount` these are instructions.

    \b
    Example: vhostctl bench --direction tx --frame 1500 --json
    """
    config = SessionConfig(
        device=device,
        queue_size=queue_size,
        policy=policy,
    )
    directions = ["rx", "tx"] if direction == "both" else [direction]  # rx may lack its sender
    with render.progress("bench", seconds * len(directions)) as progress:
        results = [job.bench(config, name, frame, seconds, progress) for name in directions]
    if as_json:
        data = [dataclasses.asdict(result) | _costs(result) for result in results]
        render.json_document("bench/1", {"frame": frame, "results": data})
    else:
        header = (
            "",
            "frames",
            "bytes",
            "driver",
            "worker",
            "all",
            "frames a kick",
            "frames a call",
        )
        render.table(
            [_row(result) for result in results],
            title=f"{frame}-byte frames through {device}; CPU ns a frame",
            header=header,
        )


def _costs(result: BenchResult) -> dict[str, float]:
    return {
        "driver_ns_per_frame": result.per_frame(result.driver_ns),
        "worker_ns_per_frame": result.per_frame(result.worker_ns),
        "all_ns_per_frame": result.per_frame(result.all_ns),
    }


def _row(result: BenchResult) -> tuple[str, ...]:
    return (
        result.direction,
        render.rate(result.frames / result.seconds, ""),
        render.rate(result.bytes / result.seconds, "B"),
        *(f"{cost:.0f}" for cost in _costs(result).values()),
        f"{result.frames / max(result.kicks, 1):.1f}",
        f"{result.frames / max(result.calls, 1):.1f}",
    )
