"""Tests of what ``scaling/predict/fit.py`` claims to know: made-up jobs, whose truth is known."""

import dataclasses
import json
import math
import random

import pytest
from click.testing import CliRunner

from scaletrain.cli import cli
from scaletrain.collectives.cost import Link, Network
from scaletrain.errors import UserError
from scaletrain.scaling.model import RankTimes, Repeat, Report, ReportHeader, Row
from scaletrain.scaling.predict import fit
from scaletrain.scaling.predict.calibration import DECIDES, Calibration, Fit
from scaletrain.scaling.predict.extrapolate import Extrapolation
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


# Hosts with several workers

PER_HOST = 4
HOSTS = Fabric(
    Network(1e-4, 1.2e8), "", workers_per_host=PER_HOST, local=Link(1e-5, 4e9), one_level=True
)


def of_hosts(counts, seed, error=0.01, num_bytes=2e7, fabric=HOSTS):
    """Return a report of jobs that fill hosts of four workers, and their true model."""
    draw = random.Random(seed)
    true = StepModel(num_bytes, ComputeCost(1e-3, 0.0, 2e-3), fabric, False)
    report, _, _ = made_up(1e-4, 1e9, num_bytes, 0.0, seed, counts=())
    rows = [*report.rows]
    for exchange in ("ring", "halving_doubling"):
        for workers in counts:
            step_s = true.step_s(exchange, workers, 64) * math.exp(draw.gauss(0, error))
            ranks = []
            for rank in range(workers):
                host = f"h{rank // fabric.workers_per_host}"
                ranks.append(RankTimes(rank, host, step_s, 0, 0, 0, 0, 0, 0, None))
            row = Row("job", exchange, workers, 64 * workers, {}, step_s_mean=step_s,
                      gradient_bytes=int(num_bytes), runs=(Repeat(1.0, step_s),), ranks=tuple(ranks))  # fmt: skip
            rows.append(row)
    rows[0] = dataclasses.replace(rows[0], gradient_bytes=int(num_bytes))
    return dataclasses.replace(report, rows=tuple(rows)), true


def forecast_s(fitted, num_bytes, exchange, workers):
    """Return a predicted step, and the shortest and the longest that may be."""

    def step_s(fabric):
        return fit.step_model(fitted, num_bytes, fabric).step_s(exchange, workers, 64)

    return step_s(fitted.fabric), *fitted.step_range(step_s)


@pytest.mark.parametrize("seed", range(3))
def test_hosts_with_several_workers_are_no_flat_network(seed: int):
    report, true = of_hosts((2, 4, 8, 16), seed)
    fitted = fit.fit_report(report, true.num_bytes, overlap=False)
    assert fitted.workers_per_host == PER_HOST
    assert fitted.local is not None
    assert fitted.local.bandwidth_bytes_per_s == pytest.approx(4e9, rel=0.3)
    assert fitted.bandwidth_bytes_per_s.value == pytest.approx(1.2e8, rel=0.1)
    for exchange in ("ring", "halving_doubling", "two_level"):
        truth_s = true.step_s(exchange, 64, 64)
        predicted_s, low_s, high_s = forecast_s(fitted, true.num_bytes, exchange, 64)
        assert predicted_s == pytest.approx(truth_s, rel=0.1)
        assert low_s < 1.05 * truth_s and high_s > 0.95 * truth_s
    # As if every worker had a port of its own, halving and doubling would be wrong by far.
    flat = dataclasses.replace(
        report, rows=tuple(dataclasses.replace(row, ranks=()) for row in report.rows)
    )
    blind = fit.fit_report(flat, true.num_bytes, overlap=False)
    predicted_s, _, _ = forecast_s(blind, true.num_bytes, "halving_doubling", 64)
    assert abs(predicted_s / true.step_s("halving_doubling", 64, 64) - 1) > 0.2
    assert Fit.from_json(json.loads(json.dumps(fitted.to_json()))) == fitted


def test_an_unknown_link_inside_hosts_is_refused_where_it_decides():
    # No row lies on one host. Where the network is slow, what is inside decides nothing.
    report, true = of_hosts((8, 16, 32), seed=1)
    fitted = fit.fit_report(report, true.num_bytes, overlap=False)
    predicted_s, low_s, high_s = forecast_s(fitted, true.num_bytes, "ring", 64)
    assert high_s < DECIDES * low_s
    assert predicted_s == pytest.approx(true.step_s("ring", 64, 64), rel=0.1)
    # Four workers of one host exchange through that link alone.
    _, low_s, high_s = forecast_s(fitted, true.num_bytes, "ring", PER_HOST)
    assert high_s > DECIDES * low_s


def test_workers_whose_hosts_nobody_knows_are_not_predicted():
    report, _ = of_hosts((2, 4, 8, 16), seed=2)
    other, _ = of_hosts((8,), 2, fabric=dataclasses.replace(HOSTS, workers_per_host=2))
    mixed = dataclasses.replace(report, rows=(*report.rows, *other.rows[1:]))
    with pytest.raises(UserError, match="hosts had 2 and 4 workers each"):
        Extrapolation(mixed, "ring").forecast(32)


def test_rows_of_one_host_alone_do_not_calibrate_a_network():
    report, true = of_hosts((2, 4, 8, 16), seed=3)
    with pytest.raises(UserError, match="lie on one host"):
        fit.fit_report(report, true.num_bytes, max_workers=4)
