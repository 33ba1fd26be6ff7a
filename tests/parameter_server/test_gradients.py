"""Tests ``worker/gradients.py``: which gradients reach the servers, and what they do there."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol import sharding, wire
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.sharding import ParameterSpec
from scaletrain.parameter_server.server.shard import ModelDescription, Shard
from tests.parameter_server import job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]
STEPS = 9
ROWS = 40


class Sometimes(nn.Module):
    """Parts of it are used in some steps only, by some workers; parts of it are not trained."""

    def __init__(self, seed: int):
        super().__init__()
        with job.SEEDING:
            torch.manual_seed(3)
            self.always = nn.Linear(6, 5)
            self.rare = nn.Linear(5, 5)
            self.words = nn.EmbeddingBag(ROWS, 5, sparse=True, mode="sum")
            self.never = nn.Parameter(torch.ones(4))
        # Every worker has values of its own, until rank 0's are shared.
        self.frozen = nn.Parameter(torch.full((5 << 19,), float(seed)), requires_grad=False)
        self.register_buffer("counter", torch.tensor([seed, 1 << 40]))
        self.register_buffer("mask", torch.zeros(0, dtype=torch.bool))

    def loss(self, step: int, rank: int) -> Tensor:
        """Return a loss that depends on ``rare`` and ``words`` as step and rank say."""
        generator = torch.Generator().manual_seed(100 * step + rank)
        hidden = self.always(torch.randn(4, 6, generator=generator))
        if step % 3 == 0 or (step % 3 == 1 and rank == 0):
            hidden = self.rare(hidden.tanh())
            rows = torch.randint(0, ROWS, (4, 3), generator=generator)
            hidden = hidden + self.words(input=rows)
        return hidden.square().mean()


def adamw(net: Sometimes) -> torch.optim.Optimizer:
    net.words.sparse = False
    return torch.optim.AdamW(two_groups(net), weight_decay=0.1)


def adagrad(net: Sometimes) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(two_groups(net), lr_decay=0.1)


def two_groups(net: Sometimes) -> list[dict]:
    rest = [net.rare.bias, *net.words.parameters(), net.never]
    return [
        {"params": [*net.always.parameters(), net.rare.weight], "lr": 0.05},
        {"params": rest, "lr": 0.01},
    ]


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Each group has a schedule of its own."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda step: 0.8**step, lambda step: 1.0 + step]
    )


def alone(make, workers: int, max_norm: float | None = None) -> tuple[Sometimes, dict]:
    net = Sometimes(0)
    optimizer = make(net)
    rates = schedule(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(net.loss(step, rank) for rank in range(workers)) / workers).backward()
        if max_norm:
            nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        optimizer.step()
        rates.step()
    return net, optimizer.state_dict()["state"]


def with_servers(settings, folder, make, max_norm: float | None = None) -> list:
    def train(rank: int):
        net = Sometimes(rank)
        optimizer = make(net)
        rates = schedule(optimizer)
        joined = job.exchange(settings, folder, rank)
        joined.attach(net, optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            if max_norm:
                with joined.accumulate():
                    net.loss(step, rank).backward()
                nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            else:
                net.loss(step, rank).backward()
            joined.step()
            rates.step()
        joined.sum(torch.zeros(1))  # all updates are done
        net.state_dict()  # fetches the tables
        state = optimizer.state_dict()["state"]
        joined.close()
        return net, state

    with job.servers(settings, folder):
        return job.threads([lambda r=rank: train(r) for rank in range(settings.workers)])


@pytest.mark.parametrize(
    "make, settings",
    [
        (adamw, Settings(2, 20)),
        (adamw, Settings(2, 20, servers=2, link="tcp", block_mb=0.0001)),
        (adamw, Settings(1, 20, mode="async", link="tcp")),
        (adagrad, Settings(2, 20, servers=2)),
    ],
    ids=["one block", "small blocks", "async", "sparse table"],
)
def test_a_parameter_without_a_gradient_is_left_alone(tmp_path, make, settings):
    """As torch does: no decay, no momentum, no step counted. Groups have rates of their own, and
    all that is not trained is rank 0's.
    """
    expected, expected_state = alone(make, settings.workers)
    for net, state in with_servers(settings, tmp_path, make):
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(net.never, torch.ones(4))
        for number, values in expected_state.items():
            for name, value in values.items():
                torch.testing.assert_close(state[number][name], value, rtol=1e-5, atol=1e-6)


def test_gradients_that_were_clipped_in_time_are_those_that_count(tmp_path):
    expected, _ = alone(adamw, 1, max_norm=0.1)
    [(net, _)] = with_servers(Settings(1, 20), tmp_path, adamw, max_norm=0.1)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: nn.utils.clip_grad_norm_(net.parameters(), 0.1),
        lambda net: net.zero_grad(),
        lambda net: setattr(net[0].weight, "grad", torch.ones(40, 12)),
    ],
    ids=["clipped", "removed", "replaced"],
)
def test_gradients_that_are_changed_too_late_are_refused(tmp_path, change):
    net, settings = job.model(), Settings(1, 20)
    with job.servers(settings, tmp_path):
        joined = job.exchange(settings, tmp_path, 0)
        joined.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        job.loss(net, 0, 0).backward()
        change(net)
        with pytest.raises(UserError, match=r"gradient of \d\.\w+ was changed .*accumulate\(\)"):
            joined.step()


def test_the_order_of_arrival_changes_no_bit():
    torch.manual_seed(0)
    gradients = [torch.randn(500) * 10.0**rank for rank in range(4)]
    blocks = [sharding.to_json(block) for block in sharding.plan([ParameterSpec((500,))], 1)]
    optimizer = {"name": "SGD", "groups": [{"lr": 1.0}]}
    for ranks in ([0, 1, 2, 3], [1, 3], [2]):  # all of them, or some are lost
        total = gradients[ranks[0]].clone()
        for rank in ranks[1:]:
            total += gradients[rank]
        expected = -(total / len(ranks))
        shard = Shard(Settings(4, 20), 0, ModelDescription(blocks, optimizer))
        for version, order in enumerate(itertools.permutations(ranks), 1):
            shard.weights(0).zero_()
            for rank in order:
                shard.add(0, rank, gradients[rank])
            shard.apply(0, len(ranks), 1.0, version)
            assert torch.equal(shard.weights(0), expected), order


class Tied(nn.Module):
    """The rows of its table are read in two ways."""

    def __init__(self, is_seen: bool):
        super().__init__()
        self.words = nn.Embedding(10, 4, sparse=True)
        if is_seen:
            self.output = nn.Linear(4, 10, bias=False)
            self.output.weight = self.words.weight

    def forward(self, rows: Tensor) -> Tensor:
        read = nn.functional.embedding(rows + 1, self.words.weight, sparse=True)
        return self.words(rows) + read


@pytest.mark.parametrize(
    "net, message",
    [
        (nn.Embedding(10, 4, max_norm=1.0), "does not take embedding .* max_norm"),
        (Tied(is_seen=True), "output.weight is the weight of a sparse embedding, too"),
    ],
    ids=["max_norm", "tied"],
)
def test_embeddings_that_change_or_are_read_without_the_servers_are_refused(tmp_path, net, message):
    with pytest.raises(UserError, match=message):
        job.exchange(Settings(1), tmp_path, 0).attach(net, torch.optim.SGD(net.parameters()))


def test_rows_that_were_not_fetched_are_noticed_in_the_first_step(tmp_path):
    net = Tied(is_seen=False)
    with job.servers(Settings(1, 20), tmp_path):
        joined = job.exchange(Settings(1, 20), tmp_path, 0)
        joined.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        with pytest.raises(UserError, match=r"embedding words\.weight when its"):
            net(torch.tensor([2, 7])).sum().backward()


def test_more_rows_than_a_message_holds_are_refused_before_they_are_read(tmp_path, monkeypatch):
    net = nn.Embedding(10, 4, sparse=True)
    with job.servers(Settings(1, 20), tmp_path):
        joined = job.exchange(Settings(1, 20), tmp_path, 0)
        joined.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 3 * 4 * 4)
        net(torch.tensor([0, 1, 2]))
        with pytest.raises(UserError, match="a step reads 4 rows of the sparse embedding weight"):
            net(torch.tensor([0, 1, 2, 3]))
        monkeypatch.undo()
        joined.close()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_parameters_that_float32_cannot_hold_are_refused(tmp_path, dtype):
    net = nn.Linear(3, 3, dtype=dtype)
    with pytest.raises(UserError, match="does not train parameter weight of type"):
        job.exchange(Settings(1), tmp_path, 0).attach(net, torch.optim.SGD(net.parameters()))
