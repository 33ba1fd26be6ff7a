"""The exchange ``parameter_server``: one worker's end, as the trainer uses it.

It has the methods of ``training.exchange.Exchange``, which describes them.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from scaletrain.engine.rendezvous.sealed import SealedStore, sealed
from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol import placement
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker import calibration
from scaletrain.parameter_server.worker.beside import ServerBeside
from scaletrain.parameter_server.worker.client import Client, PushResult
from scaletrain.parameter_server.worker.clipping import ClippedSteps
from scaletrain.parameter_server.worker.gradients import GradientSteps
from scaletrain.parameter_server.worker.local_steps import LocalSteps, Rounds
from scaletrain.parameter_server.worker.replica import Replica
from scaletrain.run.layout import RunDir
from scaletrain.world import World

_STORED_BYTES = 4 << 20  # torch's stores take values of 8 MiB at most
_ALL_SHARED = "scaletrain/parameter_server/all"  # set once the others can be read


class ParameterServerExchange:
    """Pushes gradients as backward makes them; ``step`` waits for the new weights.

    Gradients leave during backward, and the learning rate with them: it has to be in the
    optimizer's groups before. Buffers (batch norm's statistics) and frozen parameters are made
    equal once, at the start.

    Args:
        settings: of the job.
        world: this worker's place. Its launcher decides where servers run, if the settings do not.
        run_dir: the job's directory.
        store: the job's key-value store, joined by all ranks.
    """

    # Servers may go on without a worker, and apply a gradient before others have theirs.
    averages = False
    groups = 1

    def __init__(
        self,
        settings: Settings,
        world: World,
        run_dir: Path,
        store: torch.distributed.Store,
    ):
        self.world = world
        self._settings = settings
        self._run_dir = run_dir
        self._store = store
        configured = RunDir(run_dir).config.exists()
        place = placement.resolve(settings, world.launcher, configured)
        self._is_beside = place == placement.BESIDE
        self._server = self._start_server()
        self._job = _JobSteps()
        self._record: dict[str, float] = {}
        self._owes_meeting = False
        self._is_clipping = False  # the servers are; see ``clip``
        self._cut: calibration.Cut | None = None  # made by ``attach``
        # Bytes of the client up to the last step.
        self._sent = 0
        self._received = 0
        # Made by ``attach``.
        self._replica: Replica | None = None
        self._client: Client | None = None
        self._steps: GradientSteps | LocalSteps | None = None

    @property
    def group(self) -> "ParameterServerExchange":
        """This worker's end of sums over its group: there is one."""
        return self

    def _start_server(self) -> ServerBeside | None:
        """Start the server that runs beside this worker; return None if there is none."""
        if not self._is_beside or self.world.rank >= self._settings.servers:
            return None
        return ServerBeside(self._settings, self._run_dir, self.world.rank)

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Make every rank's weights equal the servers', and hook into ``model``'s backward.

        1. Cut the model into blocks, as all other workers do. Rank 0 measures their size.
        2. Share everything that is not trained.
        3. Join the servers. If they have no weights, rank 0 sends its own, and the state of its
           optimizer, which may come from a checkpoint.
        4. Pull all weights, and begin with the step that the job has reached.

        Returns:
            ``model`` itself.

        Raises:
            UserError: the servers cannot train this model with this optimizer, or have one already.
            ServerError: a server cannot be reached or refuses this worker.
        """
        if self._replica is not None:
            raise UserError(
                "exchange: parameter_server trains one model, and has one already (allowed for"
                " several: native, scheduled)"
            )
        settings = self._settings
        replica = Replica(model, optimizer, settings)
        self._replica = replica
        shared = sealed(self._store, self._run_dir)
        self._cut = calibration.agree(
            settings, self._run_dir, self.world, shared, replica.dense_bytes, self._is_beside
        )
        replica.cut(self._cut.block_bytes)
        self._share_untrained(model, replica, shared)
        client = Client(settings, self._run_dir, self.world.rank, replica.blocks, replica.optimizer)
        self._client = client
        replica.connect(client)
        if self.world.rank == 0 and not client.initialised:
            if not settings.local:  # else the state belongs to the worker's own optimizer
                replica.send_state(optimizer)
            for block in replica.blocks:
                replica.store(block)
            client.wait_until_stored()
        for block in replica.blocks:
            replica.pull(block)
        if settings.local:
            self._job.join(Rounds.of(settings).steps_before(client.step))
            self._steps = LocalSteps(settings, replica, optimizer)
        else:
            self._job.join(client.step)
            self._steps = GradientSteps(settings, replica, model, optimizer)
        self._steps.begin(self._job.done)
        self._owes_meeting = client.met_step < self._job.done
        # The first weights are not the traffic of a step.
        self._sent = client.bytes_sent
        self._received = client.bytes_received
        return model

    def accumulate(self, model: nn.Module | None = None) -> contextlib.AbstractContextManager[None]:
        """Let backward passes inside only add to the gradients."""
        assert self._steps
        return self._steps.accumulate()

    def hold_gradients(self) -> None:
        """Let gradients leave at ``step``, and not during backward.

        Raises:
            UserError: an update takes the mean of several workers' gradients, which none of them
                has.
        """
        settings = self._settings
        if settings.mode == "sync" and settings.workers > 1:
            raise UserError(
                "exchange.mode: sync takes the mean of all workers' gradients on the servers, where"
                " workers cannot change it, and only clipping is done (allowed: async, bounded,"
                " local_sgd, post_local, or another exchange)"
            )
        assert self._steps
        self._steps.hold()

    def clip(self, norm: float | None = None, value: float | None = None) -> bool:
        """Let the servers clip the mean gradient of every update, in mode ``sync``.

        In the other modes each worker clips a gradient that is its own.

        Raises:
            UserError: they clip already.
        """
        if not isinstance(self._steps, GradientSteps) or self._settings.mode != "sync":
            return False
        if self._is_clipping:
            raise UserError(
                "exchange: the servers clip gradients already (allowed: clip once, with norm and"
                " value together)"
            )
        assert self._client
        self._is_clipping = True
        self._steps.clip(ClippedSteps(self._client, norm, value))
        return True

    def synchronise(self, model: nn.Module | None = None) -> None:
        """Do nothing: gradients have left for the servers by the end of backward."""

    def step(self, model: nn.Module | None = None) -> None:
        """Bring the weights to the next step, after backward.

        Raises:
            ServerError: a server is lost, or training cannot go on.
            ValueError: the learning rate was changed after gradients had left with the old one.
            UserError: a gradient was changed after it had left for the servers.
        """
        client, steps = self._client, self._steps
        assert client and steps
        began = time.perf_counter()
        results = steps.finish()
        self._job.done += 1
        # A server's successor is told this step (``io_thread.Position``).
        client.step = self._job.done
        # Only in this mode is each update one step of the job.
        if self._settings.mode == "sync":
            self._job.notice_lag(client.job_step())
        steps.begin(self._job.done)
        self._record = {
            "bytes_sent": client.bytes_sent - self._sent,
            "bytes_received": client.bytes_received - self._received,
            **_staleness(results),
            "wait_s": time.perf_counter() - began,
        }
        self._sent = client.bytes_sent
        self._received = client.bytes_received

    def skip(self, most: int) -> int:
        """Return how many of the next ``most`` steps this rank has to leave out."""
        return self._job.skip(most)

    def owes_meeting(self) -> bool:
        """Return True if this rank came late, and the others have yet to meet after that step."""
        return self._owes_meeting

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a small CPU tensor over the ranks that live."""
        assert self._client
        total = self._client.sum(values.double().numpy(), self._job.reached)
        return torch.from_numpy(total).to(values.dtype)

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Return the sum at once: workers of this exchange do not meet in every step."""
        total = self.sum(values)
        return lambda: total

    def live_workers(self) -> int:
        """Return how many workers train, as far as this rank has heard."""
        heard = self._client.live_workers() if self._client else 0
        # 0: the servers have not said anything yet.
        return heard or self.world.size

    def record(self) -> dict[str, float]:
        """Return the numbers of the last step, by the names that step records have."""
        return self._record

    def chosen(self) -> dict[str, Any]:
        """Return the size of blocks if it was measured, and the speed that it follows from."""
        return self._cut.to_json() if self._cut and self._settings.measures_blocks else {}

    def describe(self) -> list[str]:
        """Return a line about the size of blocks, if it was measured."""
        return [str(self._cut)] if self._cut and self._settings.measures_blocks else []

    def close(self) -> None:
        """Leave the servers in good order, and end the one beside this worker."""
        # Staged gradients leave over the client, and the server ends when this worker has left it:
        # the one that depends on another is closed first.
        if self._steps:
            self._steps.close()
        if self._replica:
            self._replica.close()
        if self._client:
            self._client.close()
        if self._server:
            self._server.close()

    def _share_untrained(self, model: nn.Module, replica: Replica, shared: SealedStore) -> None:
        """Give rank 0's buffers and frozen parameters to everybody, through the job's store.

        They travel as bytes, so that every type stays as it is, in pieces that a store takes, and
        sealed with the job's key. A rank 0 that was started again takes the values of the first.
        """
        trained = {id(parameter) for parameter in replica.parameters}
        tensors = [*model.parameters(), *model.buffers()]
        untrained = [tensor.data for tensor in tensors if id(tensor) not in trained]
        is_writer = self.world.rank == 0 and not shared.check([_ALL_SHARED])
        for number, tensor in enumerate(untrained):
            if tensor.numel() == 0:
                continue
            raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(raw), _STORED_BYTES):
                name = f"scaletrain/parameter_server/{number}/{start}"
                part = raw[start : start + _STORED_BYTES]
                if is_writer:
                    shared.set(name, part.tobytes())
                else:
                    part[:] = np.frombuffer(shared.get(name), np.uint8)
            if not is_writer:
                tensor.copy_(torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape))
        if is_writer:
            shared.set(_ALL_SHARED, b"")


class _JobSteps:
    """How far the job has come, and how much of that this rank has not seen.

    Only the training thread uses it.

    Attributes:
        done: steps that the job has done, as this rank knows.
    """

    def __init__(self) -> None:
        self.done = 0
        self._missed = 0  # steps done without this rank, that it has not left out yet

    def join(self, steps: int) -> None:
        """Begin where the job is, after ``steps`` steps, all of them without this rank."""
        self.done = steps
        self._missed = steps

    def notice_lag(self, job_step: int) -> None:
        """Notice steps that the others did without this rank, as a spare worker lets them do.

        Args:
            job_step: the step that comes next in all blocks.
        """
        ahead = max(0, job_step - self.done)
        self._missed += ahead
        self.done += ahead

    @property
    def reached(self) -> int:
        """The job's step that this rank does next, or leaves out."""
        return self.done - self._missed

    def skip(self, most: int) -> int:
        """Return how many missed steps to leave out now, at most ``most``."""
        skipped = min(most, self._missed)
        self._missed -= skipped
        return skipped


def _staleness(results: list[PushResult]) -> dict[str, float]:
    """Return a step's figures of staleness, over the blocks whose gradients were used."""
    used = [result.staleness for result in results if not result.dropped]
    return {
        "staleness": sum(used) / len(used) if used else 0.0,
        "staleness_max": max(used, default=0),
        "dropped": (len(results) - len(used)) / max(1, len(results)),
    }
