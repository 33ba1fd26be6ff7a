"""Tests of ``scaletrain proposal``, on sweeps that are made up from a model: the truth is known."""

import io
import json
import math
import random
import re
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from pypdf import PdfReader

from scaletrain.cli import cli
from scaletrain.collectives.cost import Network
from scaletrain.errors import UserError
from scaletrain.run.layout import RunDir
from scaletrain.run.progress import Progress
from scaletrain.scaling.explain import proposal, report
from scaletrain.scaling.measure import sweep
from scaletrain.scaling.predict.network import Fabric
from scaletrain.scaling.predict.step_time import ComputeCost, StepModel
from scaletrain.scaling.show import page_tables, sheet
from scaletrain.scaling.show import proposal as pages

from .browser import browse, needs_browser
from .runs import write_run

BATCH = 4096
TODAY = datetime(2026, 12, 1, tzinfo=UTC)
NUM_BYTES = 4_000_000
# A worker needs 0.2 ms a sample; 1 Gbit/s and 0.3 ms between hosts.
TRUE = StepModel(NUM_BYTES, ComputeCost(2e-4, 0.0, 1e-3), Fabric(Network(3e-4, 125e6), ""), False)


def true_step_s(exchange, workers, batch_size):
    strategy = "none" if exchange == "none" else exchange
    return TRUE.step_s(strategy, workers, batch_size / workers)


def write_sweep(
    tmp_path, counts=(1, 2, 4, 8), mode="strong", per_host=1, repeats=4, noise=0.004,
    exchanges=("ring", "tree", "none"), split=True, launcher="slurm",
):  # fmt: skip
    """Write the directory of a sweep whose steps are the true model's, with some noise."""
    draw = random.Random(1)
    config = tmp_path / f"{mode}-config" / "job.yaml"
    config.parent.mkdir()
    batch_size = BATCH if mode == "strong" else BATCH // 8
    data = "{name: synthetic, samples: 65536}"
    config.write_text(f"model: mlp\ndata: {data}\nbatch_size: {batch_size}\nsteps: 10\n")
    plan = sweep.plan(
        sweep.Request(
            [config],
            list(counts),
            list(exchanges),
            mode=mode,
            repeats=repeats,
            threads=1,
            launcher=launcher,
            split=split,
        )
    )
    out = tmp_path / mode
    sweep.claim(out, plan)
    sweep.write_header(out, plan.header())
    for cell in plan.cells():
        for repeat in range(repeats):
            of_all = cell.batch_size if mode == "strong" else cell.batch_size * cell.workers
            seconds = true_step_s(cell.exchange, cell.workers, of_all)
            seconds *= math.exp(draw.gauss(0, noise))
            directory = sweep.run_dir(out, cell, repeat)
            write_run(
                directory,
                exchange=cell.exchange,
                steps=[[seconds] * 8] * cell.workers,
                samples=of_all // cell.workers,
                parts=_parts(seconds),
                batch_mode=mode,
            )
            _write_checkpoint(directory / "step-10.safetensors")
            for rank in range(cell.workers):
                sign = Progress(rank, 1, f"h{rank // per_host}", doing="finished")
                RunDir(directory).progress(rank).write_text(json.dumps(sign.to_json()))
    return out


def _parts(step_s):
    """Return the true model's parts of a step, which has no input and the same update always."""
    update = TRUE.compute.update_s / step_s
    return {"input_s": 0.0, "forward_s": 0.3, "backward_s": 0.7 - update, "update_s": update}


def _write_checkpoint(path):
    """Write the header of a checkpoint, which says how large the gradients are."""
    header = {"model.w": {"dtype": "F32", "data_offsets": [0, NUM_BYTES]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def request(**changes):
    return proposal.Request(**({"samples": 1e8, "runs": 10} | changes))


def made(*directories, **changes):
    reports = {}
    for directory in directories:
        reports[sweep.read(directory).mode] = report.of_sweep(directory)
    return proposal.of(reports, request(**changes))


def true_hours(workers, nodes, batch_size=BATCH):
    """Return the node hours of one run of 1e8 samples."""
    rate = batch_size / true_step_s("ring", workers, batch_size)
    return 1e8 / rate / 3600 * nodes


def run(*arguments):
    return CliRunner().invoke(cli, ["proposal", *map(str, arguments)])


def test_measured_figures_are_those_of_the_report_and_the_truth(tmp_path):
    strong = write_sweep(tmp_path)
    page = made(strong, workers=4, exchange="ring")
    [scaling] = page.scalings
    rows = {row.workers: row for row in report.of_sweep(strong).rows if row.exchange == "ring"}
    assert [point.workers for point in scaling.points] == [1, 2, 4, 8]
    for point in scaling.points:
        row = rows[point.workers]
        assert point.is_measured and point.nodes == point.workers
        assert point.speedup.value == row.speedup and point.efficiency.value == row.efficiency
        assert point.efficiency.high - point.efficiency.value == pytest.approx(row.efficiency_ci95)
        hours = point.node_hours
        assert hours.value == pytest.approx(true_hours(point.workers, point.nodes), rel=0.01)
        assert hours.low < hours.value < hours.high
    assert page.node_hours.value == pytest.approx(10 * true_hours(4, 4), rel=0.01)
    assert scaling.predicted == "Nothing is predicted: all figures are measured."


def test_the_knee_has_the_highest_efficiency_over_time(tmp_path):
    """Truth: 1.00, 1.72, 2.62, 3.36 and 2.96 on 1 to 16 workers."""
    strong = write_sweep(tmp_path, counts=(1, 2, 4, 8, 16))
    powers = {}
    for workers in (1, 2, 4, 8, 16):
        powers[workers] = 1 / true_step_s("ring", workers, BATCH) ** 2 / workers
    assert max(powers, key=powers.get) == 8
    page = made(strong, exchange="ring")
    assert page.asked.workers == page.scalings[0].knee.workers == 8
    sentence = page.scalings[0].knee.sentence
    assert re.match(r"8 workers\. 16 are 1\.\d\d times as fast, at 1\.\d\d times the node hours\.$",
                    sentence)  # fmt: skip
    # Repeats that scatter more than the knee stands out do not tell it.
    noisy = write_sweep(tmp_path / "noisy", counts=(1, 2, 4, 8, 16), noise=0.1)
    doubtful = made(noisy, exchange="ring").scalings[0].knee.sentence
    assert re.search(r"The repeats do not exclude .*\d+ workers\.", doubtful)


def test_a_worker_more_on_a_node_that_is_paid_for_costs_nothing(tmp_path):
    """On 16 workers, the step is shorter than on 8, though not by as much as the workers cost."""
    one_node = write_sweep(tmp_path, counts=(1, 2, 4, 8, 16), launcher="local")
    page = made(one_node, exchange="ring")
    assert page.workers_per_node == 16 and page.asked.nodes == 1
    assert page.asked.workers == 16 and page.scalings[0].knee.sentence.startswith("Not reached")


@pytest.fixture(autouse=True)
def _folders(tmp_path):
    (tmp_path / "noisy").mkdir()


def test_workers_that_were_not_measured_are_predicted_with_an_interval_that_holds(tmp_path):
    strong = write_sweep(tmp_path)
    page = made(strong, workers=16, exchange="ring", workers_per_node=1)
    asked, [scaling] = page.asked, page.scalings
    assert not asked.is_measured and asked.nodes == 16
    assert [p.workers for p in scaling.points if not p.is_measured] == [16]
    point = scaling.points[-1]
    truth = true_hours(point.workers, point.workers)
    assert point.node_hours.low < truth < point.node_hours.high
    assert point.node_hours.value == pytest.approx(truth, rel=0.05)
    assert point.node_hours.high < 1.5 * point.node_hours.low
    true_speedup = true_step_s("none", 1, BATCH) / true_step_s("ring", point.workers, BATCH)
    assert point.speedup.low < true_speedup < point.speedup.high
    assert point.efficiency.value == pytest.approx(point.speedup.value / point.workers)
    assert "16 workers are predicted" in scaling.predicted
    assert re.search(r"missed the steps of 8 workers by [+-]\d\.\d %", scaling.predicted)
    assert scaling.knee.sentence.endswith("Predicted: the knee is at 8 workers.")
    told = " ".join(pages.request(page))
    assert "(PREDICTED)" in told and "16 workers of 16 nodes" in told
    assert "These are more workers than pay (knee: 8)." in told


def test_bands_are_drawn_whole(tmp_path):
    """Three repeats that scatter by a fifth: the lower ends are far below the speed-ups."""
    page = made(write_sweep(tmp_path, repeats=3, noise=0.2), exchange="ring")
    lows = [point.speedup.low for point in page.scalings[0].points if point.speedup.low]
    assert min(lows) < page.scalings[0].points[0].speedup.value / 2 or min(lows) < 0.5
    axes = Figure().add_subplot()
    pages.curves(page.scalings, "speedup")(axes)
    assert axes.get_ylim()[0] < min(low for low in lows if low > 0)


def test_what_the_fit_does_not_allow_is_refused_with_its_reason(tmp_path):
    strong = write_sweep(tmp_path)
    # Too far from what was measured.
    with pytest.raises(UserError, match="128 workers are more than 8 times the 8"):
        made(strong, workers=128, exchange="ring")
    # Latency may be nothing or three times the truth, which decides for so many hosts.
    with pytest.raises(UserError, match="the network is not known well enough for 32 workers"):
        made(strong, workers=32, exchange="ring")
    with pytest.raises(UserError, match="cannot share a batch of 4096"):
        made(strong, workers=8192, exchange="ring")
    # One host tells nothing of a network.
    one = write_sweep(tmp_path / "noisy", launcher="local")
    with pytest.raises(UserError, match=r"shared one host.*\(allowed: 1, 2, 4, 8, or measure 16\)"):
        made(one, workers=16, exchange="ring")


def test_a_model_that_misses_what_was_measured_predicts_nothing(tmp_path):
    """Workers that slow each other down by half: the computation of one does not tell that."""
    strong = write_sweep(tmp_path, counts=(1, 2, 4))
    slowed = report.of_sweep(strong)
    rows = []
    for row in slowed.rows:
        factor = 1 + 0.25 * (row.workers - 1)
        runs = tuple(
            type(each)(each.samples_per_s / factor, each.step_s * factor) for each in row.runs
        )
        changed = {name: getattr(row, name) * factor for name in ("step_s_mean", "forward_s")}
        rows.append(type(row)(**{**vars(row), **changed, "runs": runs}))
    slowed = type(slowed)(**{**vars(slowed), "rows": tuple(rows)})
    with pytest.raises(UserError, match=r"known to a factor of \d+\.\d only|not known well enough"):
        proposal.of({"strong": slowed}, request(workers=8, exchange="ring"))


def test_strong_and_weak_scaling_stand_on_one_page(tmp_path):
    strong = write_sweep(tmp_path, per_host=2)
    weak = write_sweep(tmp_path, mode="weak", per_host=2)
    done = run(strong, weak, "--samples", "1e8", "--runs", "10", "--workers", "4",
               "--exchange", "ring", "--out", tmp_path / "page")  # fmt: skip
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page" / "proposal.html").read_text()
    text = (tmp_path / "page" / "proposal.md").read_text()
    hours = 10 * true_hours(4, 2)
    [total] = re.findall(r"^\*\*([\d.,]+) \([\d.]+ to [\d.]+\) node hours \(measured\)", text, re.M)
    assert float(total) == pytest.approx(hours, rel=0.01)
    for words in ("Strong scaling (batch 4,096), ring", "Weak scaling (batch 512 a worker), ring",
                  "Knee: ", "Environment", "How to reproduce", "commit abc",
                  "--samples 100000000 --runs 10 --workers 4"):  # fmt: skip
        assert words in page and words in text
    assert "<script" not in page and page.count("<svg") == 2
    assert "size: A4 portrait" in page
    for name in re.findall(r"\]\((\w+\.svg)\)", text):
        assert (tmp_path / "page" / name).read_bytes().startswith(b"<?xml")
    # Weak scaling gives other hours, and then comes first.
    weak_first = made(strong, weak, mode="weak", workers=4, exchange="ring")
    assert [scaling.mode for scaling in weak_first.scalings] == ["weak", "strong"]
    assert weak_first.asked.batch_size == 2048


def text_of(pdf):
    """Return the characters that are shown in a PDF, as a search finds them."""
    return "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(pdf)).pages)


def num_sheets(pdf):
    return len(PdfReader(io.BytesIO(pdf)).pages)


def test_the_page_is_one_sheet_of_pdf_without_a_browser(tmp_path):
    strong, weak = write_sweep(tmp_path), write_sweep(tmp_path, mode="weak")
    done = run(strong, weak, "--samples", "1e8", "--runs", "10", "--workers", "16",
               "--exchange", "ring", "--out", tmp_path / "page")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "proposal.pdf" in done.output
    pdf = (tmp_path / "page" / "proposal.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and num_sheets(pdf) == 1
    shown = text_of(pdf)
    text = (tmp_path / "page" / "proposal.md").read_text()
    # Whatever stands on the other pages stands there, too; a long path may go over two lines.
    words = re.sub(r"!\[.*?\]\(.*?\)|\|[-:|]+\n|[|*]|^#+ ", " ", text, flags=re.M).split()
    whole = "".join(shown.split())
    missing = [word for word in words if word not in whole]
    assert not missing, missing
    assert "(PREDICTED)" in whole and "Knee:" in whole
    made_again = pages.pdf(made(strong, weak, workers=16, exchange="ring"), "scaletrain")
    assert made_again == pages.pdf(made(strong, weak, workers=16, exchange="ring"), "scaletrain")


def test_a_long_page_goes_on_on_another_sheet_and_no_word_is_wider_than_its_line():
    words = [f"word{number}" for number in range(4000)]
    paragraphs = [sheet.Paragraph(" ".join(words[i : i + 100])) for i in range(0, 4000, 100)]
    pdf = sheet.pdf(paragraphs, "long", TODAY)
    assert num_sheets(pdf) > 1 and set(words) <= set(text_of(pdf).split())
    path = "a/very/long/path" * 30
    lines = text_of(sheet.pdf([sheet.Paragraph(path, is_code=True)], "path", TODAY)).split()
    assert "".join(lines) == path
    # A character of DejaVu Sans Mono is 0.602 of its size wide, A4 is 595 points.
    assert len(lines) > 3 and max(map(len, lines)) * 0.602 * 8.0 <= 595 - 2 * 31


def test_no_heading_is_left_alone_at_the_foot_of_a_sheet():
    blocks = []
    for number in range(100):
        titles = page_tables.Title("two words"), page_tables.Title("word")
        lines = [page_tables.Line((f"first{number}.", "1"))] * 2
        blocks += [sheet.Paragraph("text")] * (number % 7)
        blocks.append(sheet.Paragraph(f"heading{number}.", size=10.0, is_bold=True, before=6.0))
        blocks.append(sheet.Grid(page_tables.Table(titles, tuple(lines))))
    sheets = PdfReader(io.BytesIO(sheet.pdf(blocks, "headings", TODAY))).pages
    texts = [page.extract_text() for page in sheets]
    assert len(texts) > 4
    for number in range(100):
        [text] = [text for text in texts if f"heading{number}." in text]
        assert f"first{number}." in text, number


def test_what_lays_out_sheets_is_imported_for_them_only():
    """It takes half a second."""
    code = "import sys, scaletrain.scaling.show.proposal; sys.exit('fpdf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.slow
@needs_browser
def test_both_scalings_with_predictions_print_on_one_sheet(tmp_path):
    strong, weak = write_sweep(tmp_path), write_sweep(tmp_path, mode="weak")
    page = made(strong, weak, workers=16, exchange="ring")
    # Commands as long as real ones.
    (tmp_path / "page.html").write_text(pages.html(page, "scaletrain proposal " + "word " * 60))
    browse(tmp_path / "page.html", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert num_sheets((tmp_path / "page.pdf").read_bytes()) == 1


def test_mistakes_are_one_line_with_the_fix(tmp_path):
    strong = write_sweep(tmp_path, counts=(1, 2), repeats=1)
    single = write_sweep(
        tmp_path / "noisy", counts=(2,), repeats=1, exchanges=["ring"], split=False
    )
    assert "tree" in run(strong, "--samples", "1", "--exchange", "tre").exception.args[0]
    for arguments, told in [
        ((strong, "--samples", "1", "--mode", "weak"), "weak scaling was not measured"),
        ((single, "--samples", "1"), "several numbers of workers, such as --workers 1,2,4"),
        ((strong, "--samples", "1", "--format", "doc"), "--format: 'doc' is not known"),
    ]:
        done = run(*arguments)
        assert isinstance(done.exception, UserError) and told in str(done.exception), done.output


def test_single_runs_have_no_interval_and_the_page_says_so(tmp_path):
    strong = write_sweep(tmp_path, counts=(1, 2), repeats=1)
    page = made(strong, workers=2)
    assert page.node_hours.low is None
    assert "single runs: no interval" in " ".join(pages.doubts(page))
    assert "to" not in pages.request(page)[0].split("node hours")[0]
    assert "(single runs: no interval)" in page.scalings[0].knee.sentence
