"""Tests of config/.

A person's mistake ends in one line that names the key, the value, what is allowed and the
nearest match.
"""

import inspect
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml

from scaletrain import config, plugins, torch_names
from scaletrain.config import grammar
from scaletrain.errors import UserError

DIGITS = Path(__file__).parents[1] / "examples" / "digits.yaml"
SMALL = {"model": "digits_cnn", "data": "digits", "batch_size": 32, "steps": 3}


def message(tree: dict, **settings) -> str:
    with pytest.raises(UserError) as caught:
        config.check({**tree, **settings}, "job.yaml")
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_sise": 3}, ["batch_sise", "did you mean 'batch_size'"]),
        ({"learning_rate": 0.1}, ["learning_rate", "did you mean 'optimizer.lr'"]),
        ({"num_workers": 2}, ["num_workers", "did you mean 'loader_workers'"]),
        (
            {"optimizer": {"name": "sgd", "learning_rate": 0.1}},
            ["optimizer.learning_rate", "did you mean 'optimizer.lr'"],
        ),
        (
            {"data": {"name": "synthetic", "samples": 2}, "batch_mode": "weak", "workers": 3},
            ["workers: 3, each with", "more than the 2 training samples (allowed: 1 to 2)"],
        ),
        ({"batch_size": "many"}, ["batch_size", "'many'", "integer"]),
        ({"workers": 0}, ["workers", "0", "greater than or equal to 1"]),
        ({"workers": 33}, ["workers", "33", "batch_size of 32", "1 to 32"]),
        ({"accumulate": 5, "workers": 8}, ["accumulate", "5", "32"]),
        (
            {"precision": "fp16", "exchange": "parameter_server"},
            ["precision: 'fp16'", "parameter_server", "bf16"],
        ),
        (
            {"callbacks": ["clip", "early_stop"]},
            ["callbacks[0]: clip needs norm or value"],
        ),
        (
            {"callbacks": ["ema", "early_stop"]},
            ["callbacks[1]: early_stop looks at evaluations", "evaluate_every: 100"],
        ),
        (
            {"callbacks": ["prune"], "exchange": "parameter_server"},
            ["callbacks[0]: prune changes weights", "the servers'", "allowed: an exchange that"],
        ),
        (
            {"callbacks": ["share_weights"], "exchange": "parameter_server"},
            ["share_weights changes weights"],
        ),
        (
            {"callbacks": ["max_norm"], "exchange": "parameter_server"},
            ["max_norm changes weights"],
        ),
        (
            {"callbacks": ["drift"], "exchange": "parameter_server"},
            ["callbacks[0]: drift: the replicas of parameter_server may differ"],
        ),
        (
            {"callbacks": ["drift"], "exchange": "none"},
            ["callbacks[0]: drift: the replicas of none may differ"],
        ),
        (
            {"data": {"name": "arrays", "inputs": "i", "targets": "t", "test_inputs": "i"}},
            ["data.test_targets: is missing (give test_inputs and test_targets, or none)"],
        ),
        (
            {"sync_batchnorm": True, "exchange": "parameter_server"},
            ["sync_batchnorm: true", "parameter_server"],
        ),
        (
            {"compile": {"mode": "max-autotune", "backend": "eager"}},
            ["compile.mode: 'max-autotune'", "inductor", "eager"],
        ),
        ({"compile": True, "compute": {"step_s": 1}}, ["compile", "compute"]),
        ({"compile": {"modus": 1}}, ["compile.modus", "mode"]),
        ({"exchange": "rinj"}, ["exchange", "'rinj'", "did you mean 'ring'"]),
        (
            {"exchange": {"name": "native", "bucket_md": 3}},
            ["exchange", "bucket_md", "did you mean 'bucket_mb'"],
        ),
        (
            {"exchange": {"name": "native", "bucket_mb": -1}},
            ["exchange.bucket_mb", "-1", "greater than 0"],
        ),
        (
            {"exchange": {"name": "scheduled", "collective": "treee"}},
            ["collective", "treee", "did you mean 'tree'"],
        ),
        (
            {"exchange": "pipelined_tree:segment=8"},
            ["collective", "segment", "did you mean 'segments'"],
        ),
        (
            {"exchange": "pipelined_tree:segments=0"},
            ["collective", "segments", "0", "greater than or equal to 1"],
        ),
        (
            {"exchange": "pipelined_tree:8"},
            ["collective", "pipelined_tree", "8", "KEY=VALUE", "such as segments="],
        ),
        ({"exchange": "ring:foo"}, ["exchange.collective", "'ring:foo'", "ring has no options"]),
        ({"optimizer": {"name": "adm"}}, ["optimizer", "'adm'", "did you mean 'adam'"]),
        (
            {"optimizer": {"name": "sgd", "lr": "fast"}},
            ["optimizer.lr", "'fast'", "a valid number"],
        ),
        (
            {"optimizer": {"name": "sgd", "lr": 0.1, "momentun": 0.9}},
            ["optimizer.momentun", "did you mean 'momentum'"],
        ),
        (
            {"optimizer": {"name": "Adam", "betas": [0.9, "x"]}},
            ["optimizer.betas[1]", "'x'", "a valid number"],
        ),
        ({"loss": "mse_los"}, ["loss", "'mse_los'", "did you mean 'mse_loss'"]),
        ({"model": "digit_cnn"}, ["model", "digit_cnn", "did you mean 'digits_cnn'"]),
        ({"model": {"name": "digits_cnn", "widht": 3}}, ["model", "widht", "did you mean 'width'"]),
        ({"launcher": "slurmm"}, ["launcher", "slurmm"]),
        ({"steps": None}, ["exactly one of epochs and steps"]),
        ({"epochs": 1}, ["exactly one of epochs and steps"]),
        ({"lr_schedule": {"name": "cosin"}}, ["lr_schedule", "cosin", "cosine"]),
        (
            {"checkpoint": {"evry_steps": 1}},
            ["checkpoint", "evry_steps", "did you mean 'every_steps'"],
        ),
        ({"model": 7}, ["model", "7"]),
        (
            {"init_from": {"path": "runs/a", "best": True}},
            ["key init_from.best", "(allowed: allow_missing, allow_unexpected, ema, path, prefix)"],
        ),
        ({"checkpoint": None}, ["checkpoint: None", "a mapping with keys of best, every_steps"]),
        (
            {"exchange": "native:find_unused_parameters=true"},
            ["exchange: 'native:find", "--set exchange.find_unused_parameters=true"],
        ),
    ],
)
def test_a_mistake_is_named(settings: dict, words: list[str]):
    text = message(SMALL, **settings)
    assert "job.yaml" in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", ["job.yaml:1", "not YAML"]),
        ("- 1\n- 2", ["a mapping", "a list"]),
        ("", ["a mapping", "nothing"]),
        ("batch_size: 3", ["model", "is missing"]),
    ],
)
def test_a_file_that_is_not_a_job(text: str, words: list[str], tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        config.load(path)
    for word in words:
        assert word in str(caught.value)


def test_compile_is_a_switch_or_options():
    job = {"model": "mlp", "data": "digits", "batch_size": 32, "steps": 1}
    assert config.check(job | {"compile": False}).compile is None
    assert config.check(job | {"compile": True}).compile == config.Compilation()
    chosen = config.check(job | {"compile": {"dynamic": True}}).compile
    assert chosen == config.Compilation(dynamic=True)
    assert config.check(job | {"recompute": "layers.*"}).recompute == ["layers.*"]


def test_a_missing_file_and_a_binary_file(tmp_path: Path):
    with pytest.raises(UserError, match="No such file"):
        config.load(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        config.load(tmp_path / "binary.yaml")


def test_the_command_line_ends_in_one_line_and_status_2(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "scaletrain.cli",
        "train",
        str(DIGITS),
        "--set",
        "optimizer.lr",
        "--run-dir",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "scaletrain: error: --set optimizer.lr: expected KEY=VALUE, such as optimizer.lr=0.05"
    ]


def test_settings_take_the_same_checks():
    with pytest.raises(UserError, match="did you mean 'batch_size'"):
        config.load(DIGITS, {"batch_sizes": 3})
    run = config.load(
        DIGITS,
        dict(
            config.parse_setting(text)
            for text in ("optimizer.lr=1e-3", "model.width=8", "exchange=ring@gloo")
        ),
    )
    assert run.optimizer.options["lr"] == 1e-3
    assert run.model.options["width"] == 8
    assert (run.exchange.options["collective"], run.exchange.options["transport"]) == (
        "ring",
        "gloo",
    )


def test_what_torch_offers_is_read_from_its_files():
    optimizers = {
        name.lower(): made
        for name, made in vars(torch.optim).items()
        if inspect.isclass(made)
        and issubclass(made, torch.optim.Optimizer)
        and made is not torch.optim.Optimizer
    }
    assert set(torch_names.optimizers() or ()) == set(optimizers)
    for name, made in optimizers.items():
        schema = torch_names.optimizer_options(name)
        assert schema and set(schema.model_fields) == set(inspect.signature(made).parameters) - {
            "params"
        }
    functions = {
        name: f
        for name, f in vars(torch.nn.functional).items()
        if inspect.isfunction(f) and name[0] != "_"
    }
    assert torch_names.losses() == {
        n for n, f in functions.items() if "reduction" in inspect.signature(f).parameters
    }


def test_without_torch_names_are_left_to_the_worker(monkeypatch: pytest.MonkeyPatch):
    for reader in (torch_names.losses, torch_names.optimizers):
        reader.cache_clear()
    monkeypatch.setattr(torch_names, "_read", lambda path: None)
    run = config.check({**SMALL, "loss": "mse_los", "optimizer": {"name": "adm", "lr": "fast"}})
    assert run.optimizer.options == {"lr": "fast"}
    for reader in (torch_names.losses, torch_names.optimizers):
        reader.cache_clear()


def test_resolved_config_reads_back_equal(tmp_path: Path):
    run = config.load(DIGITS, {"exchange": "tree", "workers": 3})
    path = tmp_path / "config.yaml"
    path.write_text(run.to_yaml())
    again = config.load(path)
    assert again == run
    assert yaml.safe_load(path.read_text())["model"] == {
        "name": "digits_cnn",
        "width": 32,
        "classes": 10,
    }, "defaults are filled in"
    assert again.search_path == DIGITS.parent, (
        "user modules are still looked for beside the file people wrote"
    )


@pytest.mark.parametrize(
    "text",
    [
        "native",
        "none",
        "ring",
        "tree@gloo",
        "scheduled",
        "pipelined_tree:segments=8",
        "ring@mixed:between=mpi",
    ],
)
def test_exchange_labels_are_what_people_type(text: str):
    run = config.check({**SMALL, "exchange": text})
    assert config.exchange_label(run.exchange) == text


def test_naming_the_same_exchange_keeps_the_files_options():
    tree = {**SMALL, "exchange": {"name": "scheduled", "collective": "tree", "bucket_mb": 3.0}}
    grammar.set_key(tree, "exchange", "ring")
    assert tree["exchange"] == {"name": "scheduled", "collective": "ring", "bucket_mb": 3.0}
    grammar.set_key(tree, "exchange", "native")
    assert tree["exchange"] == {"name": "native"}


def test_another_policy_of_the_rate_keeps_the_warm_up():
    tree: dict = {"lr_schedule": {"name": "step", "warmup_steps": 5, "gamma": 0.5}}
    grammar.set_key(tree, "lr_schedule", "cosine")
    assert tree == {"lr_schedule": {"name": "cosine", "warmup_steps": 5, "gamma": 0.5}}


def test_a_text_in_place_of_a_mapping_sets_what_it_stands_for():
    tree: dict = {"init_from": {"path": "runs/a", "ema": True}, "bad_samples": {"skip": 3}}
    grammar.set_key(tree, "init_from", "weights.pt")
    grammar.set_key(tree, "bad_samples", "stop")
    assert tree == {"init_from": "weights.pt", "bad_samples": "stop"}
    grammar.set_key(tree, "init_from.ema", True)
    grammar.set_key(tree, "bad_samples.skip", 5)
    assert tree == {"init_from": {"path": "weights.pt", "ema": True}, "bad_samples": {"skip": 5}}


def test_names_that_people_type_are_unique():
    assert not set(plugins.names("exchange")) & set(plugins.names("collective"))


def test_the_schema_for_editors_accepts_what_the_examples_hold():
    schema = config.RunConfig.model_json_schema()
    for path in sorted((Path(__file__).parents[1] / "examples").rglob("*.yaml")):
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError, match="0 is less than the minimum"):
        jsonschema.validate({"model": "mlp", "data": "digits", "batch_size": 0}, schema)
    undescribed = [
        key for key, field in schema["properties"].items() if not field.get("description")
    ]
    assert undescribed == []


@pytest.mark.parametrize(
    ("device", "hint"),
    [
        ("gpu", "; did you mean 'cuda'?"),
        ("GPU:0", "; did you mean 'cuda'?"),
        ("cuda:1", "; did you mean 'cuda'?"),
        ("rocm", "; did you mean 'cuda'?"),
        ("cpuu", "; did you mean 'cpu'?"),
        ("tpu", ""),
        ("mps", ""),
    ],
)
def test_a_device_by_another_name(device: str, hint: str):
    with pytest.raises(UserError) as caught:
        config.check({"model": "mlp", "data": "digits", "batch_size": 8, "device": device})
    assert str(caught.value) == (
        f"config: device: {device!r} is not allowed{hint} (allowed: 'auto', 'cpu' or 'cuda')"
    )
