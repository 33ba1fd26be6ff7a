"""Weights from elsewhere, and for elsewhere: files of other programs, and other runs.

Files are not trusted: nothing that is read here can run code.
"""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from scaletrain import compression
from scaletrain.config import presence
from scaletrain.config.schema import InitFrom
from scaletrain.errors import UserError
from scaletrain.run.atomic import replacing
from scaletrain.run.layout import RunDir
from scaletrain.training import checkpoint, patterns
from scaletrain.training.checkpoint import plain_name
from scaletrain.training.tensor_file import Content
from scaletrain.units import plural

_EMA = "callbacks.ema"  # the part of checkpoints that holds the averages
# Keys under which programs keep the model's state dict beside other things.
_WITHIN = ("state_dict", "model_state_dict", "model")
_SUFFIXES = (".safetensors", ".pt")  # that ``export`` writes


def load(settings: InitFrom, model: nn.Module) -> list[str]:
    """Put weights from elsewhere into a model; return lines for people.

    Args:
        settings: where they are, and which may be missing.
        model: on any device.

    Raises:
        UserError: the file cannot be read, or its weights are not the model's, except for those
            that may be.
    """
    path = Path(settings.path)
    weights = _renamed(_read(path, settings.ema), settings.prefix)
    # A compiled model has longer names for the same entries.
    key_of = {}
    shapes = {}
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor):
            key_of[plain_name(key)] = key
            shapes[plain_name(key)] = value.shape
    missing = [name for name in shapes if name not in weights]
    unexpected = [name for name in weights if name not in shapes]
    other_shape = []
    for name, value in weights.items():
        if name in shapes and value.shape != shapes[name]:
            other_shape.append(name)

    reshaped = [_with_shapes(name, weights[name].shape, shapes[name]) for name in other_shape]
    lines = []
    for what, names, kind, effect in (
        (f"missing in {path}", missing, "missing", "keep their initial values"),
        (f"of another shape in {path}", reshaped, "missing", "keep their initial values"),
        (f"in {path} alone", unexpected, "unexpected", "are left out"),
    ):
        _check_allowed(names, kind, getattr(settings, f"allow_{kind}"), what)
        if names:
            lines.append(f"init_from: {what}: {patterns.listed(names)}: these {effect}")
    loaded = {}
    for name, value in weights.items():
        if name in shapes and name not in other_shape:
            loaded[key_of[name]] = value
    if not loaded:
        raise UserError(f"init_from: {path} holds no weight of the model")
    model.load_state_dict(loaded, strict=False)
    head = f"init_from: {len(loaded)} of {plural(len(shapes), 'tensor')} of the model from {path}"
    return [head, *lines]


def export(
    run_dir: Path,
    out: Path,
    *,
    step: int | None = None,
    best: bool = False,
    ema: bool = False,
    compress: bool = False,
) -> str:
    """Write a run's weights as a state dict that needs no scaletrain; return a line about it.

    Args:
        run_dir: of the run.
        out: the new file, ``.safetensors`` or ``.pt``.
        step: of the checkpoint; default: the newest.
        best: the checkpoint with the best figure.
        ema: the averages instead of the weights.
        compress: write a file that ``compression.load`` reads.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    if compress and out.suffix != ".safetensors":
        raise UserError(
            f"--out: {out} is not allowed beside --compress (allowed: a name that ends in"
            " .safetensors)"
        )
    if out.suffix not in _SUFFIXES:
        raise UserError(
            f"--out: {out} is not allowed (allowed: a name that ends in .safetensors or .pt)"
        )
    path, content = _chosen(RunDir(run_dir), step, best)
    weights = _weights_of(content, path, ema)
    line = f"{out}: {plural(len(weights), 'tensor')} of {path}"
    with replacing(out) as partial:
        if out.suffix == ".pt":
            torch.save(weights, partial)
        elif compress:
            sizes = compression.save(_only_tensors(weights), partial)
            line += (
                f", {sizes.file_bytes:,} bytes in place of {sizes.dense_bytes:,}"
                f" ({sizes.ratio:.1f} times smaller)"
            )
        else:
            safetensors.torch.save_file(_only_tensors(weights), partial)
    figure = content.state.get("best")
    if figure:
        line += f", {figure['figure']} {figure['value']:.6g}"
        if _EMA in content.state["parts"] and not ema:
            line += " with averaged weights (--ema exports those)"
    return line


def _only_tensors(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights, all of which have to be tensors.

    Raises:
        UserError: one is not.
    """
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"--out: safetensors cannot hold {name} (allowed: a .pt file)")
    return dict(weights)


def _chosen(files: RunDir, step: int | None, best: bool) -> tuple[Path, Content]:
    """Return the checkpoint that is meant, and its path."""
    if step is None and not best:
        newest = checkpoint.newest(files.path)
        if newest is None:
            raise UserError(f"{files.path}: holds no checkpoint (allowed: the --run-dir of a run)")
        return newest.path, newest.content
    there = files.best_checkpoints() if best else files.checkpoints()
    if not there:
        fix = "of a run with checkpoint.best" if best else "of a run"
        raise UserError(f"{files.path}: holds no such checkpoint (allowed: the --run-dir {fix})")
    paths = dict(there)
    if best:
        path = there[-1][1]
    elif step in paths:
        path = paths[step]
    else:
        raise UserError(
            f"--step: {step} is not allowed (allowed: {', '.join(map(str, paths))}, the steps of"
            " the checkpoints)"
        )
    return path, checkpoint.read(path)


def _weights_of(content: Content, path: Path, ema: bool) -> dict[str, Any]:
    """Return the state dict of the model, or of its averages."""
    if not ema:
        return checkpoint.model_state(content)
    parts = checkpoint.part_states(content)
    if _EMA not in parts:
        raise UserError(f"{path}: holds no averages (allowed: of a run with the callback ema)")
    weights: dict[str, Any] = parts[_EMA]["weights"]
    return weights


def _read(path: Path, ema: bool) -> dict[str, Tensor]:
    """Return the tensors of a file, or of a run's newest checkpoint, on the CPU."""
    presence.check_weights(path)
    if path.is_dir():
        path, content = _chosen(RunDir(path), None, False)
        return _tensors(_weights_of(content, path, ema))
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"init_from: {path} cannot be read: {error}") from None
        if compression.FORMAT in metadata:
            return compression.load(path)
        if metadata.get("format", "").startswith("scaletrain-"):  # a checkpoint
            return _tensors(_weights_of(checkpoint.read(path), path, ema))
    if ema:
        raise UserError("init_from.ema: only checkpoints of this program hold averages")
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return _tensors(_unpickled(path))


def _unpickled(path: Path) -> Mapping[str, Any]:
    """Return the state dict of a file that ``torch.save`` wrote, without running any code in it."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"init_from: {path} holds more than tensors, numbers and text, so loading it could run"
            " code (allowed: torch.save(model.state_dict(), ...), or a safetensors file)"
        ) from None
    except (OSError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"init_from: {path} cannot be read: {reason}") from None
    for key in _WITHIN:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            return held[key]
    if not isinstance(held, Mapping):
        raise UserError(f"init_from: {path} holds a {type(held).__name__} (allowed: a state dict)")
    if held and not any(isinstance(value, Tensor) for value in held.values()):
        raise UserError(
            f"init_from: {path} holds no tensors, but {patterns.listed([*map(str, held)])} (allowed: a"
            f" state dict, alone or under {', '.join(_WITHIN)})"
        )
    return held


def _tensors(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors alone; other entries are a module's extra state."""
    return {name: value for name, value in entries.items() if isinstance(value, Tensor)}


def _renamed(weights: dict[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the weights with the first prefix that a name begins with replaced."""
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        new = plain_name(name)
        for before, after in prefixes.items():
            if new.startswith(before):
                new = after + new.removeprefix(before)
                break
        if new in renamed:
            raise UserError(f"init_from.prefix: two weights of the file become {new}")
        renamed[new] = value
    return renamed


def _check_allowed(names: Iterable[str], kind: str, allowed: Iterable[str], what: str) -> None:
    """Raise ``UserError`` if weights that differ are not allowed to."""
    refused = []
    for name in names:
        plain = name.partition(" ")[0]  # without its shapes
        if not any(patterns.matches(pattern, plain) for pattern in allowed):
            refused.append(name)
    if refused:
        raise UserError(
            f"init_from: {what}: {patterns.listed(refused)} (allow it with"
            f" init_from.allow_{kind}, patterns of names; init_from.prefix renames)"
        )


def _with_shapes(name: str, there: Iterable[int], wanted: Iterable[int]) -> str:
    return f"{name} ({[*there]}, not {[*wanted]})"
