"""``scaletrain replay``: one step of one rank once more, in this process."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from scaletrain.errors import UserError

if TYPE_CHECKING:
    from scaletrain.training.replay import Replay

_MOST_SAMPLES = 20  # that are printed


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--step", type=click.IntRange(min=0), required=True, help="Steps done before it.")
@click.option("--rank", type=click.IntRange(min=0), required=True, help="The worker's number.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the batch to this file, as safetensors.",
)
def command(run_dir: Path, step: int, rank: int, out: Path | None) -> None:
    """Run one step of one rank of the run in RUN_DIR once more, in this process.

    It reads the same samples under the same seeds, and prints the loss, the norm of each
    parameter's gradient, and the first layer that is not finite. Weights come from the newest
    checkpoint up to the step. The run's files stay as they are.

    \b
    Examples:
      scaletrain replay runs/digits-20261129-091500 --step 812 --rank 1
      scaletrain replay runs/digits-20261129-091500 --step 812 --rank 1 --out batch.safetensors
    """
    from scaletrain import config as configuration
    from scaletrain.run.layout import RunDir
    from scaletrain.training import replay

    path = RunDir(run_dir).config
    if not path.exists():
        raise UserError(f"{run_dir}: holds no run (allowed: the --run-dir of scaletrain train)")
    config = configuration.load(path)
    replayed = replay.replay(config, run_dir, step, rank)
    for line in _lines(replayed, step, rank):
        click.echo(line)
    if config.sync_batchnorm:
        click.echo("sync_batchnorm: statistics are of this rank's samples alone")
    if out is not None:
        facts = {"run": config.name, "step": step, "rank": rank}
        replay.save_batches(replayed, out, facts)
        click.echo(f"the batch is in {out}")


def _lines(replayed: "Replay", step: int, rank: int) -> list[str]:
    """Return the lines that a person reads."""
    numbers = [str(number) for number in replayed.samples]
    more = f" and {len(numbers) - _MOST_SAMPLES} more" if len(numbers) > _MOST_SAMPLES else ""
    lines = [
        f"step {step}, rank {rank}: training samples {', '.join(numbers[:_MOST_SAMPLES])}{more}",
        f"weights: {_weights(replayed.weights_of, step)}",
    ]
    for name, loss in replayed.losses.items():
        of_update = f" of {name}" if len(replayed.losses) > 1 else ""
        shown = f"loss{of_update}: {loss.mean:g} (the mean over {loss.count:g} of this rank)"
        for part, mean in loss.parts().items():
            shown += f", {part} {mean:g}"
        lines.append(shown)
    norms = replayed.gradients
    lines.append(f"gradient: norm {math.hypot(*norms.values()):g}, by parameter:")
    width = max(map(len, norms), default=0)
    for name, norm in norms.items():
        lines.append(f"  {name:{width}}  {norm:g}")
    lines += replayed.origins or ["every layer's output is finite"]
    return lines


def _weights(weights_of: int | None, step: int) -> str:
    if weights_of is None:
        return "those of the beginning: there is no checkpoint up to this step"
    if weights_of == step:
        return f"of the checkpoint after {step} steps, as in the run"
    return f"of the checkpoint after {weights_of} steps, not those that the run had at step {step}"
