"""``scaletrain worker``: be one worker, for launchers that are called by hand."""

import sys
from pathlib import Path

import click


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
def command(run_dir: Path, resume: bool) -> None:
    """Be one worker of the run in RUN_DIR, as mpirun or srun starts it.

    Which of the workers it is, it learns from the launcher's variables.

    \b
    Example:
      mpirun -n 2 scaletrain worker runs/digits
    """
    # Imported here, since it imports torch, which `--help` does not need.
    from scaletrain.programs.worker import main

    sys.exit(main(run_dir, resume))
