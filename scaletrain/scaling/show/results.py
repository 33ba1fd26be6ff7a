"""Pages of results and the measurements under them.

Measurements are taken piece by piece and each piece is kept, so that a command that was stopped
goes on. A command replaces its own part of a page each time; the text around it stays.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import click

from scaletrain.launching.job import Program
from scaletrain.run.atomic import write_json, write_text
from scaletrain.run.environment import Environment, environment

BEGIN, END = "<!-- generated: replaced by the next run -->", "<!-- end of what is generated -->"

Command = Callable[..., None]


def write(page: Path, generated: str) -> None:
    """Put generated Markdown between the two marks of a page.

    A page without the marks gets them at its end. The text before and after the marks is a
    person's and stays as it is.
    """
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    # One mark alone bounds nothing: the page stays whole, and both marks go to its end.
    if not (begin and end):
        before = old.rstrip("\n") + "\n\n" if old else ""
        after = "\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, f"{before}{BEGIN}\n{generated.strip()}\n{END}{after}")


def measured_on(header: Environment) -> str:
    """Return hardware, versions and commit in a sentence.

    Args:
        header: the facts of ``run.environment``, with the load average if it was noted.
    """
    versions = [f"{name} {version}" for name, version in header["versions"].items() if version]
    load = ""
    if "load_average" in header:
        load = f"; load average {header['load_average']:.1f}"
    return (
        f"{header['processor']}, {header['cores']} cores,"
        f" {header['memory_bytes'] / 2**30:.0f} GiB; {header['os']};"
        f" Python {header['python']}; {', '.join(versions)}; commit {header['commit']}{load}."
    )


def options(name: str, pages: str) -> Callable[[Command], Command]:
    """Return a decorator that gives a command ``--data``, ``--out`` and ``--no-measure``.

    Args:
        name: of the directory below runs/ in which the pieces lie.
        pages: the files that the command writes, in words.
    """
    folder = click.Path(path_type=Path, file_okay=False)
    data = click.option(
        "--data",
        type=folder,
        default=Path("runs") / name,
        show_default=True,
        help="Where measurements lie; what is there is not measured again.",
    )
    out = click.option(
        "--out",
        type=folder,
        default=Path("benchmarks/results"),
        show_default=True,
        help=f"Where {pages} go.",
    )
    no_measure = click.option(
        "--no-measure", is_flag=True, help="Measure nothing: use what --data holds."
    )

    def decorate(command: Command) -> Command:
        return data(out(no_measure(command)))

    return decorate


def noted(header: Path) -> Environment:
    """Return the environment in which measuring began, and keep it in a file.

    Args:
        header: the file. If it exists, its facts and its load average stay, and the commit at
            which measuring goes on is added to its commits.
    """
    now = environment()
    now["load_average"] = os.getloadavg()[1]
    facts = now
    if header.exists():
        facts = json.loads(header.read_text(encoding="utf-8"))
    commits = dict.fromkeys([*str(facts["commit"]).split(", "), str(now["commit"])])
    facts["commit"] = ", ".join(commits)
    write_json(header, facts)
    return facts


def once(path: Path, *argv: str | Path, header: Path | None = None) -> None:
    """Run the command that writes a file, unless the file exists.

    A command that fails or is stopped leaves no file, and a line says so.

    Args:
        path: the file that the command writes.
        argv: the arguments after ``scaletrain``.
        header: where to note the environment of the measurement (see ``noted``).
    """
    if path.exists():
        return
    # Before measuring, so that the load average is not the measurement's own.
    if header:
        noted(header)
    click.echo(f"measuring {path}", err=True)
    command = Program.COMMAND_LINE.command(*argv)
    succeeded = False
    try:
        succeeded = subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    finally:
        if not succeeded:  # the next start would take a part for the whole
            path.unlink(missing_ok=True)
            click.echo(f"failed: {path} is left out", err=True)
