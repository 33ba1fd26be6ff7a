"""The page of recipes: claim, rule, our figure with its interval, met or missed, and time."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from scaletrain.recipes.running import Point, Result
from scaletrain.run.atomic import write_json, write_text
from scaletrain.run.environment import environment
from scaletrain.scaling.show import plots, results
from scaletrain.scaling.show.text import number
from scaletrain.units import duration, plural

# The figures of each variant that the page shows beside those of the claims, where a run has them.
SHOWN = ("test_error", "test_loss", "final_loss", "model_bytes", "wall_s")


def publish(result: Result, folder: Path) -> None:
    """Add a recipe's result to the page, ``recipes.md``, and to ``recipes.json`` beside it.

    The results of other recipes stay.

    Args:
        result: of one recipe.
        folder: where the page lies.
    """
    file = folder / "recipes.json"
    entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    key = result.recipe.name
    if result.request.scale != "small":
        key = f"{key} ({result.request.scale})"
    curves = {variant: points for variant, points in result.curves.items() if len(points) > 1}
    drawing = ""
    if curves:
        drawing = f"recipes/{key.replace(' ', '-').strip(')').replace('(', '')}.svg"
        path = folder / drawing
        path.parent.mkdir(parents=True, exist_ok=True)
        image = plots.image(_curves(curves, result.curve_figure))
        write_text(path, image.decode("utf-8"))
    entries[key] = _entry(result, drawing)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, dict(sorted(entries.items())))
    results.write(folder / "recipes.md", markdown(dict(sorted(entries.items()))))


def _entry(result: Result, drawing: str) -> dict[str, Any]:
    """Return what the page needs of a result, for its file."""
    recipe, request = result.recipe, result.request
    return {
        "title": recipe.title,
        "source": recipe.source,
        "setting": recipe.setting,
        "scale": request.scale,
        "workers": request.workers,
        "seeds": result.seeds,
        "settings": dict(request.settings),
        "verdicts": [verdict.to_json() for verdict in result.verdicts],
        "figures": list(dict.fromkeys(verdict.claim.figure for verdict in result.verdicts)),
        "means": {variant: dict(figures) for variant, figures in result.means.items()},
        "diverged": list(result.diverged),
        "seconds": result.seconds,
        "busy": result.busy,
        "drawing": drawing,
        "environment": environment(),
    }


def markdown(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page's generated part.

    Args:
        entries: of each recipe, as ``recipes.json`` holds them.
    """
    lines = [
        "| recipe | claim | rule | measured | seeds | verdict | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in entries.items():
        for index, verdict in enumerate(entry["verdicts"]):
            # Name, seeds and time stand once a recipe.
            is_first = index == 0
            seeds = str(entry["seeds"]) if is_first else ""
            time = duration(entry["seconds"]) if is_first else ""
            link = f"[{name}](#{_anchor(name)})" if is_first else ""
            outcome = "met" if verdict["met"] else "MISSED"
            lines.append(
                f"| {link} | {verdict['says']} | `{verdict['rule']}` | {_measured(verdict)} |"
                f" {seeds} | {outcome} | {time} |"
            )
    for name, entry in entries.items():
        lines += ["", *_section(name, entry)]
    return "\n".join(lines)


def _section(name: str, entry: Mapping[str, Any]) -> list[str]:
    """Return the section of one recipe."""
    settings = "".join(f" --set {key}={value}" for key, value in entry["settings"].items())
    if entry["scale"] != "small":
        settings = f" --set scale={entry['scale']}{settings}"
    command = f"scaletrain recipes run {name.split()[0]} --workers {entry['workers']}{settings}"
    lines = [
        f"## {name}",
        "",
        f"**{entry['title']}.** {' '.join(entry['setting'].split())}",
        "",
        f"Source: {entry['source']} Command: `{command}`;"
        f" {plural(entry['seeds'], 'seed')}, {duration(entry['seconds'])}.",
        "",
        *_means(entry["means"], entry.get("figures", [])),  # older results do not name them
    ]
    for verdict in entry["verdicts"]:
        if verdict["reason"]:
            lines += ["", f"Not judged: {verdict['says']}: {verdict['reason']}"]
    # Entries of earlier versions lack it.
    for line in entry.get("diverged", []):
        lines += ["", f"Diverged, so wrong about every sample (`test_error` 1): {line}"]
    if entry["drawing"]:
        lines += ["", f"![How the variants learn]({entry['drawing']})"]
    lines += ["", results.measured_on(entry["environment"])]
    if entry["busy"]:
        lines += ["", entry["busy"]]
    return lines


def _means(means: Mapping[str, Mapping[str, float]], claimed: Sequence[str]) -> list[str]:
    """Return a table of the variants' figures, means over seeds.

    Args:
        means: of each variant.
        claimed: the figures that claims are about.
    """
    shown = []
    for figure in dict.fromkeys([*claimed, *SHOWN]):
        if any(figure in figures for figures in means.values()):
            shown.append(figure)
    lines = [f"| variant | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|"]
    for variant, figures in means.items():
        cells = []
        for figure in shown:
            is_whole = figure == "model_bytes"
            cells.append(number(figures.get(figure), ",.0f" if is_whole else ".4g"))
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def _measured(verdict: Mapping[str, Any]) -> str:
    value = verdict["value"]
    if value is None:
        return "not judged"
    return number(value["value"], ".3f", value["ci95"])


def _anchor(heading: str) -> str:
    """Return the anchor of a heading, as Markdown's pages make them."""
    kept = "".join(mark for mark in heading.lower() if mark.isalnum() or mark in " -_")
    return kept.replace(" ", "-")


def _curves(curves: Mapping[str, Sequence[Point]], figure: str) -> plots.Drawing:
    """Draw each variant's figure against its steps."""

    def draw(axes: Axes) -> None:
        for index, (variant, points) in enumerate(curves.items()):
            axes.plot(
                [point.step for point in points],
                [point.value for point in points],
                color=plots.SERIES[index % len(plots.SERIES)],
                label=variant,
            )
        axes.set_xlabel("step")
        axes.set_ylabel(figure.replace("_", " "))
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8.5)

    return draw


def text(result: Result) -> list[str]:
    """Return the verdicts as lines for a terminal."""
    lines = []
    for verdict in result.verdicts:
        entry = verdict.to_json()
        outcome = "met" if verdict.is_met else "MISSED"
        lines.append(f"{outcome}: {entry['says']} ({entry['rule']}; measured {_measured(entry)})")
        if verdict.reason:
            lines.append(f"  {verdict.reason}")
    return lines
