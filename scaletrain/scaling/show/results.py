"""Pages of results, and the measurements under them: made piece by piece, each kept, so that a stopped command goes on.

What a command generates in a page is replaced each time; what people wrote around it stays.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from scaletrain.launching.job import Program
from scaletrain.run.atomic import write_json
from scaletrain.run.environment import environment

BEGIN, END = "<!-- generated: replaced by the next run -->", "<!-- end of what is generated -->"


def write(page: Path, generated: str) -> None:
    """Put ``generated`` (Markdown) between the two marks of a page. A page without them gets them, at its end.

    What stands before and after the marks is a person's and is never touched.
    """
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        before, after = old and old.rstrip("\n") + "\n\n", "\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{before}{BEGIN}\n{generated.strip()}\n{END}{after}", encoding="utf-8")


def measured_on(header: dict[str, Any]) -> str:
    """Hardware, versions and commit in a sentence, from ``run.environment``; the load average where it was noted."""
    versions = ", ".join(
        f"{name} {version}" for name, version in header["versions"].items() if version
    )
    load = f"; load average {header['load_average']:.1f}" if "load_average" in header else ""
    return (
        f"{header['processor']}, {header['cores']} cores, {header['memory_bytes'] / 2**30:.0f} GiB; {header['os']};"
        f" Python {header['python']}; {versions}; commit {header['commit']}{load}."
    )


def options(name: str, pages: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options ``data``, ``out`` and ``no_measure`` of a command that measures in pieces below runs/``name`` and writes ``pages``."""

    def folder(
        flag: str, default: Path, text: str
    ) -> Callable[[Callable[..., None]], Callable[..., None]]:
        kind = click.Path(path_type=Path, file_okay=False)
        return click.option(flag, type=kind, default=default, show_default=True, help=text)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        command = click.option(
            "--no-measure", is_flag=True, help="Measure nothing: use what --data holds."
        )(command)
        command = folder("--out", Path("benchmarks/results"), f"Where {pages} go.")(command)
        data = "Where measurements lie; what is there is not measured again."
        return folder("--data", Path("runs") / name, data)(command)

    return decorate


def noted(header: Path) -> dict[str, Any]:
    """What ``run.environment`` and the load average were when measuring began, kept in the file ``header``; and every commit at which
    it went on."""
    now = environment() | {"load_average": os.getloadavg()[1]}
    first = json.loads(header.read_text(encoding="utf-8")) if header.exists() else now
    commits = dict.fromkeys([*str(first["commit"]).split(", "), str(now["commit"])])
    found = first | {"commit": ", ".join(commits)}
    write_json(header, found)
    return found


def once(made: Path, *argv: str | Path, header: Path | None = None) -> None:
    """Run ``scaletrain argv``, which writes the file ``made``, unless it is there. One that fails or is stopped leaves no file; it is told.

    ``header``: where it is noted on what this was measured.
    """
    if made.exists():
        return
    if header:
        noted(header)
    click.echo(f"measuring {made}", err=True)
    command = [*Program.COMMAND_LINE.command(*argv)]
    whole = False
    try:
        whole = subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    finally:
        if not whole:  # a part would be taken for the whole at the next start
            made.unlink(missing_ok=True)
            click.echo(f"failed: {made} is left out", err=True)
