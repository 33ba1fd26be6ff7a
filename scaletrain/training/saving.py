"""The checkpoints of one run, as the trainer sees them: due, put off, finished, loaded.

Rank 0 writes them, or another rank once rank 0 is lost (``Saving.lead``). A method that all ranks
call together says so.

Groups of workers with models of their own save each its own, by their first ranks and at the same
steps. A run goes on from the newest step of which all of them have a checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scaletrain.config.schema import Checkpoint
from scaletrain.errors import TrainingError
from scaletrain.run import progress
from scaletrain.run.layout import RunDir
from scaletrain.training import checkpoint
from scaletrain.training.best import Best
from scaletrain.training.checkpoint import Loaded, Part, State
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
        state: the parts that are saved and loaded.

    Raises:
        UserError: a checkpoint of this state could not be written.
    """

    def __init__(
        self, settings: Checkpoint, run_dir: Path, world: World, exchange: Exchange, state: State
    ):
        checkpoint.check_saveable(state)  # before the ranks meet; ``begin`` knows all parts
        self._settings = settings
        self._world = exchange.group.world
        self._exchange = exchange
        self._group_dirs = [RunDir(run_dir).group(number) for number in range(exchange.groups)]
        self._run_dir = self._group_dirs[world.group_number(exchange.groups)]
        if not self._world.rank:
            self._run_dir.mkdir(exist_ok=True)
        self._state = state
        self._loaded: Loaded | None = None
        self._leads = self._world.rank == 0  # whether this rank writes
        self._writer: CheckpointWriter | None = None  # from ``begin`` or ``lead`` on
        self._best: Best | None = None
        if settings.best:
            self._best = Best(settings.best.figure, settings.best.mode, key="checkpoint.best")
        # Set by the rank that writes, while the checkpoint before is being written: it saves in a
        # later step.
        self._is_put_off = False
        self._saved_step: int | None = None  # the step of this rank's last checkpoint

    def load(self) -> Loaded | None:
        """Load the newest checkpoint that is whole, if there is one. ``add`` restores the parts."""
        self._loaded = self._load()
        return self._loaded

    def _load(self) -> Loaded | None:
        if self._exchange.groups == 1:
            return checkpoint.load_latest(self._run_dir, self._state)
        step = self._newest_of_all_groups()
        return None if step is None else checkpoint.load_latest(self._run_dir, self._state, step)

    def _newest_of_all_groups(self) -> int | None:
        """Return the newest step of which every group has a whole checkpoint, if there is one.

        Every rank looks into the same folders, so all of them go on from the same step.
        """
        up_to: int | None = None
        while True:
            steps = set()
            for folder in self._group_dirs:
                found = checkpoint.newest(folder, up_to)
                if found is None:
                    return None
                steps.add(found.step)
            up_to = min(steps)
            if len(steps) == 1:
                return up_to

    def add(self, name: str, part: Any) -> None:
        """Save a part's state from now on, if it has ``state_dict``, and restore it after ``load``.

        Args:
            name: of the part, in checkpoints.
            part: see ``checkpoint.Part``.
        """
        if not hasattr(part, "state_dict"):
            return
        while name in self._state.parts:
            name += "+"  # a second callback of the same name
        self._state.parts[name] = part
        if self._loaded and name in self._loaded.parts:
            part.load_state_dict(self._loaded.parts[name])

    def begin(self, figures: list[str] | None) -> list[str]:
        """Get ready to write, once all parts are there.

        Args:
            figures: the names of those that evaluations have; None if that is not known.

        Returns:
            Lines for people about state that a checkpoint lacks, or has without use.

        Raises:
            UserError: a checkpoint of this state could not be written, or there is no such figure
                as ``checkpoint.best``.
        """
        checkpoint.check_saveable(self._state)  # a fault in the first save would come after hours
        if self._best and figures is not None:
            self._best.check(figures)
        lines = []
        if self._loaded:
            lines += _differences(self._loaded, self._state.parts)
            lines += self._resume_best()
        self._loaded = None  # its tensors are not needed any more
        self.lead(self._leads)
        return lines

    def lead(self, leads: bool) -> None:
        """Write from now on, or leave it to another rank."""
        self._leads = leads
        if leads and self._writer is None:
            self._writer = CheckpointWriter(self._run_dir, self._settings, progress.alive)

    def _resume_best(self) -> list[str]:
        """Go on from the best figure so far; return lines about a checkpoint that does not tell."""
        lines = []
        for _, path in RunDir(self._run_dir).best_checkpoints() if self._best else []:
            try:
                content = checkpoint.read(path)
            except checkpoint.Damaged as error:
                lines.append(
                    f"{error}: left out, the best figure is that of the evaluations to come"
                )
                continue
            figure = content.state["best"]
            assert self._best
            if figure["figure"] == self._best.figure:
                self._best.improves(content.state["step"], {figure["figure"]: figure["value"]})
            else:
                lines.append(
                    f"checkpoint.best: {path.name} is the best of {figure['figure']}: the first"
                    f" evaluation of {self._best.figure} replaces it"
                )
        return lines

    def is_due(self, step: int) -> bool:
        """Return True, on all ranks alike, if a checkpoint is due after this many steps."""
        every = self._settings.every_steps
        return every is not None and step % every == 0

    def save(self, step: int) -> None:
        """Write a checkpoint of the steps done so far while training goes on, if this rank leads.

        While the one before is still being written, it is put off: waiting here for a slow disk
        would let the other ranks' collectives time out. With groups it is collective: all of them
        put a checkpoint off, or none.
        """
        is_writing = self._leads and self._writer is not None and self._writer.is_writing()
        if self._exchange.groups > 1:
            is_writing = bool(self._exchange.sum(torch.tensor([float(is_writing)])).item())
        if self._writer and self._leads and step != self._saved_step:
            self._is_put_off = is_writing
            if not is_writing:
                self._write(step)

    def _write(self, step: int) -> None:
        assert self._writer
        self._writer.save(step, self._state)
        self._is_put_off = False
        self._saved_step = step

    def save_best(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Also write a checkpoint, if this rank leads and these figures are the best so far.

        Args:
            step: steps done.
            figures: of the evaluation after them.
        """
        if self._best and self._best.improves(step, figures) and self._writer and self._leads:
            figure = {"figure": self._best.figure, "value": self._best.value}
            self._writer.save_best(step, self._state, figure)

    @property
    def best(self) -> Best | None:
        """The best figure so far, if it is asked for."""
        return self._best

    def save_put_off(self, step: int) -> None:
        """Write the checkpoint that was put off, if there is one.

        Groups leave it to the next step that is due: here none of them knows of the others.
        """
        if self._is_put_off and self._exchange.groups == 1:
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
                    self._write(step)
                    is_writing = True
            progress.alive("writing a checkpoint")
            if not self._exchange.sum(torch.tensor([float(is_writing)])).item():
                return

    def roll_back(self, step: int) -> bool:
        """Bring weights, optimizer and parts back to the newest checkpoint (collective).

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
        loaded = self._load()
        for name, part in self._state.parts.items():
            if loaded and name in loaded.parts:
                part.load_state_dict(loaded.parts[name])
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


def _differences(loaded: Loaded, parts: Mapping[str, Part]) -> list[str]:
    """Return a line for each part that a checkpoint lacks, and for each that only it has."""
    lines = []
    for name in parts:
        if name not in loaded.parts:
            lines.append(f"{name}: begins anew: {loaded.path.name} holds no state of it")
    for name in loaded.parts:
        if name not in parts:
            lines.append(f"{name}: its state in {loaded.path.name} is left out: it is not used now")
    return lines
