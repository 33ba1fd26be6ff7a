"""Tests of training/checkpoint.py and the formats under it (tensor_file.py, state_tree.py).

Checkpoints give back weights, optimizer state and extra state bit for bit; damaged and foreign
files are refused in one line, and the one before is loaded.
"""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from scaletrain.errors import UserError
from scaletrain.training import checkpoint, tensor_file
from scaletrain.training.checkpoint import State


def job(kind: str = "Adam", width: int = 5) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    options = {"momentum": 0.9} if kind == "SGD" else {}
    return model, getattr(torch.optim, kind)(model.parameters(), lr=0.1, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model.zero_grad()
        model(
            torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        ).square().mean().backward()
        optimizer.step()


def loaded_step(run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    loaded = checkpoint.load_latest(run_dir, State(model, optimizer))
    assert loaded is not None and loaded.damaged == []
    return loaded.step


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    for (name, value), other in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


@pytest.mark.parametrize(
    "kind",
    [
        "SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam",
        "Rprop", "Adafactor",
    ],
)  # fmt: skip
def test_resumed_training_equals_uninterrupted_training(kind: str, tmp_path: Path):
    model, optimizer = job(kind)
    train(model, optimizer, range(5))
    checkpoint.save(tmp_path, 5, State(model, optimizer), keep=2)
    train(model, optimizer, range(5, 9))
    again, optimizer_again = job(kind)
    assert loaded_step(tmp_path, again, optimizer_again) == 5
    train(again, optimizer_again, range(5, 9))
    for (name, value), other in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_only_the_newest_stay_and_numbers_sort_as_numbers(tmp_path: Path):
    model, optimizer = job()
    for step in (8, 9, 10, 100):
        checkpoint.save(tmp_path, step, State(model, optimizer), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-10.safetensors",
        "step-100.safetensors",
    ]
    assert loaded_step(tmp_path, model, optimizer) == 100


def test_nothing_to_load(tmp_path: Path):
    assert checkpoint.load_latest(tmp_path, State(*job())) is None


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:100], lambda b: b[: len(b) - 7], lambda b: b"", lambda b: b"\xff" * 64 + b[64:]],
)
def test_a_damaged_file_is_refused(damage, tmp_path: Path):
    path = checkpoint.save(tmp_path, 1, State(*job()), keep=1)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"step-1\.safetensors: damaged checkpoint"):
        checkpoint.load_latest(tmp_path, State(*job()))


def test_another_models_file_is_refused(tmp_path: Path):
    checkpoint.save(tmp_path, 1, State(*job()), keep=1)
    with pytest.raises(UserError, match="another model or optimizer"):
        checkpoint.load_latest(tmp_path, State(*job(width=6)))


def data_begins_at(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path):
    model, optimizer = job()
    train(model, optimizer, range(2))
    path = checkpoint.save(tmp_path, 2, State(model, optimizer), keep=1)
    whole = path.read_bytes()
    begin = data_begins_at(whole)
    draw = random.Random(5)
    positions = [draw.randrange(begin, len(whole)) for _ in range(30)] + [begin, len(whole) - 1]
    for position in positions:
        flip(path, position, draw.randrange(8))
        with pytest.raises(UserError) as error:
            checkpoint.load_latest(tmp_path, State(*job()))
        assert str(error.value).startswith(f"{path}: damaged checkpoint (tensor ")
        assert "does not have the hash it was written with)" in str(error.value)
        path.write_bytes(whole)
    # In the header a flipped bit may also turn the file into that of another program, or a space
    # into another one, which changes nothing.
    for _ in range(60):
        flip(path, draw.randrange(0, begin), draw.randrange(8))
        again, optimizer_again = job()
        try:
            checkpoint.load_latest(tmp_path, State(again, optimizer_again))
            assert_same_state(model, again)
        except UserError as error:
            assert str(error).startswith(f"{path}: "), error
        path.write_bytes(whole)


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_loaded(tmp_path: Path):
    model, optimizer = job()
    for step in (1, 2, 3):
        train(model, optimizer, range(step - 1, step))
        checkpoint.save(tmp_path, step, State(model, optimizer), keep=3)
        if step == 1:
            expected = {name: value.clone() for name, value in model.state_dict().items()}
    second, third = tmp_path / "step-2.safetensors", tmp_path / "step-3.safetensors"
    flip(second, second.stat().st_size - 2, 3)
    third.write_bytes(third.read_bytes()[:-50])
    again, optimizer_again = job()
    loaded = checkpoint.load_latest(tmp_path, State(again, optimizer_again))
    assert loaded is not None and loaded.step == 1
    assert [line.split(":")[0] for line in loaded.damaged] == [str(third), str(second)]
    assert all("damaged checkpoint" in line for line in loaded.damaged)
    for name, value in again.state_dict().items():
        assert torch.equal(value, expected[name]), name
    # Training goes on from the first. What it saves counts, not the damaged ones of later steps.
    train(again, optimizer_again, range(1, 2))
    checkpoint.save(tmp_path, 2, State(again, optimizer_again), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [second.name, third.name]
    loaded = checkpoint.load_latest(tmp_path, State(*job()))
    assert loaded is not None and loaded.step == 2 and len(loaded.damaged) == 1


def test_if_none_is_whole_all_are_named(tmp_path: Path):
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, State(*job()), keep=2)
        path.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"step-2\.safetensors: damaged.*step-1\.safetensors: damaged"
    ):
        checkpoint.load_latest(tmp_path, State(*job()))


def test_another_model_is_no_damage(tmp_path: Path):
    checkpoint.save(tmp_path, 1, State(*job()), keep=2)
    checkpoint.save(tmp_path, 2, State(*job(width=6)), keep=2)
    with pytest.raises(UserError, match=r"step-2\.safetensors: belongs to another model"):
        checkpoint.load_latest(tmp_path, State(*job()))


def test_other_libraries_read_the_weights(tmp_path: Path):
    model, optimizer = job()
    tensors = load_file(checkpoint.save(tmp_path, 1, State(model, optimizer), keep=1))
    for name, value in model.state_dict().items():
        assert torch.equal(tensors[f"model.{name}"], value)


def test_an_earlier_version_is_refused_in_one_line(tmp_path: Path):
    path = tmp_path / "step-4.safetensors"
    tensor_file.write(path, "scaletrain-checkpoint-1", tensor_file.Content({}, {}))
    with pytest.raises(UserError, match="written by an earlier version of this program") as error:
        checkpoint.load_latest(tmp_path, State(*job()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        (
            "SGD",
            {},
            "optimizer: SGD cannot go on with the state of Adam .allowed: the same optimizer",
        ),
        ("AdamW", {}, "optimizer: AdamW cannot go on with the state of Adam"),
        ("Adam", {"amsgrad": True}, "Adam with these options needs max_exp_avg_sq"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(
    kind: str, options: dict[str, Any], line: str, tmp_path: Path
):
    model, optimizer = job("Adam")
    train(model, optimizer, range(1))
    checkpoint.save(tmp_path, 1, State(model, optimizer), keep=1)
    other = getattr(torch.optim, kind)(model.parameters(), lr=0.1, **options)
    with pytest.raises(UserError, match=line) as error:
        checkpoint.load_latest(tmp_path, State(model, other))
    assert "or a new run directory" in str(error.value)


def test_state_goes_to_its_parameter_in_other_groups(tmp_path: Path):
    model, optimizer = job("Adam")
    train(model, optimizer, range(2))
    checkpoint.save(tmp_path, 2, State(model, optimizer), keep=1)
    parameters = list(model.parameters())
    other = torch.optim.Adam([{"params": parameters[3:]}, {"params": parameters[:3]}])
    checkpoint.load_latest(tmp_path, State(model, other))
    for parameter in parameters:
        before, now = optimizer.state[parameter], other.state[parameter]
        assert torch.equal(before["exp_avg"], now["exp_avg"])


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path):
    model, optimizer = job("Adam")
    checkpoint.save(tmp_path, 1, State(model, optimizer), keep=1)
    names = [name for name, _ in model.named_parameters()]
    other = torch.optim.Adam([*model.parameters()][1:])
    with pytest.raises(UserError, match=f"optimizer: it holds {names[0]} either in the checkpoint"):
        checkpoint.load_latest(tmp_path, State(model, other))


def test_momentum_may_begin_later(tmp_path: Path):
    """It makes good for the state that the checkpoint does not hold, as torch alone does."""
    model, _ = job()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, range(2))
    checkpoint.save(tmp_path, 2, State(model, optimizer), keep=1)
    again, _ = job()
    other = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
    assert loaded_step(tmp_path, again, other) == 2
    other_alone = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(again, other, range(2, 5))
    train(model, other_alone, range(2, 5))
    assert_same_state(model, again)


class WithState(nn.Module):
    """A linear layer with a state that is no tensor of its own."""

    def __init__(self, state: Any):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.state = state

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    "state",
    [
        torch.arange(4),
        {"seen": 12, "scale": 0.5, "names": ["a", "b"], "pair": (1, None), 7: "key"},
        {"history": [torch.ones(2), torch.zeros((), dtype=torch.int64)]},
        None,
    ],
    ids=["tensor", "json", "nested tensors", "none"],
)
def test_extra_state_comes_back(state: Any, tmp_path: Path):
    model = nn.Sequential(WithState(state), nn.Linear(2, 1))
    checkpoint.check_saveable(State(model, sgd(model)))
    checkpoint.save(tmp_path, 1, State(model, sgd(model)), keep=1)
    again = nn.Sequential(WithState("other"), nn.Linear(2, 1))
    assert loaded_step(tmp_path, again, sgd(again)) == 1
    restored = again[0].state
    assert type(restored) is type(state)
    assert repr(restored) == repr(state)  # a comparison with == would be one of tensors


def sparse() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.eye(2).to_sparse())
    return model


def double_complex() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.zeros(2, dtype=torch.complex128))
    return model


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: nn.Sequential(WithState(object())), r"extra\.0\._extra_state, of type object"),
        (lambda: WithState({"a": [1, {2}]}), r"extra\._extra_state\.a\.1, of type set"),
        (lambda: WithState({(1, 2): 1}), r"extra\._extra_state, which has a key of type tuple"),
        (sparse, r"model\.mask, a sparse tensor"),
        (double_complex, r"model\.scale, of type torch\.complex128"),
        (lambda: nn.Linear(2, 2, device="meta"), r"model\.weight, which is on the device meta"),
        (lambda: nn.LazyLinear(3), r"model\.weight, which has no shape yet: a lazy module"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_cannot_be_saved_is_named_before_training(make: Any, line: str):
    model = make()
    with pytest.raises(UserError, match=rf"^checkpoint: cannot hold {line}.*\(allowed: "):
        checkpoint.check_saveable(State(model, torch.optim.SGD(model.parameters(), lr=0.1)))


def test_a_trial_of_a_good_model_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.check_saveable(State(*job()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_never_written(bad: float, tmp_path: Path):
    model, optimizer = job()
    checkpoint.save(tmp_path, 1, State(model, optimizer), keep=1)
    with torch.no_grad():
        model[2].weight[1, 2] = bad
    with pytest.raises(UserError, match=r"2\.weight holds nan or inf after step 2.*step 1 stays"):
        checkpoint.save(tmp_path, 2, State(model, optimizer), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1.safetensors"]
    assert loaded_step(tmp_path, *job()) == 1


def test_huge_weights_and_masks_are_finite_enough(tmp_path: Path):
    model, optimizer = job()
    with torch.no_grad():
        model[2].weight.fill_(torch.finfo(torch.float32).max)  # their sum is inf
    model.register_buffer("mask", torch.full((2, 2), -float("inf")))
    checkpoint.save(tmp_path, 1, State(model, optimizer), keep=1)
    model.mask[0, 0] = float("nan")
    with pytest.raises(UserError, match="mask holds nan"):
        checkpoint.save(tmp_path, 2, State(model, optimizer), keep=1)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_bf16_and_other_types_come_back(tmp_path: Path):
    model, _ = job()
    model = model.to(torch.bfloat16)
    for number, dtype in enumerate(tensor_file.DTYPES.values()):
        values = torch.arange(6).reshape(2, 3).to(dtype)
        model.register_buffer(f"buffer_{number}", values)
    model.register_buffer("empty", torch.empty(0, 3))
    model.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
    optimizer.step()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    expected_state = optimizer.state_dict()["state"]
    checkpoint.save(tmp_path, 1, State(model, optimizer), keep=1)
    for value in model.state_dict().values():
        value.zero_()
    other = torch.optim.Adam(model.parameters())
    assert loaded_step(tmp_path, model, other) == 1
    for name, value in model.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(raw(value), raw(expected[name])), name
    for index, entries in expected_state.items():
        for name, value in entries.items():
            assert torch.equal(other.state_dict()["state"][index][name], value), name


def test_tied_weights_stay_tied(tmp_path: Path):
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
        return model

    model, again = tied(), tied()
    checkpoint.save(tmp_path, 1, State(model, sgd(model)), keep=1)
    assert loaded_step(tmp_path, again, sgd(again)) == 1
    assert_same_state(model, again)
    assert again[0].weight is again[1].weight


@pytest.mark.parametrize(("saved", "loaded"), [(True, False), (False, True), (True, True)])
def test_compiling_changes_nothing_in_a_file(saved: bool, loaded: bool, tmp_path: Path):
    def net(is_compiled: bool) -> nn.Module:
        torch.manual_seed(1 + is_compiled)
        layers = [nn.Linear(3, 4), WithState({"compiled": is_compiled}), nn.Linear(2, 2)]
        if is_compiled:  # as a whole, and a layer once more; nothing is compiled before a forward
            layers[2] = torch.compile(layers[2], backend="eager")
            return torch.compile(nn.Sequential(*layers), backend="eager")
        return nn.Sequential(*layers)

    model, again = net(saved), net(loaded)
    path = checkpoint.save(tmp_path, 1, State(model, sgd(model)), keep=1)
    assert not [name for name in load_file(path) if "_orig_mod" in name]
    assert loaded_step(tmp_path, again, sgd(again)) == 1
    for first, second in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)
    assert dict(again.named_modules())["_orig_mod.1" if loaded else "1"].state == {
        "compiled": saved
    }


def test_options_of_the_optimizer_count_and_its_state_stays(tmp_path: Path):
    """Bit for bit as torch alone, which changes the options of the same optimizer."""
    model, _ = job()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.05)
    train(model, optimizer, range(4))
    checkpoint.save(tmp_path, 4, State(model, optimizer), keep=1)
    again, _ = job()
    other = torch.optim.AdamW(again.parameters(), lr=0.02, weight_decay=0.3)
    assert loaded_step(tmp_path, again, other) == 4
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.3
        group["lr"] = 0.02
    train(again, other, range(4, 8))
    train(model, optimizer, range(4, 8))
    assert_same_state(model, again)


_WRITE_FOR_EVER = """
import sys, torch
from pathlib import Path
from torch import nn
from scaletrain.training import checkpoint
from scaletrain.training.checkpoint import State
torch.manual_seed(1)
model = nn.Linear(700, 700)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(1, 100000):
    torch.nn.init.constant_(model.bias, step)
    checkpoint.save(Path(sys.argv[1]), step, State(model, optimizer), keep=2)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path):
    """Twenty kills: children that are forked have torch already."""
    draw = random.Random(3)
    for attempt in range(20):
        run_dir = tmp_path / str(attempt)
        run_dir.mkdir()
        child = os.fork()
        if child == 0:
            try:
                sys.argv = ["", str(run_dir)]
                with open(run_dir / "said", "w") as said:
                    os.dup2(said.fileno(), 1)
                sys.stdout = os.fdopen(1, "w")
                torch.set_num_threads(1)
                exec(_WRITE_FOR_EVER, {})
            finally:
                os._exit(1)
        deadline = time.monotonic() + 20
        while not (run_dir / "step-3.safetensors").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = int((run_dir / "said").read_text().split()[-1])
        model = nn.Linear(700, 700)
        loaded = checkpoint.load_latest(
            run_dir, State(model, torch.optim.SGD(model.parameters(), lr=0.1))
        )
        assert loaded is not None and loaded.damaged == []
        assert loaded.step >= said, "a save that has returned is on disk"
        assert (model.bias == loaded.step).all()


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path):
    path = checkpoint.save(tmp_path, 1, State(*job()), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, hard))
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save(tmp_path, 2, State(*job()), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1.safetensors"]
    assert loaded_step(tmp_path, *job()) == 1
