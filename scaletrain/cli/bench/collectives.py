"""How fast collectives are: our algorithms beside gloo, MPI and others, and their bounds."""

import dataclasses
import functools
import re
import time
from pathlib import Path
from typing import Any

import click
import pydantic

from scaletrain import config, plugins
from scaletrain.cli.options import names
from scaletrain.errors import UserError, unknown
from scaletrain.run.atomic import write_json
from scaletrain.run.environment import environment
from scaletrain.scaling.measure.collectives import BUS_FACTORS, Outcome, Request, run
from scaletrain.scaling.show import results as pages
from scaletrain.scaling.show.collectives import Header, table

PEERS = {
    "cpu": ("gloo", "mpi", "horovod", "deepspeed"),
    "cuda": ("gloo", "nccl"),
}  # by where the tensors are


def _sizes(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(_size_bytes(word) for word in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{text!r}: expected sizes with commas, such as 4K,1M,25M"
        ) from None


def _size_bytes(word: str) -> int:
    """Return a size in bytes: 4096, 4K, 4KB or 4KiB. All prefixes are powers of 1,024.

    Raises:
        ValueError: it is not a size.
    """
    binary = re.sub(r"([KMG])i?B?$", r"\1iB", word)
    return int(pydantic.TypeAdapter(pydantic.ByteSize).validate_python(binary))


@click.command("collectives")
@click.option(
    "--workers", default="2", show_default=True, callback=names, help="Worker counts, such as 2,4."
)
@click.option(
    "--collectives",
    default="all_reduce",
    show_default=True,
    callback=names,
    help=f"all, or some of {', '.join(BUS_FACTORS)}.",
)
@click.option(
    "--algorithms",
    default="auto",
    show_default=True,
    callback=names,
    help="auto, native, all, or names (`scaletrain list`), with options if need be: pipelined_tree:segments=8.",
)
@click.option(
    "--transports", default="auto", show_default=True, callback=names, help="auto, or names."
)
@click.option(
    "--sizes",
    default="4K,64K,1M,25M",
    show_default=True,
    callback=_sizes,
    help="Message sizes in bytes; float32.",
)
@click.option(
    "--peers",
    default="gloo",
    show_default=True,
    callback=names,
    help="gloo, mpi, horovod, deepspeed; gloo, nccl with --device cuda; empty for none.",
)
@click.option(
    "--neighbours",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Processes that compute meanwhile, as beside other jobs.",
)
@click.option(
    "--repeats",
    default=3,
    show_default=True,
    type=click.IntRange(1),
    help="Rounds over all contenders, interleaved.",
)
@click.option(
    "--seconds",
    default=0.3,
    show_default=True,
    type=float,
    help="Time for one contender at one size in one round.",
)
@click.option(
    "--bind/--no-bind",
    default=False,
    show_default=True,
    help="Keep each worker (Horovod's excepted: it has a second thread) on a core of its own, where the cores suffice.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    type=click.Choice(["cpu", "cuda"]),
    help="Where the tensors are. Workers take the GPUs in turn, and share them where there are fewer.",
)
@click.option(
    "--bandwidth",
    help="Emulate hosts: one a worker, links of this rate (such as 1Gbit), by `rehearsal`.",
)
@click.option(
    "--mpi-python",
    multiple=True,
    help="A Python with mpi4py whose folder has its mpirun; repeatable [default: this one].",
)
@click.option("--horovod-python", help="A Python with Horovod [default: this one].")
@click.option(
    "--deepspeed-sources",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The unpacked sources of DeepSpeed's package, from which its operator is built.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write NAME.json, and the table beside it as NAME.md.",
)
def command(**values: Any) -> None:
    """Measure collectives side by side.

    Every contender runs in each of --repeats rounds, so that a slow minute of the machine hits all
    alike. Times are the slowest rank's.

    \b
    Examples:
      scaletrain bench collectives --workers 2,4 --algorithms ring,tree --sizes 4K,25M
      scaletrain bench collectives --collectives all --neighbours 2
    """
    out: Path | None = values.pop("out")
    request = Request(**values)
    counts = _check(request)
    header = _header(request)
    outcome = run(request, counts, functools.partial(click.echo, err=True))
    header.devices = outcome.devices
    if not outcome.rows:
        raise UserError(f"nothing could be measured: {'; '.join(dict.fromkeys(outcome.notes))}")
    text = table(outcome.rows, header, outcome.notes)
    click.echo(text)
    if out:
        _write(out, outcome, header, text)
    wrong = sorted({row.contender for row in outcome.rows if row.wrong})
    if wrong:
        raise UserError(f"wrong sums: {', '.join(wrong)} (the last column counts the elements)")


def _check(request: Request) -> list[int]:
    """Return the worker counts.

    Raises:
        UserError: an option names something that there is not, or options exclude each other.
    """
    for collective in request.all_collectives:
        if collective not in BUS_FACTORS:
            raise unknown("--collectives", collective, ("all", *BUS_FACTORS))
    for peer in request.peers:
        if peer not in PEERS[request.device]:
            raise unknown(f"--peers with --device {request.device}", peer, PEERS[request.device])
    for name in request.all_algorithms:
        if name not in ("auto", "native"):
            config.plugin_spec("collective", name, "--algorithms", also=("auto", "native", "all"))
    transports = ["auto", *plugins.names("transport")]
    for name in request.transports:
        if name not in transports:
            raise unknown("--transports", name, transports)
    counts = [int(word) for word in request.workers if word.isdigit() and int(word) > 0]
    if len(counts) < len(request.workers):
        raise UserError(
            f"--workers: {','.join(request.workers)!r}: expected numbers with commas, such as 2,4"
        )
    if request.bandwidth and {"mpi", "horovod", "deepspeed"} & {*request.peers}:
        raise UserError(
            "--peers: mpi, horovod and deepspeed are measured on one host only (leave out --bandwidth)"
        )
    if "deepspeed" in request.peers and request.deepspeed_sources is None:
        raise UserError(
            "--peers: deepspeed is built from sources: unpack what `pip download --no-deps"
            " --no-binary :all: deepspeed` brings, and name the folder with --deepspeed-sources"
        )
    return counts


def _header(request: Request) -> Header:
    network = "one host"
    if request.bandwidth:
        network = f"EMULATED: one host a worker in network namespaces, {request.bandwidth} links"
    return Header(
        machine=environment(),
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        repeats=request.repeats,
        network=network,
        neighbours=request.neighbours,
        bound=request.bind,
        devices=[],
    )


def _write(out: Path, outcome: Outcome, header: Header, text: str) -> None:
    """Write the figures as JSON, and the page beside them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "header": header.to_json(),
        "notes": outcome.notes,
        "rows": [dataclasses.asdict(row) for row in outcome.rows],
    }
    write_json(out.with_suffix(".json"), content)
    pages.write(out.with_suffix(".md"), text)  # what people wrote on that page stays
