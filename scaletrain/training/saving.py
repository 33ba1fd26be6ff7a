"""The checkpoints of one run, as the trainer sees them: due, put off, finished, loaded.

Rank 0 writes them. What all ranks do together is said so.
"""

from pathlib import Path

import torch

from scaletrain.config.schema import Checkpoint
from scaletrain.errors import TrainingError
from scaletrain.run import progress
from scaletrain.training import checkpoint
from scaletrain.training.checkpoint import Loaded, State
from scaletrain.training.checkpoint_writer import CheckpointWriter
from scaletrain.training.exchange import Exchange
from scaletrain.world import World


class Saving:
    """One worker's part in the checkpoints of a run. Every rank has one.

    Args:
        settings: the key ``checkpoint`` of the configuration.
        run_dir: where checkpoints are.
        world: this worker's place.
        exchange: lets the ranks meet.
        state: what is saved and loaded.

    Raises:
        UserError: a checkpoint of this state could not be written.
    """

    def __init__(
        self, settings: Checkpoint, run_dir: Path, world: World, exchange: Exchange, state: State
    ):
        # A fault in the first save would come after hours.
        checkpoint.check_saveable(state)
        self._settings = settings
        self._run_dir = run_dir
        self._world = world
        self._exchange = exchange
        self._state = state
        self._writer: CheckpointWriter | None = None  # on rank 0, from ``begin`` on
        # Rank 0 sets it while the checkpoint before is being written, and saves in a later step.
        self._is_put_off = False

    def load(self) -> Loaded | None:
        """Load the newest checkpoint that is whole, if there is one."""
        return checkpoint.load_latest(self._run_dir, self._state)

    def begin(self) -> None:
        """Get ready to write, once nothing is loaded any more."""
        if self._world.rank == 0:
            self._writer = CheckpointWriter(self._run_dir, self._settings.keep, progress.alive)

    def is_due(self, step: int) -> bool:
        """Return True, on all ranks alike, if a checkpoint is due after this many steps."""
        every = self._settings.every_steps
        return every is not None and step % every == 0

    def save(self, step: int) -> None:
        """Write a checkpoint of the steps done so far, on rank 0, while training goes on.

        While the one before is still being written, it is put off: waiting here for a slow disk
        would let the other ranks' collectives time out.
        """
        if not self._writer:
            return
        self._is_put_off = self._writer.is_writing()
        if not self._is_put_off:
            self._writer.save(step, self._state)

    def save_put_off(self, step: int) -> None:
        """Write the checkpoint that was put off, if there is one."""
        if self._is_put_off:
            self.save(step)

    def finish(self, step: int) -> None:
        """Wait until the last checkpoint is durable (collective).

        All ranks wait together, and meet once a second: no collective times out, and each gives
        signs of life, however long the disk takes.
        """
        while True:
            is_writing = False
            if self._writer:
                is_writing = self._writer.is_writing(patience_s=1.0)
                if self._is_put_off and not is_writing:
                    self.save(step)
                    is_writing = True
            progress.alive("writing a checkpoint")
            if not self._exchange.sum(torch.tensor([float(is_writing)])).item():
                return

    def roll_back(self, step: int) -> bool:
        """Bring weights and optimizer back to the newest checkpoint (collective).

        The data goes on, so the batches since that checkpoint are left out. Before the first one,
        the weights stay as they are.

        Args:
            step: steps done.

        Returns:
            Whether there is a checkpoint.

        Raises:
            TrainingError: the ranks do not see the same checkpoint.

        Source:
            Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), section 5.1.
        """
        self.finish(step)  # all ranks wait for the one under way
        loaded = self.load()
        steps = torch.zeros(self._world.size, dtype=torch.float64)  # each rank's
        steps[self._world.rank] = loaded.step if loaded else -1
        steps = self._exchange.sum(steps)
        if (steps != steps[0]).any():
            raise TrainingError(
                "nonfinite: roll_back: the ranks find checkpoints of steps"
                f" {', '.join(f'{step:.0f}' for step in steps.tolist())}"
                " (allowed: a run directory that all hosts share)"
            )
        return loaded is not None
