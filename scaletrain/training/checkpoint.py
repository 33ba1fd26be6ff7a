"""Checkpoints: safetensors (no pickle) for every tensor, JSON in its header for the rest; written whole or not at all."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from scaletrain.errors import UserError

_FORMAT = "scaletrain-checkpoint-1"


def save(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Write RUN_DIR/step-<step>.safetensors with the weights and the optimizer's state after ``step`` steps; rank 0 calls it.

    Only the newest ``keep`` checkpoints stay. A crash or a full disk in the middle leaves the older ones as they were.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    state = optimizer.state_dict()
    numbers: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    rest = {"step": step, "param_groups": state["param_groups"], "numbers": numbers}
    path = run_dir / f"step-{step}.safetensors"
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Tied weights share memory, which the format refuses: every tensor gets its own.
        owned = {
            name: value.detach().to("cpu", copy=True).contiguous()
            for name, value in tensors.items()
        }
        save_file(owned, partial, metadata={"format": _FORMAT, "rest": json.dumps(rest)})
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    for old in _checkpoints(run_dir)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def load_latest(run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int | None:
    """Load the newest checkpoint into both; returns the number of steps it had done, None when there is no checkpoint.

    Raises:
        UserError: the file is damaged, or belongs to another model or optimizer.
    """
    found = _checkpoints(run_dir)
    if not found:
        return None
    path = found[-1]
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(
                    f"{path}: not a checkpoint of this program (format {metadata.get('format')!r})"
                )
            rest = json.loads(metadata["rest"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: damaged checkpoint ({error}); delete it to resume from the one before"
        ) from None
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    for key, value in rest["numbers"].items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    try:
        model.load_state_dict(
            {key[6:]: value for key, value in tensors.items() if key.startswith("model.")}
        )
        optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{path}: belongs to another model or optimizer: {str(error).splitlines()[-1].strip()}"
        ) from None
    return int(rest["step"])


def _checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    numbered = [
        (int(m[1]), path)
        for path in run_dir.glob("step-*.safetensors")
        if (m := re.fullmatch(r"step-(\d+)", path.stem))
    ]
    return [path for _, path in sorted(numbered)]
