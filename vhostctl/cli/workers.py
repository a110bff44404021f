"""`vhostctl workers`: which task serves which device of which process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import click

from vhostctl.cli import options, render
from vhostctl.errors import StateError
from vhostctl.host.worker import Descriptor
from vhostctl.jobs import workers as job
from vhostctl.jobs.workers import Interval, Serving, Survey

_BUSY = 5  # where its column goes


@click.command()
@click.argument("tids", nargs=-1, type=int, metavar="[TID]...")
@click.option("--pid", "pids", multiple=True, type=int, metavar="PID", help="Those of a process.")
@click.option("--all", "everyone", is_flag=True, help="All, which a change must say.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Measure CPU time for so long.",
)
@click.option("--pin", metavar="CPUS", help="Let them run on these only, such as 0-3,8.")
@click.option("--cgroup", metavar="PATH", help="Move them into this cgroup (v2).")
@options.as_json
def workers(
    tids: tuple[int, ...],
    pids: tuple[int, ...],
    everyone: bool,
    interval: float | None,
    pin: str | None,
    cgroup: str | None,
    as_json: bool,
) -> None:
    """Show the tasks that serve vhost devices, of any process, and move them.

    Without TID and --pid it shows all. A change lasts as long as the worker: the next
    VHOST_SET_OWNER starts another one.

    \b
    Example: vhostctl workers --pid "$(pidof qemu-system-x86_64)" --pin 2-3
    """
    if everyone and (tids or pids):
        raise click.UsageError("--all stands for every worker: leave out TID and --pid.")
    changes = pin is not None or cgroup is not None
    if changes and not (everyone or tids or pids):
        raise click.UsageError("Say which: TID, --pid or --all.")
    cpus = job.parse_cpus(pin) if pin is not None else set()
    found = job.select(job.survey(), pids, tids)
    if changes:
        if not found.workers:
            raise StateError("no vhost worker to move", hint="`vhostctl workers` lists them")
        job.place(found.workers, cpus, cgroup)
        found = job.select(job.survey(), pids, tids)
    measured = job.measure(found.workers, interval) if interval is not None else None
    if as_json:
        render.json_document("workers/1", _document(found, measured))
    else:
        _show(found, measured)


def _document(found: Survey, measured: Interval | None) -> dict[str, Any]:
    return {
        "interval_ns": measured.ns if measured else None,
        "workers": [
            {
                "tid": serving.tid,
                "kind": serving.task.worker.kind,
                "name": serving.task.name,
                "owner": {"pid": serving.owner.pid, "command": serving.owner.command}
                if serving.owner
                else None,
                "candidates": _descriptors(serving.candidates),
                "certain": serving.certain,
                "likely": serving.likely.fd if serving.likely else None,
                "cpu_ns": serving.task.cpu_ns,
                "interval_cpu_ns": measured.cpu_ns.get(serving.tid) if measured else None,
                "cpus": serving.task.cpus,
                "policy": serving.task.policy,
                "priority": serving.task.priority,
                "nice": serving.task.nice,
                "cgroup": serving.task.cgroup,
            }
            for serving in found.workers
        ],
        "unserved": [
            {
                "pid": process.pid,
                "command": process.command,
                "descriptors": _descriptors(process.descriptors),
            }
            for process in found.unserved
        ],
    }


def _descriptors(held: Sequence[Descriptor] | None) -> list[dict[str, Any]] | None:
    return None if held is None else [dataclasses.asdict(descriptor) for descriptor in held]


def _show(found: Survey, measured: Interval | None) -> None:
    if not found.workers:
        click.echo("no vhost worker")
    else:
        header = ["TID", "KIND", "OWNER", "SERVES", "CPU", "CPUS", "POLICY", "CGROUP"]
        if measured:
            header.insert(_BUSY, "BUSY")
        render.table([_row(serving, measured) for serving in found.workers], header=header)
    for process in found.unserved:
        click.echo(
            f"{process.pid} ({process.command}) has {_several(process.descriptors or ())}, "
            "and not as many workers"
        )


def _row(serving: Serving, measured: Interval | None) -> list[str]:
    task, owner = serving.task, serving.owner
    row = [
        str(serving.tid),
        task.worker.kind,
        f"{owner.pid} {owner.command}" if owner else f"{task.name}, gone",
        _serves(serving),
        f"{task.cpu_ns / 1e9:.2f} s",
        task.cpus,
        " ".join([task.policy, *_rank(serving)]),
        task.cgroup or "",
    ]
    if measured:
        took = measured.cpu_ns.get(serving.tid)
        row.insert(_BUSY, "ended" if took is None else f"{took / measured.ns:.1%}")
    return row


def _rank(serving: Serving) -> list[str]:
    """Return what stands behind the policy: a priority, or a nice value that is not 0."""
    if serving.task.priority:
        return [str(serving.task.priority)]
    return [f"nice {serving.task.nice}"] if serving.task.nice else []


def _serves(serving: Serving) -> str:
    if serving.task.worker.kind == "engine":
        return "engine"
    if serving.candidates is None:
        return "not ours to see" if serving.owner else "unknown"
    if not serving.candidates:
        return "closed there"
    if serving.likely is None:
        return f"perhaps {_several(serving.candidates)}"
    likely = f"fd {serving.likely.fd} {serving.likely.path}"
    return likely if serving.certain else f"likely {likely}"


def _several(descriptors: Sequence[Descriptor]) -> str:
    """Return descriptors by file, such as ``fd 7, 9 /dev/vhost-net``."""
    by_path: dict[str, list[str]] = {}
    for descriptor in descriptors:
        by_path.setdefault(descriptor.path, []).append(str(descriptor.fd))
    return " or ".join(f"fd {', '.join(fds)} {path}" for path, fds in by_path.items())
