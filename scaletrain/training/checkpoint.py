"""Checkpoints: safetensors (no pickle) for tensors, JSON in its header for the rest.

They are written atomically: a crash or a full disk leaves the older ones as they were.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from scaletrain.errors import UserError
from scaletrain.run.atomic import replacing
from scaletrain.run.layout import RunDir

_FORMAT = "scaletrain-checkpoint-1"
_MODEL, _OPTIMIZER = "model.", "optimizer."  # the first part of a tensor's name


def save(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Write the weights and the optimizer's state after ``step`` steps; rank 0 calls it.

    Only the newest ``keep`` checkpoints stay.

    Returns:
        The checkpoint's path.
    """
    tensors = {f"{_MODEL}{name}": value for name, value in model.state_dict().items()}
    state = optimizer.state_dict()
    numbers: dict[str, Any] = {}  # state that is not a tensor
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{_OPTIMIZER}{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    # The format holds tensors, and a header of strings: all other state becomes JSON there.
    rest = {"step": step, "param_groups": state["param_groups"], "numbers": numbers}
    files = RunDir(run_dir)
    path = files.checkpoint(step)
    with replacing(path) as partial:
        # Tied weights share memory, which the format refuses: every tensor gets its own.
        copies = {}
        for name, value in tensors.items():
            copies[name] = value.detach().to("cpu", copy=True).contiguous()
        save_file(copies, partial, metadata={"format": _FORMAT, "rest": json.dumps(rest)})
    # Oldest first. They go only now that the new one is complete on disk.
    for _, old in files.checkpoints()[:-keep]:
        old.unlink(missing_ok=True)
    return path


def load_latest(run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int | None:
    """Load the newest checkpoint into a model and its optimizer.

    Returns:
        The number of steps that it had done; None if there is no checkpoint.

    Raises:
        UserError: the file is damaged, or belongs to another model or optimizer.
    """
    checkpoints = RunDir(run_dir).checkpoints()
    if not checkpoints:
        return None
    _, path = checkpoints[-1]
    tensors, rest = _read(path)
    weights = {}
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_MODEL):
            weights[key.removeprefix(_MODEL)] = tensor
        elif key.startswith(_OPTIMIZER):
            # Names of parameters' state may hold dots; the index in front of them does not.
            index, name = key.removeprefix(_OPTIMIZER).split(".", 1)
            state.setdefault(int(index), {})[name] = tensor
    for key, number in rest["numbers"].items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = number
    try:
        model.load_state_dict(weights)
        optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
    except (RuntimeError, ValueError) as error:
        # torch begins with a line that names only the class; the faults follow, one a line.
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: belongs to another model or optimizer: {reason}") from None
    return int(rest["step"])


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of a checkpoint, and the rest of its state."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Any safetensors file opens without an error: only this mark tells a checkpoint.
            if metadata.get("format") != _FORMAT:
                raise UserError(
                    f"{path}: not a checkpoint of this program (format {metadata.get('format')!r})"
                )
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            return tensors, json.loads(metadata["rest"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: damaged checkpoint ({error}); delete it to resume from the one before"
        ) from None
