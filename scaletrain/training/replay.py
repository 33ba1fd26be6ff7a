"""One step of one rank once more, in this process alone: where does a bad value come from?

Samples, their order and all seeds follow from the place in the run. Weights come from a
checkpoint, which may be older than the step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils import _pytree as pytree

from scaletrain.config import RunConfig
from scaletrain.errors import UserError
from scaletrain.run.layout import RunDir
from scaletrain.training import checkpoint, finite, weights, workload
from scaletrain.training.batches import Batch, to_device
from scaletrain.training.feed import open_feed
from scaletrain.training.losses import StepLoss, checked
from scaletrain.training.precision import Precision
from scaletrain.training.randomness import seed_forward
from scaletrain.training.workload import Update, Workload
from scaletrain.world import World


@dataclass(frozen=True)
class Replay:
    """The results of a rank's computation in a step."""

    weights_of: int | None  # steps done by the weights; None: they are those of the beginning
    batches: list[Batch]  # of each backward pass, on the device
    losses: dict[str, StepLoss]  # of each update
    gradients: dict[str, float]  # Euclidean norms, of this rank's own mean, by parameter
    origins: list[str]  # in words: what is not finite first, in each pass where something is

    @property
    def samples(self) -> list[int]:
        """The numbers of the samples in the training set."""
        return [number for batch in self.batches for number in batch.samples]


def replay(config: RunConfig, run_dir: Path, step: int, rank: int) -> Replay:
    """Run forward and backward of a rank's step once, and update nothing.

    Terms that callbacks add to the loss are left out.

    Args:
        config: of the run, resolved.
        run_dir: where its checkpoints are. The newest one up to this step gives the weights.
        step: steps done before it.
        rank: of the worker.

    Raises:
        UserError: the run has no such step or rank, or no checkpoint that fits.
    """
    if rank >= config.workers:
        raise UserError(f"--rank: {rank} is not allowed (allowed: 0 to {config.workers - 1})")
    # Read in line, and run as it is written: hooks then see every layer.
    config = config.model_copy(update={"loader_workers": 0, "compile": None})
    use_cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if use_cuda else "cpu")
    group = World(rank, config.workers).group_number(config.groups)
    parts = workload.build(config, device, group)
    parts.module = parts.model
    updates = parts.updates or [Update("model", parts.optimizer, parts.forward)]
    precision = Precision(config.precision, device, [update.model for update in updates])

    sharing = config.workers if config.batch_mode == "weak" else 1
    world = World(rank, config.workers, rank, config.workers)
    feed = open_feed(config, world, parts.data, config.batch_size * sharing)
    if step >= feed.num_steps:
        raise UserError(f"--step: {step} is not allowed (allowed: 0 to {feed.num_steps - 1})")
    found = checkpoint.newest(RunDir(run_dir).group(group), up_to=step)
    weights_of = None
    position: dict[str, Any] = {}
    if found:
        weights_of, position = found.step, found.content.state["position"]
        parts.model.load_state_dict(checkpoint.model_state(found.content))
        precision.load_state_dict(checkpoint.part_states(found.content).get("loss_scales", {}))
    elif config.init_from:
        weights.load(config.init_from, parts.model)
    feed.start(step, position, step - (weights_of or 0))
    batches = []
    for batch in feed.next().batches:
        batches.append(batch._replace(content=to_device(batch.content, device)))

    parts.model.train()
    seed_forward(device, config.seed, step, rank)
    losses: dict[str, StepLoss] = {}
    gradients: dict[str, float] = {}
    for update in updates:
        parts.model.zero_grad()
        losses[update.model] = _backward(update, batches, precision)
        precision.unscale(update.model, update.optimizer)
        model = getattr(parts, update.model)
        prefix = f"{update.model}." if parts.updates else ""
        gradients |= _norms(model, prefix, losses[update.model].count)
    seed_forward(device, config.seed, step, rank)
    with precision.autocast():
        origins = _origins(parts, batches)
    return Replay(weights_of, batches, losses, gradients, origins)


def save_batches(replayed: Replay, path: Path, facts: dict[str, Any]) -> None:
    """Write the batches of a rank as safetensors, by pass and place in the batch.

    Args:
        replayed: the step.
        path: of the file.
        facts: further metadata.
    """
    tensors: dict[str, torch.Tensor] = {}
    metadata = {name: str(value) for name, value in facts.items()}
    metadata["samples"] = ",".join(map(str, replayed.samples))
    for number, batch in enumerate(replayed.batches):
        leaves, _ = pytree.tree_flatten_with_path(batch.content)
        for place, leaf in leaves:
            name = f"{number}{pytree.keystr(place)}"
            if isinstance(leaf, torch.Tensor):
                tensors[name] = leaf.cpu().contiguous().clone()
            else:
                metadata[name] = repr(leaf)
    try:
        save_file(tensors, path, metadata)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _backward(update: Update, batches: list[Batch], precision: Precision) -> StepLoss:
    """Add up the gradients of an update's totals over all passes."""
    step_loss = StepLoss()
    for batch in batches:
        with precision.autocast():
            loss = checked(update.forward(batch.content))
        step_loss.add(loss)
        precision.scaled(update.model, loss.total).backward()
    return step_loss


def _norms(model: nn.Module, prefix: str, count: float) -> dict[str, float]:
    norms = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norms[f"{prefix}{name}"] = float(parameter.grad.norm()) / max(count, 1.0)
    return norms


def _origins(parts: Workload, batches: list[Batch]) -> list[str]:
    found = []
    for batch in batches:
        origin = finite.explain(parts, batch.content, batch.samples)
        if origin:
            found.append(origin)
    return found
