"""Servers own weights and optimizer: sync, backup workers, async, bounded staleness, local SGD."""

import contextlib
import functools
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scaletrain.parameter_server.protocol import placement as where
from scaletrain.parameter_server.protocol.settings import (
    ParameterServerOptions,
    Settings,
    settings_from_options,
)
from scaletrain.parameter_server.worker.client import Answer, Client
from scaletrain.parameter_server.worker.replica import Replica
from scaletrain.training.exchange import Exchange, Setup
from scaletrain.world import World

# The options that people set, each with its meaning. ``plugins.options`` reads them from this line.
OPTIONS = ParameterServerOptions


def exchange(world: World, setup: Setup, **options: Any) -> Exchange:
    """Return this worker's end of the exchange, not attached yet.

    Args:
        world: this worker's place.
        setup: the job's store, device, timeout and run directory.
        options: the fields of ``OPTIONS``.

    Raises:
        UserError: options that contradict each other.
    """
    hosts = where.hosts(world.launcher, world.num_nodes)
    timeout_s = setup.timeout.total_seconds()
    settings = settings_from_options(options, world.size, timeout_s, hosts)
    return ParameterServerExchange(world, setup, settings)


class ParameterServerExchange(Exchange):
    """Gradients are pushed as backward makes them; ``step`` waits for the new weights.

    The learning rate has to be in the optimizer's groups before backward, since gradients leave during it.
    Buffers (batch norm's statistics) and frozen parameters are made equal once, at the start.
    """

    def __init__(self, world: World, setup: Setup, settings: Settings):
        self.world, self._setup, self._settings = world, setup, settings
        configured = (setup.run_dir / "config.yaml").exists()  # else nobody has started companions
        beside = where.resolve(settings, world.launcher, configured) == where.BESIDE
        self._own_server = (
            _Beside(settings, setup.run_dir, world.rank)
            if beside and world.rank < settings.servers
            else None
        )
        self._steps = 0  # of the job, as this rank knows
        self._lag = 0  # of them done without this rank, and not yet left out by it
        self._offset = 0  # what servers lost when they were restarted
        self._reconnects = 0
        self._accumulating = False
        self._record: dict[str, float] = {}
        self._client: Client | None = None
        self._hooks: list[RemovableHandle] = []

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        self._optimizer = optimizer
        self._replica = replica = Replica(model, optimizer, self._settings)
        self._share_rest(model)
        self._client = client = Client(
            self._settings, self._setup.run_dir, self.world.rank, replica.blocks, replica.optimizer
        )
        replica.connect(client)
        self._steps = self._lag = self._job_steps(client.step)
        if self.world.rank == 0 and not client.initialised:
            if not self._settings.local:  # else the state is that of the worker's own optimizer
                replica.send_state(optimizer)
            for block in replica.blocks:
                replica.store(block)
        for block in replica.blocks:
            replica.pull(block)
        self._begin()
        if self._settings.local:
            self._anchor = [p.detach().clone() for p in replica.parameters]
        else:
            # Checkpoints hold what the servers hold, as long as they are there.
            self._hooks.append(optimizer.register_state_dict_pre_hook(replica.fetch_state))
            for index, parameter in enumerate(replica.parameters):
                parameter.register_post_accumulate_grad_hook(
                    functools.partial(self._on_gradient, index)
                )
            self._watch_tables(model)
        self._sent, self._received = client.bytes_sent, client.bytes_received
        return model

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        return self._without_pushing()

    def step(self, lr: float) -> None:
        began = time.perf_counter()
        answers = self._local_step(lr) if self._settings.local else self._finish_step(lr)
        self._steps += 1
        client = self._client
        assert client
        client.step = self._steps
        if self._settings.mode == "sync":
            self._notice_lag(client)
        used = [answer.staleness for answer in answers if not answer.dropped]
        self._record = {
            "bytes_sent": client.bytes_sent - self._sent,
            "bytes_received": client.bytes_received - self._received,
            "staleness": sum(used) / len(used) if used else 0.0,
            "staleness_max": max(used, default=0),
            "dropped": sum(answer.dropped for answer in answers) / max(1, len(answers)),
            "wait_s": time.perf_counter() - began,
        }
        self._sent, self._received = client.bytes_sent, client.bytes_received

    def skip(self, most: int) -> int:
        skipped = min(most, self._lag)
        self._lag -= skipped
        return skipped

    def sum(self, values: Tensor) -> Tensor:
        assert self._client
        return torch.from_numpy(self._client.sum(values.double().numpy()).copy()).to(values.dtype)

    def live_workers(self) -> int:
        return (self._client.live() if self._client else 0) or self.world.size

    def record(self) -> dict[str, float]:
        return self._record

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._client:
            self._replica.close()
            self._client.close()
        if self._own_server:
            self._own_server.close()

    # Gradients

    @contextlib.contextmanager
    def _without_pushing(self) -> Iterator[None]:
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def _rate(self, index: int) -> float:
        rate = float(self._optimizer.param_groups[self._replica.groups[index]]["lr"])
        # An asynchronous step of all workers is as many updates: together they move as far as a synchronous step's one.
        divided = self._settings.divide_lr and self._settings.mode in ("async", "bounded")
        return rate / self.world.size if divided else rate

    def _on_gradient(self, index: int, parameter: Tensor) -> None:
        if not self._accumulating:
            self._push(index, parameter.grad)

    def _begin(self) -> None:
        self._replica.begin()
        self._pushed: set[int] = set()

    def _push(self, index: int, gradient: Tensor | None) -> None:
        if index in self._pushed:
            raise RuntimeError(
                "a second backward pass in one step: wrap all but the last in exchange.accumulate()"
            )
        self._pushed.add(index)
        self._replica.push(index, gradient, self._steps, self._rate(index))

    def _finish_step(self, lr: float) -> list[Answer]:
        if self._settings.server_lr is None and any(
            group["lr"] != lr for group in self._optimizer.param_groups
        ):
            raise ValueError(
                f"step(lr={lr}): the gradients have left with rate {self._optimizer.param_groups[0]['lr']}:"
                " set the rate in the optimizer's groups before backward"
            )
        for index in range(len(self._replica.parameters)):
            if index not in self._pushed:  # this loss did not depend on it
                self._push(index, None)
        return self._take()

    def _take(self) -> list[Answer]:
        """Wait for the new weights, those of the last layers first, whose gradients left first: they are copied while others are updated."""
        answers = [self._replica.take(block) for block in reversed(self._replica.blocks)]
        self._begin()
        return answers

    def _notice_lag(self, client: Client) -> None:
        version = client.version()
        if client.reconnects != self._reconnects:
            self._reconnects, self._offset = client.reconnects, self._steps - version
        ahead = max(0, version + self._offset - self._steps)
        self._lag += ahead
        self._steps += ahead

    # Local steps

    def _local_step(self, lr: float) -> list[Answer]:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        rounds = self._rounds(self._steps + 1)
        if rounds == self._rounds(self._steps):
            return []
        outer_lr = self._settings.outer_lr if self._settings.outer == "nesterov" else 1.0
        with torch.no_grad():
            for index, parameter in enumerate(self._replica.parameters):
                self._replica.push(index, self._anchor[index] - parameter, rounds, outer_lr)
            answers = self._take()
            for anchor, parameter in zip(self._anchor, self._replica.parameters, strict=True):
                anchor.copy_(parameter)
        return answers

    def _rounds(self, steps: int) -> int:
        """Synchronisations in the first ``steps`` steps: one a step up to ``local_after``, then one every ``local_steps``."""
        together = (
            min(steps, self._settings.local_after) if self._settings.mode == "post_local" else 0
        )
        return together + (steps - together) // self._settings.local_steps

    def _job_steps(self, version: int) -> int:
        """The reverse: steps after ``version`` updates."""
        if not self._settings.local:
            return version
        together = (
            min(version, self._settings.local_after) if self._settings.mode == "post_local" else 0
        )
        return together + (version - together) * self._settings.local_steps

    # Embeddings

    def _watch_tables(self, model: nn.Module) -> None:
        """Fetch the rows that a sparse embedding is about to read."""
        index_of = {id(self._replica.parameters[index]): index for index in self._replica.tables}

        def fetch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().reshape(-1).cpu().unique()
            self._replica.pull_rows(index_of[id(module.weight)], rows)

        for module in model.modules():
            if (
                isinstance(module, (nn.Embedding, nn.EmbeddingBag))
                and id(module.weight) in index_of
            ):
                module.register_forward_pre_hook(fetch)
        if self._replica.tables:
            self._hooks.append(model.register_state_dict_pre_hook(lambda *_: self._pull_tables()))

    def _pull_tables(self) -> None:
        """All rows, for a checkpoint."""
        for blocks in self._replica.tables.values():
            for block in blocks:
                self._replica.pull(block)

    def _share_rest(self, model: nn.Module) -> None:
        """Rank 0's buffers and frozen parameters for everybody, through the job's store."""
        trained = {id(parameter) for parameter in self._replica.parameters}
        rest = [t.data for t in [*model.parameters(), *model.buffers()] if id(t) not in trained]
        store = self._setup.store
        for number, tensor in enumerate(rest):
            key = f"scaletrain/parameter_server/{number}"
            if self.world.rank == 0 and not store.check([key]):
                store.set(
                    key, tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                )
            elif self.world.rank:
                raw = torch.frombuffer(bytearray(store.get(key)), dtype=torch.uint8)
                tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))


class _Beside:
    """Server ``index``, run by this worker: started again when it dies, as often as the settings say, and gone with the worker."""

    def __init__(self, settings: Settings, run_dir: Path, index: int):
        self._argv = (*where.command(settings, run_dir, index), "--until-left")
        self._restarts = settings.restart_servers
        self._closing = False
        self._process: subprocess.Popen[bytes] | None = None
        # The server ends with the thread that started it: this one lives as long as the worker.
        self._thread = threading.Thread(target=self._watch, name=f"server-{index}", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        for _ in range(1 + self._restarts):
            self._process = subprocess.Popen(self._argv)
            if self._process.wait() == 0 or self._closing:
                return

    def close(self) -> None:
        """Wait until all workers have left."""
        self._closing = True
        self._thread.join(timeout=10)
        if self._thread.is_alive() and self._process:
            self._process.terminate()
            self._thread.join(timeout=10)
