"""Checkpoints: the state of model, optimizer and other parts, and the facts of the training.

They hold no pickle: tensors and JSON, each with a hash (``tensor_file``). They are written
atomically: a crash or a full disk leaves the older ones as they were. ``CheckpointWriter`` writes
them while training goes on.

Parameters have the names of the plain model: ``torch.compile`` changes nothing in a file.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from scaletrain.errors import Diverged, UserError
from scaletrain.run import progress
from scaletrain.run.atomic import replacing
from scaletrain.run.layout import RunDir
from scaletrain.training import state_tree, tensor_file
from scaletrain.training.tensor_file import Content

_FORMAT = "scaletrain-checkpoint-4"
_EARLIER_FORMATS = tuple(f"scaletrain-checkpoint-{number}" for number in range(1, 4))
_MODEL = "model."  # begins the names of the model's tensors; reports add up their sizes
_EXTRA, _OPTIMIZER = "extra", "optimizer"  # begin those of other state
_COMPILED = "_orig_mod"  # the name under which a compiled module holds the plain one
_EXTRA_STATE = "_extra_state"  # ends the key of a module's ``get_extra_state``
# Options that change how an optimizer computes, but not its result.
IMPLEMENTATION_OPTIONS = ("foreach", "fused", "capturable", "differentiable")


class Damaged(UserError):
    """A checkpoint is not as it was written, or no checkpoint. The text is a line."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that has been loaded."""

    step: int  # steps that it had done
    path: Path
    facts: dict[str, Any]  # of the state that was saved
    damaged: list[str]  # one line for each newer checkpoint that is damaged
    position: dict[str, Any] = field(default_factory=dict)  # of the state that was saved
    parts: dict[str, Any] = field(default_factory=dict)  # what each part's ``state_dict`` returned


class Found(NamedTuple):
    """A checkpoint that is whole."""

    step: int
    path: Path
    content: Content
    damaged: list[str]  # as in ``Loaded``


class Part(Protocol):
    """Something beside model and optimizer that has state, such as a callback."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return numbers, text, tensors, and lists and dicts of these."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the result of ``state_dict``; its tensors are on the CPU."""


@dataclass(frozen=True)
class State:
    """The parts of a training that its checkpoints hold."""

    model: nn.Module
    optimizer: torch.optim.Optimizer  # over the model's parameters
    facts: dict[str, Any] = field(default_factory=dict)  # JSON that ``load_latest`` gives back
    position: Callable[[], dict[str, Any]] = dict  # where the data goes on, likewise
    parts: dict[str, Part] = field(default_factory=dict)  # by name, which begins their tensors'


def collect(step: int, state: State) -> Content:
    """Return the content of a checkpoint. Its tensors are the model's own, not copies.

    Raises:
        UserError: an entry cannot be saved.
    """
    model, optimizer = state.model, state.optimizer
    tensors: dict[str, Tensor] = {}
    try:
        extra = {}
        for key, value in model.state_dict().items():
            name = plain_name(key)
            if name.rpartition(".")[2] == _EXTRA_STATE:
                extra[name] = state_tree.flatten(value, f"{_EXTRA}.{name}", tensors)
            else:
                tensors[f"{_MODEL}{name}"] = value
        optimizer_state = {
            "class": type(optimizer).__name__,
            "parameters": _optimized_names(model, optimizer),
            "state": state_tree.flatten(optimizer.state_dict()["state"], _OPTIMIZER, tensors),
        }
        parts = {}
        for name, part in state.parts.items():
            parts[name] = state_tree.flatten(dict(part.state_dict()), name, tensors)
    except state_tree.Unsaveable as error:
        raise UserError(
            f"checkpoint: cannot hold {error}"
            " (allowed: tensors, numbers, text, and lists and dicts of them)"
        ) from None
    for name, tensor in tensors.items():
        reason = _why_unsaveable(tensor)
        if reason:
            raise UserError(f"checkpoint: cannot hold {name}, {reason}")
    rest = {
        "step": step,
        "facts": state.facts,
        "position": state.position(),
        "extra": extra,
        "optimizer": optimizer_state,
        "parts": parts,
    }
    return Content(tensors, rest)


def check_saveable(state: State) -> None:
    """Raise ``UserError`` if a checkpoint of this state could not be written. Copies nothing.

    It is the trial before the first step: a fault in the first save would come after hours.
    """
    content = collect(0, state)
    try:
        tensor_file.check_header(_FORMAT, content)
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint: cannot be written: {error}") from None


def check_finite(step: int, model: nn.Module, run_dir: Path) -> None:
    """Raise ``Diverged`` that names the first parameter which holds nan or inf.

    Parameters that are not trained and buffers may hold inf, as masks do.
    """
    totals = []
    named = [*model.named_parameters(), *model.named_buffers()]
    for _, tensor in named:
        totals.append(_total(tensor.detach()))
    if not totals:
        return
    # A sum is cheap, and nan and inf pass through it. Finite values may add up to inf as well, so
    # only those that look bad are read once more. One transfer from the device tells them.
    suspicious = ~torch.stack(totals).isfinite().cpu()
    for index in suspicious.nonzero().flatten().tolist():
        name, tensor = named[index]
        values = tensor.detach()
        is_bad = values.isnan().any() if _may_hold_inf(tensor) else ~values.isfinite().all()
        if is_bad:
            raise Diverged(
                f"model: {plain_name(name)} holds nan or inf after step {step}: no checkpoint of"
                f" it is written{_newest(run_dir)} (a lower optimizer.lr or a longer"
                " lr_schedule.warmup_steps may help)"
            )


def copy_to_cpu(content: Content, buffers: dict[str, Tensor]) -> Content:
    """Return the content with tensors of its own, which training does not change.

    Tied weights, which share memory, become one tensor each.

    Args:
        content: of a checkpoint.
        buffers: the tensors of an earlier copy. They are used again where they fit, which is
            several times as fast as new memory; new ones are added.
    """
    copies = {}
    for name, tensor in content.tensors.items():
        buffer = buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
            buffers[name] = buffer
        copies[name] = buffer.copy_(tensor.detach())
    return Content(copies, content.state)


def snapshot(
    run_dir: Path,
    step: int,
    state: State,
    buffers: dict[str, Tensor],
) -> Content:
    """Return a copy of all that a checkpoint after ``step`` steps holds.

    Args:
        run_dir: of the run, for errors.
        step: steps done.
        state: the model's weights must be finite.
        buffers: see ``copy_to_cpu``.

    Raises:
        Diverged: weights are not finite.
        UserError: an entry cannot be saved.
    """
    check_finite(step, state.model, run_dir)
    return copy_to_cpu(collect(step, state), buffers)


def write(path: Path, content: Content) -> None:
    """Write a checkpoint durably. Its tensors are contiguous and on the CPU."""
    with replacing(path) as partial:
        tensor_file.write(partial, _FORMAT, content)


def delete_older(run_dir: Path, step: int, keep: int, keep_every: int | None = None) -> None:
    """Delete checkpoints that are not wanted any more, once the one of ``step`` is durable.

    Args:
        run_dir: where they are.
        step: of the newest.
        keep: how many of the newest stay, with this one.
        keep_every: the first checkpoint at or after each multiple of so many steps stays, too.
    """
    # One of a later step may only be there if it is damaged and training began at an earlier one:
    # it does not count.
    up_to_this = [old for old in RunDir(run_dir).checkpoints() if old[0] <= step]
    kept_multiples = {0}
    for index, (old_step, path) in enumerate(up_to_this):
        if keep_every and old_step // keep_every not in kept_multiples:
            kept_multiples.add(old_step // keep_every)
        elif index < len(up_to_this) - keep:
            path.unlink(missing_ok=True)


def save(run_dir: Path, step: int, state: State, keep: int) -> Path:
    """Write a checkpoint after ``step`` steps at once; return its path.

    Raises:
        UserError: weights are not finite, or an entry cannot be saved.
        OSError: it cannot be written.
    """
    path = RunDir(run_dir).checkpoint(step)
    write(path, snapshot(run_dir, step, state, {}))
    delete_older(run_dir, step, keep)
    return path


def read(path: Path) -> Content:
    """Return the content of a checkpoint, checked against its hashes.

    Raises:
        Damaged: it is not as it was written, or no checkpoint.
        UserError: it was written by an earlier version.
    """
    try:
        return tensor_file.read(path, _FORMAT, lambda: progress.alive("loading a checkpoint"))
    except tensor_file.DamagedFile as error:
        raise Damaged(f"{path}: damaged checkpoint ({error})") from None
    except tensor_file.OtherFormat as error:
        if str(error) in _EARLIER_FORMATS:
            raise UserError(
                f"{path}: was written by an earlier version of this program"
                " (allowed: that version, or a new run directory)"
            ) from None
        raise Damaged(f"{path}: not a checkpoint of this program (format {str(error)!r})") from None


def model_state(content: Content) -> dict[str, Any]:
    """Return the state dict of the model that a checkpoint holds, with the plain model's names."""
    entries: dict[str, Any] = {}
    for name, tensor in content.tensors.items():
        if name.startswith(_MODEL):
            entries[name.removeprefix(_MODEL)] = tensor
    for name, value in content.state["extra"].items():
        entries[name] = state_tree.rebuild(value, content.tensors)
    return entries


def part_states(content: Content) -> dict[str, Any]:
    """Return the result of each part's ``state_dict``, by the part's name."""
    parts = content.state["parts"].items()
    return {name: state_tree.rebuild(value, content.tensors) for name, value in parts}


def load_latest(run_dir: Path, state: State, up_to: int | None = None) -> Loaded | None:
    """Load the newest checkpoint that is whole into a model and its optimizer.

    The optimizer takes its state; the options of its groups stay as they are. Other parts are left
    as they are: their states are in the result.

    Args:
        run_dir: where checkpoints are.
        state: takes it.
        up_to: as for ``newest``.

    Returns:
        The loaded checkpoint, and newer ones that are damaged; None if there is no checkpoint.

    Raises:
        UserError: as ``newest``, or the newest whole one belongs to another model or optimizer.
    """
    found = newest(run_dir, up_to)
    if found is None:
        return None
    _put_into(state, found.content, found.path)
    saved = found.content.state
    return Loaded(
        found.step,
        found.path,
        saved["facts"],
        found.damaged,
        saved["position"],
        part_states(found.content),
    )


def newest(run_dir: Path, up_to: int | None = None) -> Found | None:
    """Return the newest checkpoint that is whole; None if there is no checkpoint.

    Args:
        run_dir: where they are.
        up_to: steps done at most; None: the newest of all.

    Raises:
        UserError: no checkpoint is whole, or the newest whole one was written by an earlier
            version.
    """
    checkpoints = RunDir(run_dir).checkpoints()
    damaged: list[str] = []
    for step, path in reversed(checkpoints):
        if up_to is not None and step > up_to:
            continue
        try:
            return Found(step, path, read(path), damaged)
        except Damaged as error:
            damaged.append(str(error))
    if not damaged:
        return None
    raise UserError(
        f"{'; '.join(damaged)}; no other checkpoint is there (allowed: a new run directory)"
    )


def _put_into(state: State, content: Content, path: Path) -> None:
    """Put a checkpoint's content into the parts of a training, if it fits."""
    model, optimizer = state.model, state.optimizer
    saved = content.state["optimizer"]
    now = type(optimizer).__name__
    if saved["class"] != now:
        raise UserError(
            f"{path}: optimizer: {now} cannot go on with the state of {saved['class']}"
            f" (allowed: the same optimizer, {saved['class']}, or a new run directory)"
        )
    # A compiled model has longer names for the same entries.
    key_of = {plain_name(key): key for key in model.state_dict()}
    entries = {key_of.get(name, name): value for name, value in model_state(content).items()}
    try:
        model.load_state_dict(entries)
    except (RuntimeError, ValueError) as error:
        # torch begins with a line that names only the class; the faults follow, one a line.
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: belongs to another model or optimizer: {reason}") from None
    names_before, names = saved["parameters"], _optimized_names(model, optimizer)
    differing = sorted(set(names_before).symmetric_difference(names))
    if differing:
        raise UserError(
            f"{path}: optimizer: it holds {', '.join(differing)} either in the checkpoint or now"
            " (allowed: the same parameters in its groups, or a new run directory)"
        )
    # By name: the parameters may have been in other groups, and so in another order.
    by_index = {}
    for index, entries_of_one in state_tree.rebuild(saved["state"], content.tensors).items():
        by_index[names.index(names_before[index])] = entries_of_one
    missing = _missing_state(optimizer, by_index)
    if missing:
        raise UserError(
            f"{path}: optimizer: {now} with these options needs {', '.join(sorted(missing))}, which the"
            " checkpoint does not hold"
            " (allowed: the same options of the optimizer, or a new run directory)"
        )
    # The groups are the optimizer's own: options of the configuration count, not the file's.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": by_index, "param_groups": groups})


def _missing_state(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> set[str]:
    """Return the names of state without which the optimizer cannot step.

    Only a step tells: many options add state, and some optimizers make up for missing state. A
    small optimizer of the same options tries it, with a parameter of the same number of dimensions.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    missing: set[str] = set()
    tried = set()
    for index, entries in state.items():
        case = (parameters[index].dim(), *sorted(entries))
        # Without any state, the optimizer begins anew.
        if entries and case not in tried:
            tried.add(case)
            missing |= _missing_for(optimizer, parameters[index].dim(), set(entries))
    return missing


def _missing_for(optimizer: torch.optim.Optimizer, dimensions: int, names: set[str]) -> set[str]:
    """Return the state that a parameter lacks in order to step, if its state has these names."""
    allowed = set(inspect.signature(type(optimizer)).parameters) - set(IMPLEMENTATION_OPTIONS)
    options = {key: value for key, value in optimizer.defaults.items() if key in allowed}
    weights = nn.Parameter(torch.zeros([2] * dimensions))
    weights.grad = torch.zeros([2] * dimensions)
    try:
        trial = type(optimizer)([weights], **options)
        trial.step()
    except Exception:
        return set()  # it cannot be tried so, as with sparse gradients
    missing = set(trial.state[weights]) - names
    for name in missing:
        del trial.state[weights][name]
    try:
        trial.step()
    except Exception:
        return missing
    return set()


def _optimized_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of an optimizer's parameters, in the order in which its state counts."""
    names = {id(parameter): plain_name(key) for key, parameter in model.named_parameters()}
    ordered = []
    for group in optimizer.param_groups:
        ordered += [names[id(parameter)] for parameter in group["params"]]
    return ordered


def plain_name(key: str) -> str:
    """Return the name that an entry has in the model that is not compiled."""
    return ".".join(part for part in key.split(".") if part != _COMPILED)


def _why_unsaveable(tensor: Tensor) -> str:
    """Return why a tensor cannot be saved, with the fix; empty if it can."""
    if nn.parameter.is_lazy(tensor):
        return (
            "which has no shape yet: a lazy module takes it from its first input"
            " (allowed: call the model once in its factory)"
        )
    if not isinstance(tensor, Tensor):
        return f"of type {type(tensor).__name__} (allowed: tensors)"
    kind = ""
    if tensor.layout != torch.strided:
        kind = "a sparse tensor"
    elif tensor.is_quantized or is_traceable_wrapper_subclass(tensor):
        kind = "a quantized tensor or one of another library's kinds"
    elif tensor.is_meta:
        kind = "which is on the device meta and has no values"
    elif tensor.dtype not in tensor_file.DTYPES.values():
        kind = f"of type {tensor.dtype}"
    if not kind:
        return ""
    return f"{kind} (allowed: dense tensors of {', '.join(tensor_file.DTYPES)})"


def _total(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's values, float64: nan or inf if any value is."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch cannot add numbers of 8 bits
    widened = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.sum(dtype=widened).double()


def _may_hold_inf(tensor: Tensor) -> bool:
    return not (isinstance(tensor, nn.Parameter) and tensor.requires_grad)


def _newest(run_dir: Path) -> str:
    checkpoints = RunDir(run_dir).checkpoints()
    if not checkpoints:
        return ""
    step, _ = checkpoints[-1]
    return f", and the one after step {step} stays"
