"""Writes the final weights in few bytes: RUN_DIR/compressed.safetensors."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from scaletrain import compression
from scaletrain.run.atomic import replacing
from scaletrain.run.layout import RunDir
from scaletrain.training.callbacks import Callback
from scaletrain.training.checkpoint import plain_name

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer


class Compress(Callback):
    """Rank 0 writes the file once the training has ended.

    Args:
        model: its state dict is written.
        run: where the file goes.
        rank: of this worker.
    """

    def __init__(self, model: nn.Module, run: RunDir, rank: int):
        self._model = model
        self._run = run
        self._rank = rank

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Write the file, unless an error ended the training."""
        if summary is None or self._rank != 0:
            return
        weights = {plain_name(name): each for name, each in self._model.state_dict().items()}
        with replacing(self._run.compressed) as partial:
            compression.save(weights, partial)


def callback(trainer: "Trainer") -> Callback:
    """Return the callback."""
    return Compress(trainer.module, RunDir(trainer.run_dir), trainer.world.rank)
