"""Tests of training/optimizer.py and of what the trainer does with the groups' rates.

Bugs it catches: a parameter in two groups or in none, an option that counts for nobody, rates of
groups that the schedule levels, an optimizer of one's own that ranks run differently.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scaletrain import config
from scaletrain.errors import UserError
from scaletrain.training import optimizer, patterns, workload
from tests.ranks import run_ranks
from tests.training import jobs

JOB: dict[str, Any] = {
    "model": "tests.training.test_optimizer:normed",
    "data": "tests.training.jobs:vectors",
    "batch_size": 16,
    "steps": 6,
    "optimizer": {"name": "sgd", "lr": 0.2, "momentum": 0.9, "weight_decay": 0.1},
}
GROUPS = [
    {"match": "head.bias", "lr": 0.4, "momentum": 0.5},
    {"match": ["bias", "norm*"], "weight_decay": 0},
]


def normed() -> nn.Module:
    """A net with a normalisation that does not depend on the other samples."""
    model = nn.Sequential()
    model.add_module("body", nn.Linear(8, 6))
    model.add_module("norm1", nn.LayerNorm(6))
    model.add_module("head", nn.Linear(6, 4))
    return model


class Signs(torch.optim.Optimizer):
    """Steps by the sign of each gradient: a person's own optimizer."""

    def __init__(self, params: Any, lr: float = 0.1, *, decay: float = 0.0):
        if decay < 0:
            raise ValueError(f"negative decay {decay}")
        super().__init__(params, {"lr": lr})
        self.decay = decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * self.decay)
                parameter.sub_(group["lr"] * parameter.grad.sign())


def with_groups(groups: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return JOB | {"optimizer": JOB["optimizer"] | options | {"groups": groups}}


def build(tree: dict[str, Any]) -> workload.Workload:
    return workload.build(config.check(tree), torch.device("cpu"))


def test_the_first_group_that_matches_has_a_parameter():
    parts = build(with_groups(GROUPS))
    names = {id(parameter): name for name, parameter in parts.model.named_parameters()}
    members, options = [], []
    for group in parts.optimizer.param_groups:
        members.append([names[id(parameter)] for parameter in group["params"]])
        options.append([group[key] for key in ("lr", "momentum", "weight_decay")])
    assert members == [
        ["body.weight", "head.weight"],
        ["head.bias"],
        ["body.bias", "norm1.weight", "norm1.bias"],
    ]
    assert options == [[0.2, 0.9, 0.1], [0.4, 0.5, 0.1], [0.2, 0.9, 0]]
    assert optimizer.describe(config.check(with_groups(GROUPS)).optimizer, parts.optimizer) == [
        "optimizer: SGD with lr 0.2, momentum 0.9, weight_decay 0.1",
        "parameter groups: 2 with the optimizer's options; 1 of head.bias with lr 0.4, momentum"
        " 0.5; 3 of bias, norm* with weight_decay 0.0",
    ]


def test_groups_may_leave_no_parameter_to_the_optimizers_own_options():
    parts = build(with_groups([{"match": "*", "lr": 0.3}]))
    assert [group["lr"] for group in parts.optimizer.param_groups] == [0.3]


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("bias", {"body.bias", "norm1.bias", "head.bias"}),
        ("*.bias", {"body.bias", "norm1.bias", "head.bias"}),
        ("norm?", {"norm1.weight", "norm1.bias"}),
        ("body.weight", {"body.weight"}),
        ("ody", set()),
    ],
)
def test_a_pattern_is_for_a_name_or_a_part_of_it(pattern: str, matching: set[str]):
    names = [name for name, _ in normed().named_parameters()]
    assert {name for name in names if patterns.matches(pattern, name)} == matching


def by_torch_alone(set_rates: Callable[[torch.optim.Optimizer, int], None]) -> dict:
    """The same groups written by hand."""
    parts = build(JOB)
    named = dict(parts.model.named_parameters())
    decayed = [named["body.weight"], named["head.weight"]]
    others = [named["body.bias"], named["norm1.weight"], named["norm1.bias"]]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [named["head.bias"]], "lr": 0.4, "momentum": 0.5, "weight_decay": 0.1},
        {"params": others},
    ]
    by_hand = torch.optim.SGD(groups, lr=0.2, momentum=0.9)
    return jobs.train_alone(JOB, optimizer=(parts.model, by_hand), before_step=set_rates)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exchange", "size"), [("none", 1), ("native", 2), ("ring@gloo", 3), ("parameter_server", 2)]
)
def test_groups_train_as_torch_alone_and_a_schedule_scales_each_ones_rate(
    exchange: str, size: int, tmp_path: Path
):
    schedule = {"name": "cosine", "warmup_steps": 3, "min_lr": 0.05}

    def set_rates(made: torch.optim.Optimizer, step: int) -> None:
        cosine = 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * step / 6))
        for group, own in zip(made.param_groups, (0.2, 0.4, 0.2), strict=True):
            group["lr"] = own * cosine * min(1, (step + 1) / 3)

    tree = with_groups(GROUPS) | {"exchange": exchange, "lr_schedule": schedule}
    results = run_ranks(jobs.train_rank, size, tree, tmp_path)
    expected = by_torch_alone(set_rates)
    for result in results:
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.from_numpy(result["state"][name]), value, rtol=1e-4, atol=1e-6
            )


@pytest.mark.slow
def test_a_scaled_rate_is_that_of_the_rule(tmp_path: Path):
    tree = JOB | {"exchange": "none", "lr_schedule": {"scaling": {"base_batch": 32}}}
    [scaled] = run_ranks(jobs.train_rank, 1, tree, tmp_path)
    expected = jobs.train_alone(JOB | {"optimizer": JOB["optimizer"] | {"lr": 0.1}})
    for name, value in expected.items():
        torch.testing.assert_close(torch.from_numpy(scaled["state"][name]), value)
    assert [record.lr for record in scaled["records"]] == [0.1] * 6


@pytest.mark.slow
def test_momentum_needs_no_correction_when_the_rate_changes(tmp_path: Path):
    """The steps are those of Goyal et al. 2017, equation 11: the rate is part of the momentum, and
    the momentum is corrected by the ratio of the rates.
    """
    schedule = {"name": "step", "gamma": 0.1, "step_size": 4, "warmup_steps": 3}
    options = {"name": "sgd", "lr": 0.2, "momentum": 0.9}
    tree = JOB | {"exchange": "none", "optimizer": options, "lr_schedule": schedule}
    [result] = run_ranks(jobs.train_rank, 1, tree, tmp_path)
    parts = build(JOB)
    corrected = Corrected(parts.model.parameters(), momentum=0.9)
    rates = [0.2 / 3, 0.4 / 3, 0.2, 0.2, 0.02, 0.02]

    def set_rates(made: torch.optim.Optimizer, step: int) -> None:
        made.param_groups[0]["lr"] = rates[step]

    expected = jobs.train_alone(JOB, optimizer=(parts.model, corrected), before_step=set_rates)
    for name, value in expected.items():
        torch.testing.assert_close(torch.from_numpy(result["state"][name]), value)


class Corrected(torch.optim.Optimizer):
    """v = momentum (lr / lr before) v + lr g; w = w - v."""

    def __init__(self, params: Any, momentum: float):
        super().__init__(params, {"lr": 0.0, "momentum": momentum})
        self._rate_before = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        [group] = self.param_groups
        rate = group["lr"]
        correction = rate / (self._rate_before or rate)
        for parameter in group["params"]:
            velocity = self.state[parameter].setdefault("v", torch.zeros_like(parameter))
            velocity.mul_(group["momentum"] * correction).add_(parameter.grad, alpha=rate)
            parameter.sub_(velocity)
        self._rate_before = rate


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"name": "lars", "lr": 2.0, "trust_coefficient": 0.1, "weight_decay": 0.01},
        {"name": "LAMB", "lr": 0.05, "groups": [{"match": "bias", "adaptive": False}]},
        {"name": "tests.training.test_optimizer:Signs", "lr": 0.02, "decay": 0.1},
    ],
    ids=["lars", "lamb", "own"],
)
def test_optimizers_that_torch_does_not_have_train_alike_on_any_number_of_workers(
    options: dict[str, Any], tmp_path: Path
):
    tree = JOB | {"optimizer": options}
    expected = jobs.train_alone(tree)
    start = build(tree).model.state_dict()
    for exchange, size in (("native", 3), ("ring@gloo", 2)):
        folder = tmp_path / exchange
        folder.mkdir()
        results = run_ranks(jobs.train_rank, size, tree | {"exchange": exchange}, folder)
        for name, value in expected.items():
            assert not torch.equal(value, start[name]), "it moves"
            for result in results:
                torch.testing.assert_close(
                    torch.from_numpy(result["state"][name]), value, rtol=1e-3, atol=1e-5
                )


OWN = "tests.training.test_optimizer:Signs"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "larz"}, "optimizer: 'larz' is not known; did you mean 'lars'?"),
        ({"name": "lars", "momentun": 0.9}, "optimizer.momentun.* did you mean 'momentum'"),
        ({"name": "lars", "momentum": 1.5}, "optimizer.momentum: 1.5 is not allowed"),
        ({"name": "sgd", "groups": [{"lr": 1}]}, r"optimizer.groups\[0\].match: is missing"),
        ({"groups": [{"match": []}]}, r"optimizer.groups\[0\].match: \[\] is not allowed"),
        ({"groups": [{"match": "bias"}]}, r"optimizer.groups\[0\]: sets no option for bias"),
        (
            {"groups": [{"match": "bias", "weight_dekay": 0}]},
            r"optimizer.groups\[0\].weight_dekay.* did you mean 'weight_decay'",
        ),
        (
            {"groups": [{"match": "head", "lr": 1}, {"match": "bias", "lr": "fast"}]},
            r"optimizer.groups\[1\].lr: 'fast' is not allowed",
        ),
        ({"name": f"{OWN}z"}, "no such function in .*did you mean 'Signs'"),
        ({"name": OWN, "decai": 1}, "optimizer.decai.*did you mean 'decay'"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(options: dict[str, Any], told: str):
    root = Path(__file__).parents[2]
    with pytest.raises(UserError, match=told):
        config.check(JOB | {"optimizer": options, "source": str(root / "job.yaml")})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"groups": [{"match": ["bias", "bn*"], "lr": 1}]},
            r"optimizer.groups\[0\].match: 'bn\*' matches no parameter of the model \(there are"
            " body.weight, body.bias",
        ),
        (
            {"groups": [{"match": "*", "lr": 1}, {"match": "bias", "lr": 2}]},
            r"optimizer.groups\[1\].match: groups before it have all parameters",
        ),
        (
            {"groups": [{"match": "bias", "nesterov": True, "momentum": 0}]},
            r"optimizer.groups\[0\]: sgd: Nesterov momentum requires a momentum",
        ),
        (
            {"name": OWN, "groups": [{"match": "bias", "decay": 1}]},
            r"optimizer.groups\[0\]: option that .*Signs has for all groups alike: 'decay'",
        ),
        (
            {"name": "sgd", "nesterov": True},
            "optimizer: sgd: Nesterov momentum requires a momentum",
        ),
        ({"name": OWN, "decay": -1}, "optimizer: .*Signs: negative decay -1"),
        ({"name": OWN, "decai": 1}, "option of .*Signs: 'decai' is not known.*'decay'"),
        ({"name": "tests.training.test_optimizer:build", "tree": 1}, "'tree' is not known"),
        ({"name": "tests.training.test_optimizer:list_of"}, "list_of returned a list"),
    ],
)
def test_what_only_the_model_tells_ends_in_one_line(
    options: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)  # so the source of a class of one's own is not found
    with pytest.raises(UserError, match=told):
        build(JOB | {"optimizer": options})


def list_of(groups: Any) -> list:
    return [*groups]


@pytest.mark.parametrize("name", ["lars", "LAMB", OWN])
def test_servers_refuse_what_only_workers_can_run(name: str):
    tree = JOB | {"optimizer": {"name": name, "lr": 0.1}}
    told = f"(?i)optimizer: '{name}' is not allowed under parameter_server, whose servers run"
    with pytest.raises(UserError, match=told):
        config.check(tree | {"exchange": "parameter_server"})
    config.check(tree | {"exchange": "parameter_server:local_sgd"})


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"lr_schedule": {"min_lr": 0.3}}, "lr_schedule.min_lr: 0.3 is not allowed .*0 to 0.2, "),
        (
            {
                "exchange": {"name": "parameter_server", "server_lr": {"name": "StepLR"}},
                "lr_schedule": "cosine",
            },
            "lr_schedule: would count for nothing: exchange.server_lr sets the servers' rates",
        ),
        ({"lr_schedule": {"scaling": "quadratic"}}, "lr_schedule.scaling.rule: 'quadratic' is not"),
        ({"lr_schedule": {"scaling": {"base_batch": 0}}}, "lr_schedule.scaling.base_batch: 0"),
    ],
)
def test_a_rate_that_means_nothing_is_told(keys: dict[str, Any], told: str):
    with pytest.raises(UserError, match=told):
        config.check(JOB | keys)


def test_options_without_a_name_are_those_of_the_default():
    run = config.check(
        {
            "model": "mlp",
            "data": "digits",
            "batch_size": 8,
            "steps": 1,
            "optimizer": {"momentum": 0.5},
            "loss": {"label_smoothing": 0.1},
            "exchange": {"bucket_mb": 2},
        }
    )
    assert run.optimizer is not None and run.optimizer.name == "sgd"
    assert run.optimizer.options == {"lr": 0.1, "momentum": 0.5}
    assert run.loss.name == "cross_entropy" and run.loss.options == {"label_smoothing": 0.1}
    assert run.exchange.name == "native" and run.exchange.options["bucket_mb"] == 2
