"""Tests of what ``scaling/predict/fit.py`` claims to know: made-up jobs, whose truth is known."""

import json
import math
import random

from click.testing import CliRunner

from scaletrain.cli import cli
from scaletrain.collectives.cost import Network
from scaletrain.errors import UserError
from scaletrain.scaling.model import Repeat, Report, ReportHeader, Row
from scaletrain.scaling.predict import fit
from scaletrain.scaling.predict.calibration import Calibration, Fit
from scaletrain.scaling.predict.network import Fabric
from scaletrain.scaling.predict.step_time import ComputeCost, StepModel


def made_up(latency_s, bandwidth, num_bytes, error, seed, counts=(2, 4)):
    """Return a report of weak scaling whose steps miss the model by ``error``, and the truth."""
    draw = random.Random(seed)
    true = StepModel(
        num_bytes, ComputeCost(1e-3, 0.0, 2e-3), Fabric(Network(latency_s, bandwidth), ""), False
    )

    def measured_s(exchange, workers):
        return true.step_s(exchange, workers, 64) * math.exp(draw.gauss(0, error))

    rows = [
        Row("job", "none", 1, 64, {}, forward_s=0.02, backward_s=0.044, input_s=0.0, update_s=2e-3,
            step_s_mean=0.066, runs=(Repeat(1.0, 1.0),))
    ]  # fmt: skip
    for exchange in ("ring", "tree"):
        for workers in counts:
            step_s = measured_s(exchange, workers)
            runs = (Repeat(1.0, step_s),)
            rows.append(
                Row("job", exchange, workers, 64 * workers, {}, step_s_mean=step_s, runs=runs)
            )
    return Report(1, ReportHeader(mode="weak"), "", tuple(rows)), true, measured_s


def test_a_latency_that_could_be_nothing_is_not_told():
    """50 us a message are less of a step of 4 MB over 1 Gbit/s than the model errs."""
    for seed in range(6):
        made, _, _ = made_up(50e-6, 125e6, 4e6, 0.02, seed)
        fitted = fit.fit_report(made, 4e6, overlap=False)
        assert fitted.unidentified == ["latency"]
        assert fitted.latency_s.low is None and fitted.latency_s.high > 50e-6
        assert fitted.bandwidth_bytes_per_s.low < 125e6 < fitted.bandwidth_bytes_per_s.high
    # Of 20 ms a message nearly all of the step is latency.
    made, _, _ = made_up(20e-3, 125e6, 1e5, 0.02, 0, counts=(2, 4, 8))
    fitted = fit.fit_report(made, 1e5, overlap=False)
    assert "latency" not in fitted.unidentified
    assert fitted.latency_s.low < 20e-3 < fitted.latency_s.high
    assert Fit.from_json(json.loads(json.dumps(fitted.to_json()))) == fitted


def test_steps_that_are_measured_later_lie_in_their_intervals():
    """Eight held-out cells of 40 made-up jobs, each off the model by 4 %."""
    held = 0
    for seed in range(10):
        made, _, measured_s = made_up(300e-6, 125e6, 4e6, 0.04, seed)
        fitted = fit.fit_report(made, 4e6, overlap=False)
        for exchange in ("ring", "tree"):
            for workers in (8, 16):

                def step_s(fabric, exchange=exchange, workers=workers):
                    model = StepModel(4e6, fitted.compute, fabric, False)
                    return model.step_s(exchange, workers, 64)

                low, high = fitted.interval(step_s)
                held += low <= measured_s(exchange, workers) <= high
                assert high < 20 * low
    assert held >= 37  # of 40


def test_what_a_fit_leaves_open_is_refused_only_where_it_decides(tmp_path):
    made, _, _ = made_up(50e-6, 125e6, 4e6, 0.02, 1)
    fitted = fit.fit_report(made, 4e6, overlap=False)
    Calibration(fitted, num_bytes=4e6, batch_size=64).write(tmp_path / "fit.json")
    common = ["simulate", "--fit", str(tmp_path / "fit.json"), "--mode", "weak", "--workers"]
    # A ring of 32 sends 62 messages one after the other: their latency decides.
    refused = CliRunner().invoke(cli, [*common, "2,4,32", "--strategy", "ring"])
    assert isinstance(refused.exception, UserError), refused.output
    assert "ring on 32 workers takes" in str(refused.exception)
    assert "--workers up to 4" in str(refused.exception)
    done = CliRunner().invoke(cli, [*common, "2,4", "--strategy", "ring"], catch_exceptions=False)
    assert done.exit_code == 0
    named = [*common, "32", "--strategy", "ring", "--network", "1gbit"]
    assert CliRunner().invoke(cli, named, catch_exceptions=False).exit_code == 0
