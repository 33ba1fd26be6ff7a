"""Tests of ``scaling/model.py``: values keep their JSON, and untyped JSON stays there."""

import ast
from pathlib import Path

import pytest

from scaletrain.scaling import model
from scaletrain.scaling.model import (
    Loss,
    Prediction,
    Repeat,
    Report,
    ReportHeader,
    Row,
    ServerCounts,
)

SCALING = Path(model.__file__).parent
# Values turn into JSON and back in methods of these names, and nowhere else.
JSON_METHODS = ("to_json", "from_json")


def public_annotations(tree: ast.Module):
    """The annotations of everything that another module may use."""
    for node in tree.body:
        members = [node]
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            members = node.body
        for member in members:
            if isinstance(member, ast.FunctionDef):
                is_public = not member.name.startswith("_") or member.name == "__init__"
                if not is_public or member.name in JSON_METHODS:
                    continue
                arguments = [*member.args.args, *member.args.kwonlyargs]
                yield from (a.annotation for a in arguments if a.annotation)
                if member.returns:
                    yield member.returns
            elif isinstance(member, ast.AnnAssign):
                yield member.annotation


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(SCALING.rglob("*.py")) if path.name != "model.py"],
    ids=lambda path: path.relative_to(SCALING).as_posix(),
)
def test_untyped_mappings_cross_no_border(path: Path):
    annotations = list(public_annotations(ast.parse(path.read_text(encoding="utf-8"))))
    untyped = ("dict[str, Any]", "Mapping[str, Any]")
    texts = [ast.unparse(annotation) for annotation in annotations]
    assert [text for text in texts if any(mapping in text for mapping in untyped)] == []


def test_a_report_is_the_same_after_it_was_written_and_read():
    servers = ServerCounts(
        servers=1, cores=(0, 1), mode="sync", staleness={"0": 3}, staleness_mean=0.0, dropped=0.0, pace_s=(0.1, None),
        lost={}, refused=0, restored_at_update=None, cpu_s_per_worker=1.0, memory_bytes=5,
    )  # fmt: skip
    row = Row("job", "ring", 2, 96, {"lr": 0.1}, samples_per_s=10.0, servers=servers)
    row = model.dataclasses.replace(row, failures=("boom",), runs=(Repeat(10.0, 0.1, 1.0),))
    loss = Loss(
        "job", "ring", 2, {}, 1, step_s=0.1, ideal_s=0.05, loss_s=0.05, efficiency=0.5, efficiency_ci95=None,
        causes={"input": 0.05}, lead_ci95=None, limiter="input", finding="Input.",
    )  # fmt: skip
    report = Report(
        version=1,
        header=ReportHeader(
            mode="strong", settings=("a=1",), emulated=False, emulation=(), devices=()
        ),
        summary="Good.",
        rows=(row,),
        losses=(loss,),
        predictions=(Prediction("ring", 2, 0.1, 0.09, in_fit=True),),
        loss_reached=0.3,
    )
    assert Report.from_json(report.to_json()) == report


def test_what_is_not_known_is_left_out_of_the_header_and_null_in_a_row():
    assert "argv" not in ReportHeader().to_json() and "busy" not in ReportHeader().to_json()
    assert ReportHeader(used_by_others=0.0).to_json()["busy"] is None
    assert Row("job", "ring", 2, 96, {}).to_json()["speedup"] is None


def test_keys_of_other_versions_are_no_mistake():
    value = Row("job", "ring", 2, 96, {}).to_json() | {"unheard_of": 1}
    del value["target_runs"]
    assert Row.from_json(value) == Row("job", "ring", 2, 96, {})
