"""Tests ``worker/gradients.py``: which gradients reach the servers, and what they do there."""

import copy
import itertools
import pickle
import random
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol import sharding, wire
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.sharding import ParameterSpec
from scaletrain.parameter_server.server.shard import ModelDescription, Shard
from scaletrain.parameter_server.worker.exchange import ParameterServerExchange
from scaletrain.world import World
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
        self.register_buffer("phase", torch.full((3, 2), complex(seed, 1.0)).t())
        self.register_buffer("large", torch.full((9, 1 << 20), seed, dtype=torch.uint8))

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


class Reader(nn.Module):
    """The rows of its table are read in a way that is not its module's."""

    def __init__(self, read: Callable[[nn.Embedding, Tensor], Tensor], is_tied: bool = False):
        super().__init__()
        with job.SEEDING:
            torch.manual_seed(3)
            self.words = nn.Embedding(30, 4, sparse=True)
            self.rest = nn.Linear(4, 3)
        if is_tied:
            self.output = nn.Linear(4, 30, bias=False)
            self.output.weight = self.words.weight
        self._read = read

    def forward(self, rows: Tensor) -> Tensor:
        return self.rest(self._read(self.words, rows))


def by_function(words: nn.Embedding, rows: Tensor) -> Tensor:
    return functional.embedding(rows, words.weight, sparse=True)


def by_bag(words: nn.Embedding, rows: Tensor) -> Tensor:
    return functional.embedding_bag(rows.int(), words.weight, mode="sum", sparse=True)


def with_dense_gradient(words: nn.Embedding, rows: Tensor) -> Tensor:
    return functional.embedding(input=rows, weight=words.weight)


def in_two_ways(words: nn.Embedding, rows: Tensor) -> Tensor:
    return words(rows) + functional.embedding(29 - rows, words.weight, sparse=True)


def train_reader(
    net: nn.Module, rank: int, steps: int, step: Callable[[], None], each: int
) -> None:
    """Train on rows of this rank; ``each`` of them in a step."""
    for number in range(steps):
        generator = torch.Generator().manual_seed(10 * number + rank)
        net.zero_grad()
        net(torch.randint(0, 30, (each, 2), generator=generator)).square().mean().backward()
        step()


@pytest.mark.parametrize("read", [by_function, by_bag, with_dense_gradient, in_two_ways])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_a_table_may_be_read_by_any_embedding_function(tmp_path, read, kind):
    reference = Reader(read)
    optimizer = kind(reference.parameters(), lr=0.3)
    train_reader(reference, 0, 6, optimizer.step, 5)
    net = Reader(read)
    settings = Settings(1, 20, servers=2, link="tcp")
    with job.servers(settings, tmp_path):
        joined = job.exchange(settings, tmp_path, 0)
        joined.attach(net, kind(net.parameters(), lr=0.3))
        train_reader(net, 0, 6, joined.step, 5)
        copied = copy.deepcopy(net)
        with torch.no_grad():  # of rows that were not in the last batch
            assert_close(net(torch.arange(30)[:, None]), reference(torch.arange(30)[:, None]))
        assert_close(net.state_dict(), reference.state_dict())
        joined.close()
    assert type(copied.words.weight) is nn.Parameter
    assert_close(pickle.loads(pickle.dumps(net.words)).weight, reference.words.weight)


def assert_close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("link", ["unix", "tcp"])
@pytest.mark.parametrize("options", [{}, {"mode": "async"}], ids=["sync", "async"])
def test_rows_of_many_messages_change_no_bit(tmp_path, monkeypatch, link, options):
    """A batch of 40 rows, of which a message holds three."""

    def train(folder) -> list[dict[str, Tensor]]:
        workers = 1 if options else 2
        settings = Settings(workers, 20, servers=2, link=link, **options)

        def work(rank: int) -> dict[str, Tensor]:
            net = Reader(by_function)
            joined = job.exchange(settings, folder, rank)
            joined.attach(net, torch.optim.Adagrad(net.parameters(), lr=0.3))
            train_reader(net, rank, 5, joined.step, 20)
            joined.sum(torch.zeros(1))
            state = {name: value.clone() for name, value in net.state_dict().items()}
            joined.close()
            return state

        with job.servers(settings, folder):
            return job.threads([lambda rank=rank: work(rank) for rank in range(workers)])

    whole = train(tmp_path / "whole")
    monkeypatch.setattr(wire, "MAX_TENSOR_BYTES", 3 * 4 * 4)
    for before, after in zip(whole, train(tmp_path / "parts"), strict=True):
        for name, value in before.items():
            assert torch.equal(value, after[name]), name


@pytest.mark.parametrize(
    "net, message",
    [
        (nn.Embedding(10, 4, max_norm=1.0), "does not take embedding .* max_norm"),
        (Reader(by_function, is_tied=True), "output.weight is the weight of a sparse embedding"),
    ],
    ids=["max_norm", "tied"],
)
def test_embeddings_that_change_or_are_read_without_the_servers_are_refused(tmp_path, net, message):
    with pytest.raises(UserError, match=message):
        job.exchange(Settings(1), tmp_path, 0).attach(net, torch.optim.SGD(net.parameters()))


@pytest.mark.parametrize(
    "read, message",
    [
        (lambda words, rows: words(rows) @ words.weight.t() @ torch.ones(30, 4), "and t reads it"),
        (lambda words, rows: words.weight[rows], "and __getitem__ reads it"),
        (lambda words, rows: torch.cat([words(rows[0]), words.weight]), "and cat reads it"),
        (
            lambda words, rows: functional.embedding(rows, words.weight, max_norm=1.0),
            "does not take embedding of words.weight with max_norm 1.0",
        ),
    ],
    ids=["product", "index", "list", "max_norm"],
)
def test_other_functions_that_read_a_table_are_refused_before_backward(tmp_path, read, message):
    net = Reader(read)
    with job.servers(Settings(1, 20), tmp_path):
        joined = job.exchange(Settings(1, 20), tmp_path, 0)
        joined.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        with pytest.raises(UserError, match=message):
            net(torch.tensor([[2, 7]]))
        joined.close()


def test_old_rows_are_not_taken_for_new_ones_after_the_end(tmp_path):
    net = Reader(by_function)
    with job.servers(Settings(1, 20), tmp_path):
        joined = job.exchange(Settings(1, 20), tmp_path, 0)
        joined.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        train_reader(net, 0, 2, joined.step, 5)
        joined.close()
    for use in (net.state_dict, lambda: net(torch.tensor([[2, 7]]))):
        with pytest.raises(UserError, match=r"words.weight were with the servers.* state_dict\(\)"):
            use()


def one_cycle(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)


def load_weights(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net.load_state_dict(net.state_dict())


def load_state(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def thaw(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net[2].requires_grad_(True)


@pytest.mark.parametrize(
    "change, message",
    [
        (one_cycle, "momentum of group 0 was changed to 0.95, and the servers have 0.9"),
        (load_weights, "load_state_dict after attach does not reach the servers"),
        (load_state, "load_state_dict after attach does not reach the servers"),
        (thaw, "parameter 2.weight has a gradient, and needed none at attach"),
    ],
)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_changes_that_servers_do_not_hear_of_are_refused(tmp_path, change, message, mode):
    """They changed what torch alone does, and nothing here."""
    net, settings = job.model(), Settings(1, 20, mode=mode)
    net[2].requires_grad_(False)
    with job.servers(settings, tmp_path):
        joined = job.exchange(settings, tmp_path, 0)
        optimizer = torch.optim.SGD(net.parameters(), **job.SGD)
        joined.attach(net, optimizer)
        with pytest.raises(UserError, match=message):
            change(net, optimizer)
            job.loss(net, 0, 0).backward()
            joined.step()


def test_untrained_tensors_fit_into_the_jobs_store(tmp_path):
    """torch's own store, which takes values of 8 MiB at most."""
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    other = dist.TCPStore("127.0.0.1", store.port, None, wait_for_workers=False)
    settings = Settings(2, 20, placement="dedicated")

    def attach(rank: int, store: dist.Store) -> Sometimes:
        net = Sometimes(rank)
        world = World(rank, 2, rank, 2, launcher="local")
        joined = ParameterServerExchange(settings, world, tmp_path, store)
        joined.attach(net, adamw(net))
        joined.close()
        return net

    with job.servers(settings, tmp_path):
        first, second = job.threads([lambda: attach(0, store), lambda: attach(1, other)])
    for name in ("frozen", "counter", "mask", "phase", "large"):
        assert torch.equal(getattr(first, name), getattr(Sometimes(0), name)), name
        assert torch.equal(getattr(second, name), getattr(first, name)), name


def test_runs_of_mode_sync_are_equal_bit_by_bit(tmp_path):
    """Four workers, whose gradients come in another order in every step and run."""
    order = random.Random(0)

    def pause(step: int, joined) -> None:
        time.sleep(0.005 * order.random())

    runs = []
    for number in range(3):
        settings = Settings(4, 20, servers=2, block_mb=0.002)
        runs += job.train(settings, tmp_path / str(number), 8, on_step=pause)
    for weights, _ in runs:
        for ours, expected in zip(weights, runs[0][0], strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_parameters_that_float32_cannot_hold_are_refused(tmp_path, dtype):
    net = nn.Linear(3, 3, dtype=dtype)
    with pytest.raises(UserError, match="does not train parameter weight of type"):
        job.exchange(Settings(1), tmp_path, 0).attach(net, torch.optim.SGD(net.parameters()))
