"""From the run directories of a sweep to ``report.json``: a header, a row a cell, what is lost and why. Trains nothing."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaletrain import plugins
from scaletrain.errors import UserError
from scaletrain.run.environment import environment
from scaletrain.run.layout import RunDir
from scaletrain.scaling.emulated import bytes_moved
from scaletrain.scaling.explain import headline, limiter
from scaletrain.scaling.measure import machine, servers, sweep
from scaletrain.scaling.measure.intervals import Mean, mean, percentiles, ratio
from scaletrain.scaling.measure.run import PARTS, Run, read_run
from scaletrain.scaling.predict.fit import (
    Fit,
    alike_but_for_exchange,
    fit_report,
    predictions,
    strategy_of,
)
from scaletrain.scaling.predict.step_time import step_s as step

VERSION = 1
PERCENTS = (10, 50, 90, 95)
UNSYNCHRONISED = (
    "parameter_server:async",
    "parameter_server:bounded",
    "parameter_server:local_sgd",
    "none",
)

Measured = dict[
    sweep.Cell, tuple[list[Run], list[str]]
]  # a cell's finished repeats, and why others failed


def of_sweep(*outs: Path) -> dict[str, Any]:
    """The report of a sweep's directory, as far as it was measured. Several directories make one report: sweeps of the same mode and
    threads that cover different cells.

    Raises:
        UserError: not a sweep's directory.
    """
    measured: Measured = {}
    headers, planned, missing, others = [], 0, 0, []
    for out in outs:
        try:
            made = sweep.Sweep.from_json(
                json.loads((out / "sweep.json").read_text(encoding="utf-8"))
            )
        except OSError as error:
            raise UserError(f"{out}: no sweep (sweep.json: {error.strerror})") from None
        for cell in made.cells():
            runs, failures = [], []
            for repeat in range(made.repeats):
                directory = sweep.run_dir(out, cell, repeat)
                if RunDir(directory).has_finished():
                    runs.append(read_run(directory))
                    if (directory / sweep.MACHINE).exists():
                        others.append(
                            json.loads((directory / sweep.MACHINE).read_text(encoding="utf-8"))[
                                "used_by_others"
                            ]
                        )
                elif (directory / "failed.json").exists():
                    failures.append(
                        json.loads((directory / "failed.json").read_text(encoding="utf-8"))[
                            "reason"
                        ]
                    )
            measured[cell] = (runs, failures)
            planned, missing = (
                planned + made.repeats,
                missing + made.repeats - len(runs) - len(failures),
            )
        headers.append(made.header())
        with contextlib.suppress(
            OSError
        ):  # rendering again must not claim to have measured here and now
            headers[-1] = json.loads((out / "header.json").read_text(encoding="utf-8"))
    header = headers[0] | {
        "config": {stem: text for one in headers for stem, text in one["config"].items()}
    }
    header |= {"runs_planned": planned, "runs_missing": missing}
    if others:
        header |= {"used_by_others": round(float(np.mean(others)), 3), "busy": machine.told(others)}
    return _report(measured, header, strong=made.mode == "strong")


def of_runs(directories: Sequence[Path]) -> dict[str, Any]:
    """The report of single runs (``scaletrain train``), repeats of a cell where they are alike."""
    measured: Measured = {}
    modes = set()
    for directory in directories:
        run = read_run(directory)
        summary = run.summary
        mode = summary.get("batch_mode", "strong")
        modes.add(mode)
        batch = (
            int(summary["batch_size"]) // (run.workers if mode == "weak" else 1)
            if "batch_size" in summary
            else 0
        )
        cell = sweep.Cell(
            str(summary.get("name", "run")), str(summary["exchange"]), run.workers, batch
        )
        measured.setdefault(cell, ([], []))[0].append(run)
    if len(modes) > 1:
        raise UserError(
            "runs of strong and of weak scaling do not belong in one report (allowed: runs of one batch_mode)"
        )
    mode = modes.pop() if modes else "strong"
    header = environment() | {
        "mode": mode, "repeats": max(len(runs) for runs, _ in measured.values()),
        "note": "rendered from single runs; host and versions are those of the machine that rendered",
        "config": {d.name: _text(d / "config.yaml") for d in directories},
    }  # fmt: skip
    return _report(measured, header, strong=mode == "strong")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _report(measured: Measured, header: dict[str, Any], *, strong: bool) -> dict[str, Any]:
    cells = [cell for cell in measured if not cell.reference]
    rows = [_row(cell, measured, strong) for cell in cells]
    losses = [
        loss
        for cell, row in zip(cells, rows, strict=True)
        for loss in _losses(cell, row, measured, strong)
    ]
    curves = [[(run.losses, run.ended_s) for run in measured[cell][0]] for cell in cells]
    learns = all(run.learns for runs, _ in measured.values() for run in runs)
    loss_reached = servers.compare(rows, curves) if learns else None
    emulated = sorted({text for row in rows for text in [row["emulation"]] if text})
    references = [_row(cell, measured, strong) for cell in measured if cell.reference]
    devices = sorted(
        {name for runs, _ in measured.values() for run in runs for name, _, _ in run.devices}
    )
    found = {
        "baseline": _baseline_text(rows),
        "emulated": bool(emulated),
        "emulation": emulated,
        "devices": devices,
    }
    # What ran, not what renders: cells that were measured at several commits say so.
    commits = sorted({run.commit for runs, _ in measured.values() for run in runs if run.commit})
    if commits:
        found["commit"] = ", ".join(commits)
    report = {
        "version": VERSION,
        "header": header | found,
        "summary": "",
        "rows": rows,
        "losses": losses,
        "references": references,
        "batches": _batches([*rows, *references]),
        "predictions": [],
        "loss_reached": loss_reached,
    }
    fitted = _predictions(report)
    _name_alternatives(rows, losses, fitted)
    report["summary"] = headline.of(report)
    return report


def _key(cell: sweep.Cell) -> tuple[Any, ...]:
    return cell.config, cell.batch_size, cell.variant


def _baseline(cell: sweep.Cell, measured: Mapping[sweep.Cell, Any]) -> sweep.Cell | None:
    """What speed-up is measured against, the same for every exchange, so that the faster one has the higher speed-up: one worker with
    ``none`` (plain training; the short reference where no cell is that), else the fastest one worker.

    Only where nobody ran one worker: the fewest there are, whose speed-up counts as ideal; None where all cells have equally many,
    and there is nothing to be faster than.
    """
    alike = [c for c in measured if _key(c) == _key(cell) and measured[c][0]]
    plain = [c for c in alike if c.exchange == "none" and c.workers == 1]
    if plain:
        return min(plain, key=lambda c: c.reference)
    cells = [c for c in alike if not c.reference]
    counts = {c.workers for c in cells}
    if not counts or (min(counts) > 1 and len(counts) == 1):
        return None
    fewest = [c for c in cells if c.workers == min(counts)]
    return max(
        fewest,
        key=lambda c: (
            c.exchange == "none",
            np.mean([run.samples_per_s for run in measured[c][0]]),
        ),
    )


def _crowd(runs: Sequence[Run]) -> str:
    """What the workers had less of than each one needs; empty: nothing."""
    causes = ["more threads than cores"] * any(run.crowded for run in runs)
    causes += ["workers that share a GPU"] * any(
        max(run.devices.values(), default=0) > 1 for run in runs
    )
    return " and ".join(causes)


def _row(cell: sweep.Cell, measured: Measured, strong: bool) -> dict[str, Any]:
    runs, failures = measured[cell]
    row: dict[str, Any] = {
        "config": cell.config,
        "exchange": cell.exchange,
        "workers": cell.workers,
        "batch_size": cell.batch_size * (1 if strong else cell.workers),
        "variant": dict(cell.variant),
        "samples_per_s": None, "samples_per_s_ci95": None, "speedup": None, "speedup_ci95": None, "efficiency": None,
        "step_s_min": None, **{f"step_s_p{p}": None for p in PERCENTS}, "step_s_mean": None, "step_s_ci95": None,
        "exposed_comm_s": None, "exposed_comm_s_ci95": None, "wait_in_backward_s": None,
        **dict.fromkeys(PARTS), "bytes_sent": None, "bytes_sent_is": None, "gradient_bytes": None, "final_loss": None, "test_accuracy": None,
        "target_step": None, "target_s": None, "target_s_ci95": None, "target_runs": 0, "emulation": None, "servers": None, "time_to_loss_s": None,
        "oversubscribed": _crowd(runs),
        "repeats": len(runs), "failures": failures, "baseline": None, "runs": [],
    }  # fmt: skip
    if not runs:
        return row
    rate, step = mean([run.samples_per_s for run in runs]), mean([run.step_s for run in runs])
    row |= {
        "samples_per_s": rate.value,
        "samples_per_s_ci95": rate.ci95,
        "step_s_mean": step.value,
        "step_s_ci95": step.ci95,
    }
    steps = np.concatenate([run.steps.ravel() for run in runs]).tolist()
    row["step_s_min"] = min(steps)
    row |= {f"step_s_p{percent}": value for percent, value in percentiles(steps, PERCENTS).items()}
    row |= {part: float(np.mean([run.part_s(part) for run in runs])) for part in PARTS}
    summed_up = ("final_loss", "test_accuracy", "target_step")
    told = {key: [run.summary.get(key) for run in runs if run.learns] for key in summed_up}
    told |= {
        "bytes_sent": [run.sent_bytes for run in runs],
        "wait_in_backward_s": [run.waited_s for run in runs],
    }
    for key, of_runs in told.items():
        values = [value for value in of_runs if value is not None]
        row[key] = float(np.mean(values)) if values else None
    row["gradient_bytes"] = next((run.gradient_bytes for run in runs if run.gradient_bytes), None)
    row["emulation"] = next((text for run in runs if (text := _emulation(run.summary))), None)
    row["servers"] = next((run.servers for run in runs if run.servers), None)
    row["runs"] = [
        {
            "samples_per_s": run.samples_per_s,
            "step_s": run.step_s,
            "wall_s": run.summary.get("wall_s"),
        }
        for run in runs
    ]
    row["bytes_sent_is"] = "counted" if row["bytes_sent"] is not None else None
    scheduled = strategy_of(cell.exchange)
    if (
        row["bytes_sent"] is None
        and row["gradient_bytes"]
        and scheduled not in (None, "server", "two_level")
    ):
        row["bytes_sent"] = (
            bytes_moved(scheduled, cell.workers, row["gradient_bytes"]) / cell.workers
        )
        row["bytes_sent_is"] = "the schedule's"
    reached = [run.summary["target_s"] for run in runs if run.summary.get("target_s") is not None]
    if reached:
        to_target = mean(reached)
        row |= {
            "target_s": to_target.value,
            "target_s_ci95": to_target.ci95,
            "target_runs": len(reached),
        }
    base = _baseline(cell, measured)
    if base is not None and not cell.reference:
        speedup = _speedup(runs, measured[base][0], base.workers)
        row |= {
            "speedup": speedup.value,
            "speedup_ci95": None if cell == base else speedup.ci95,
            "efficiency": speedup.value / cell.workers,
        }
        # Without a run of one worker, the fewest there are count as ideal; that is an assumption, and is told.
        row["baseline"] = (
            f"1 worker, {base.exchange}{' (short runs)' * base.reference}" if base.workers == 1
            else f"1 worker ({base.workers} workers, {base.exchange}, taken as ideal)"
        )  # fmt: skip
    alone = _find(measured, cell, exchange="none")
    if cell.exchange == "none":
        row["exposed_comm_s"] = 0.0
    elif alone:
        exposed = mean([a.step_s - b.step_s for a, b in zip(runs, alone, strict=False)])
        row |= {"exposed_comm_s": exposed.value, "exposed_comm_s_ci95": exposed.ci95}
    return row


def _speedup(runs: Sequence[Run], base: Sequence[Run], workers: int) -> Mean:
    """Samples per second over the baseline's; ``workers``: the baseline's, whose own speed-up counts as ideal."""
    over = ratio([run.samples_per_s for run in runs], [run.samples_per_s for run in base])
    return Mean(over.value * workers, None if over.ci95 is None else over.ci95 * workers, over.n)


def _emulation(summary: Mapping[str, Any]) -> str | None:
    """What was emulated in a run, in words; None for real training on real hosts."""
    if not (summary.get("emulated") or summary.get("launcher") == "rehearsal"):
        return None
    parts = summary.get("emulation") or {}
    network, compute = parts.get("network"), parts.get("compute")
    told = []
    if network:
        network = network.get("cluster", network)
        told.append(
            f"hosts are network namespaces of one machine, links of {network.get('bandwidth') or 'any bandwidth'}"
        )
        if network.get("latency") not in (None, 0, "0"):
            told.append(f"{network['latency']} latency")
    if compute:
        told.append(
            f"accelerators that wait {compute['step_s']:g} s a step and {compute['sample_s']:g} s a sample"
        )
    return ", ".join(told) or "hosts and links of one machine"


def _find(measured: Measured, cell: sweep.Cell, **changes: Any) -> list[Run]:
    """Finished repeats of another cell; the full-length one before the short reference."""
    for reference in (False, True):
        runs = measured.get(cell._replace(reference=reference, **changes), ([], []))[0]
        if runs:
            return runs
    return []


def _losses(
    cell: sweep.Cell, row: Mapping[str, Any], measured: Measured, strong: bool
) -> Iterable[dict[str, Any]]:
    """The split of lost time of a cell of several workers, when the references were measured."""
    real = measured[cell][0]
    if cell.workers < 2 or not real:
        return
    alone = _find(measured, cell, exchange="none")
    base = _baseline(cell, measured)
    single = measured[base][0] if base and base.workers == 1 else []
    share = -(-cell.batch_size // cell.workers)
    variant = tuple(pair for pair in cell.variant if pair[0] != "batch_size")
    small = single
    if strong:
        small = _find(
            measured, cell, exchange="none", workers=1, batch_size=share, variant=variant
        ) or _find(
            measured,
            cell,
            exchange="none",
            workers=1,
            batch_size=share,
            variant=(*variant, ("batch_size", share)),
        )
    if not (alone and single and small):
        return
    steps = [_step(runs) for runs in (real, alone, small, single)]
    waits = not cell.exchange.startswith(UNSYNCHRONISED)
    # The loss by throughput: samples over time, each rank by its own clock; the causes come from the steps' parts.
    batch = cell.batch_size if strong else cell.batch_size * cell.workers
    real_s = float(np.mean([batch / run.samples_per_s for run in real]))
    ideal = float(np.mean([cell.batch_size / run.samples_per_s for run in single])) / (
        cell.workers if strong else 1
    )

    def split(*steps: limiter.Step, loss_s: float | None = None) -> list[limiter.Cause]:
        return limiter.split(
            *steps, workers=cell.workers, strong=strong, waits=waits, loss_s=loss_s
        )

    causes = split(*steps, loss_s=real_s - ideal)
    each = [
        dict(split(*map(_step, zip(four, strict=True))))
        for four in zip(real, alone, small, single, strict=False)
    ]
    largest, second, *_ = sorted(causes, key=lambda cause: -cause.seconds)
    lead = mean([one[largest.name] - one[second.name] for one in each])
    efficiency, ci95 = row["efficiency"], row["speedup_ci95"] and row["speedup_ci95"] / cell.workers
    repeats = min(len(runs) for runs in (real, alone, small, single))
    told = limiter.untold(causes, efficiency, ci95, lead.ci95) is None
    yield {
        "config": cell.config, "exchange": cell.exchange, "workers": cell.workers, "variant": dict(cell.variant), "repeats": repeats,
        "step_s": real_s, "ideal_s": ideal, "loss_s": real_s - ideal, "efficiency": efficiency, "efficiency_ci95": ci95,
        "causes": {cause.name: cause.seconds for cause in causes}, "lead_ci95": lead.ci95,
        "limiter": worst.name if told and (worst := limiter.limiter(causes)) else None,
        "sentence": limiter.sentence(causes, efficiency, repeats=repeats, ci95=ci95, lead_ci95=lead.ci95),
    }  # fmt: skip


def _step(runs: Sequence[Run]) -> limiter.Step:
    def average(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    return limiter.Step(
        step_s=average(run.step_s for run in runs),
        slowest_s=average(run.slowest_s for run in runs),
        input_s=average(run.part_s("input_s") for run in runs),
        compute_s=average(run.part_s("forward_s") + run.part_s("backward_s") for run in runs),
        update_s=average(run.part_s("update_s") for run in runs),
        waited_s=None
        if any(run.waited_s is None for run in runs)
        else average(run.waited_s or 0.0 for run in runs),
    )


def _batches(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How long one worker computes on a sample at each batch size that was measured alone: what a small share of a batch costs."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["runs"] and row["workers"] == 1 and row["exchange"] == "none":
            variant = {key: value for key, value in row["variant"].items() if key != "batch_size"}
            sample_s = (row["forward_s"] + row["backward_s"]) / row["batch_size"]
            key = row["config"], str(variant), row["batch_size"]
            found.setdefault(
                key,
                {
                    "config": row["config"],
                    "variant": variant,
                    "batch_size": row["batch_size"],
                    "sample_s": sample_s,
                },
            )
    by_size = sorted(
        found.values(),
        key=lambda point: (point["config"], str(point["variant"]), point["batch_size"]),
    )
    for point in by_size:
        alike = [
            p for p in by_size if (p["config"], p["variant"]) == (point["config"], point["variant"])
        ]
        point["efficiency"] = (
            max(alike, key=lambda p: p["batch_size"])["sample_s"] / point["sample_s"]
        )
    return by_size


def _name_alternatives(
    rows: Sequence[dict[str, Any]], losses: Sequence[dict[str, Any]], fitted: Fit | None
) -> None:
    """Where communication limits, name the better exchange: one that was measured, else the collective that is predicted to be best."""
    for loss in losses:
        if loss["limiter"] != "communication":
            continue
        alike = [
            r
            for r in rows
            if all(r[k] == loss[k] for k in ("config", "workers", "variant")) and r["efficiency"]
        ]
        own = next((r for r in alike if r["exchange"] == loss["exchange"]), None)
        others = [r for r in alike if r["exchange"] not in (loss["exchange"], "none")]
        best = max(others, key=lambda r: r["efficiency"], default=None)
        better = None
        # Noise is no advice: the intervals of the two speeds must not overlap (one repeat has none, and says nothing).
        if own and best and _apart(own, best):
            better = (
                f"{best['exchange']} instead of {loss['exchange']} measured"
                f" {own['efficiency']:.2f} -> {best['efficiency']:.2f}"
            )
        elif own and fitted and not fitted.untold:
            better = _predicted_alternative(own, fitted)
        if better:
            causes = [limiter.Cause(*item) for item in loss["causes"].items()]
            loss["sentence"] = limiter.sentence(
                causes, loss["efficiency"], better, repeats=loss["repeats"]
            )


def _apart(slow: Mapping[str, Any], fast: Mapping[str, Any]) -> bool:
    """Whether the second row is faster beyond both confidence intervals."""
    margins = [row["samples_per_s_ci95"] for row in (slow, fast)]
    return None not in margins and fast["samples_per_s"] - slow["samples_per_s"] > sum(margins)


def _predicted_alternative(row: Mapping[str, Any], fitted: Fit) -> str | None:
    """The collective that the calibrated model expects to beat this row's exchange, if there is one."""
    own = strategy_of(row["exchange"])
    if own is None or row["gradient_bytes"] is None:
        return None
    share = row["batch_size"] / row["workers"]

    def step_s(name: str) -> float:
        return step(
            name,
            row["workers"],
            share,
            row["gradient_bytes"],
            fitted.compute,
            fitted.network,
            overlap=fitted.overlap,
        )

    best = min((name for name in plugins.names("collective") if name != "two_level"), key=step_s)
    gain = step_s(own) / step_s(best)
    if best == own or gain < 1.02:
        return None
    return f"{best} instead of {row['exchange']} predicts {row['efficiency']:.2f} -> {row['efficiency'] * gain:.2f}"


def _predictions(report: dict[str, Any]) -> Fit | None:
    """Calibrate the models on this very report, where it has what that takes, and set predicted beside measured.

    With three or more worker counts above one, the largest is left out of the calibration: its prediction is one. None where
    rows differ in more than exchange and workers, or no exchange has a model.
    """
    rows = [row for row in report["rows"] if row["runs"]]
    if not alike_but_for_exchange(rows) or (num_bytes := rows[0]["gradient_bytes"]) is None:
        return None
    several = sorted({row["workers"] for row in rows if row["workers"] > 1})
    fitted_to = several[-2] if len(several) > 2 else None
    try:
        both = [
            fit_report(report, num_bytes, overlap, max_workers=fitted_to)
            for overlap in (True, False)
        ]
    except UserError:
        return None
    fitted = min(
        both, key=lambda fit: fit.error
    )  # whether communication hides behind backward, the measurements tell
    report["predictions"] = predictions(fitted, report, num_bytes)
    report["header"]["calibrated_on"] = f"up to {fitted.max_workers} workers"
    return fitted


def _baseline_text(rows: Sequence[Mapping[str, Any]]) -> str:
    texts = sorted({str(row["baseline"]) for row in rows if row["baseline"]})
    if not texts and any(row["runs"] for row in rows):
        return "nothing: no other number of workers was measured"
    return "; ".join(texts)
