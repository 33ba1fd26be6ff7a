"""``scaletrain draw``: prove an allreduce algorithm, and show it round by round."""

from pathlib import Path

import click


@click.command()
@click.argument("collective")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Number of ranks.",
)
@click.option(
    "--svg",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the picture to this file as well.",
)
def command(collective: str, workers: int, svg: Path | None) -> None:
    """Prove a collective and show it round by round.

    \b
    Examples:
      scaletrain draw tree --workers 8
      scaletrain draw pipelined_tree:segments=3 --svg tree.svg
    """
    from scaletrain.collectives import drawing, schedule
    from scaletrain.config import plugin_spec

    name, options = plugin_spec("collective", collective, "collective")
    proved = schedule.proved(name, workers, **options)
    click.echo(drawing.as_text(proved))
    if svg:
        svg.write_text(drawing.as_svg(proved, f"{name}, {workers} ranks"), encoding="utf-8")
    # Beyond that size `proved` returns the schedule without a proof. On standard error, so that the
    # drawing can be sent to a file.
    if workers <= schedule.PROVED:
        click.echo(
            "proved: every rank ends with the same sum, each contribution in it once,"
            " and nobody waits for ever",
            err=True,
        )
