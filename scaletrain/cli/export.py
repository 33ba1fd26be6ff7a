"""``scaletrain export``: write a run's weights as a plain PyTorch state dict."""

from pathlib import Path

import click

from scaletrain.errors import UserError


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--out",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The new file: NAME.safetensors or NAME.pt.",
)
@click.option("--step", type=int, help="Of the checkpoint after this step [default: the newest].")
@click.option("--best", is_flag=True, help="Of the checkpoint that checkpoint.best has kept.")
@click.option("--ema", is_flag=True, help="The averages of the callback ema, not the weights.")
@click.option("--compress", is_flag=True, help="Zeros and equal weights take few bits.")
def command(
    run_dir: Path, out: Path, step: int | None, best: bool, ema: bool, compress: bool
) -> None:
    """Write the weights of the run in RUN_DIR as a plain PyTorch state dict.

    Reading the file needs no scaletrain: model.load_state_dict takes the result of
    safetensors.torch.load_file or torch.load(weights_only=True). A compressed file is read by
    scaletrain.compression.load(path).

    \b
    Examples:
      scaletrain export runs/digits --out model.safetensors
      scaletrain export runs/digits --out model.pt --best --ema
    """
    if step is not None and best:
        raise UserError("--best: is not allowed beside --step (remove one of them)")
    from scaletrain.training import weights

    click.echo(weights.export(run_dir, out, step=step, best=best, ema=ema, compress=compress))
