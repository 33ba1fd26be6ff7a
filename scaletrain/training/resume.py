"""A run that goes on from a checkpoint: which facts have changed, and which of them count.

A checkpoint holds the facts that decided its training: keys of the YAML file with their values.
When a run goes on, its configuration counts, and a line names every difference.
"""

import json
from typing import Any

import torch

from scaletrain.config import RunConfig, exchange_label
from scaletrain.training.checkpoint import IMPLEMENTATION_OPTIONS, Loaded
from scaletrain.training.learning_rate import STRETCHED

# Keys of one worker's facts that are no keys of the YAML file.
_SAMPLES, _GLOBAL_BATCH = "training samples", "global batch"
_LENGTH = "steps of the run"
_SCHEDULE = "lr_schedule.name"
# The person wants a change of these, or it decides nothing.
_SILENT = ("steps", "epochs", "workers")
_ORDER = ("seed", _SAMPLES)  # decide which samples make up a step
_SIZE = ("batch_size", "batch_mode", _GLOBAL_BATCH)


def training_facts(
    config: RunConfig,
    optimizer: torch.optim.Optimizer,
    num_samples: int | None,
    global_batch: int,
    num_steps: int,
) -> dict[str, Any]:
    """Return the facts that decide a training, as JSON, by the keys that people type.

    Args:
        config: of the run.
        optimizer: with all its options, also those that the configuration leaves out.
        num_samples: in the training set; None: a stream, which does not say.
        global_batch: samples a step, of all workers.
        num_steps: of the whole run.
    """
    values: dict[str, Any] = {}
    for kind in ("model", "data", "workload"):
        named = getattr(config, kind)
        if named is not None:
            values[kind] = named.name
            values |= _dotted(kind, named.options)
    values[_SAMPLES] = num_samples
    values["loss"] = config.loss.name
    values |= _dotted("loss", config.loss.options)
    values["batch_size"] = config.batch_size
    values["batch_mode"] = config.batch_mode
    values[_GLOBAL_BATCH] = global_batch
    values["accumulate"] = config.accumulate
    values["precision"] = config.precision
    if config.sync_batchnorm:
        values["sync_batchnorm"] = True
    values["optimizer"] = type(optimizer).__name__
    values |= _dotted("optimizer", optimizer.defaults)
    for key in IMPLEMENTATION_OPTIONS:
        values.pop(f"optimizer.{key}", None)
    if config.optimizer is not None:
        values["optimizer.groups"] = [group.model_dump() for group in config.optimizer.groups]
    values |= _dotted("lr_schedule", config.lr_schedule.model_dump())
    values[_LENGTH] = num_steps
    values["callbacks"] = [named.model_dump() for named in config.callbacks]
    values["seed"] = config.seed
    values["steps"] = config.steps
    values["epochs"] = config.epochs
    values["workers"] = config.workers
    values["exchange"] = exchange_label(config.exchange)
    if config.exchange.options.get("groups", 1) > 1:
        values["groups"] = config.exchange.options["groups"]
    # Values become what they will be when a file gives them back: tuples are lists there.
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def compare(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for every difference: which value counts, and the effect.

    Args:
        before: the facts in the checkpoint.
        now: the facts of the run that goes on from it.

    >>> compare({"seed": 1, "optimizer.lr": 0.1}, {"seed": 1, "optimizer.lr": 0.2})
    ['optimizer.lr: 0.2 counts, the checkpoint was written with 0.1']
    """
    lines = []
    is_size_said = False
    for key in [*now, *[key for key in before if key not in now]]:
        old, new = _shown(before, key), _shown(now, key)
        if old == new or key in _SILENT:
            continue
        # The rate of every step follows from the length of the run, under some policies.
        is_stretched = (
            before.get(_SCHEDULE) == now.get(_SCHEDULE) and now.get(_SCHEDULE) in STRETCHED
        )
        if key == _LENGTH and not (is_stretched and key in before):
            continue
        owner = key.partition(".")[0]
        if owner != key and before.get(owner) != now.get(owner):
            continue  # options of another model or other data: the line of its name says enough
        if key == _GLOBAL_BATCH and is_size_said:
            continue  # it only follows from the keys before it
        is_size_said = is_size_said or key in _SIZE
        lines.append(_line(key, old, new))
    return lines


def _line(key: str, old: str, new: str) -> str:
    """Return the line for one difference."""
    if key in _SIZE:
        effect = "the step's samples change from here on"
    elif key in _ORDER:
        effect = "the order of samples changes from here on"
    elif key == "data" or key.startswith("data."):
        effect = "training goes on with other data"
    elif key == _LENGTH:
        effect = "the schedule runs over all of them, so the learning rate jumps here"
    elif key in ("model", "workload"):
        # The weights fit: a factory of another name may make the same model.
        effect = "training goes on with its weights"
    else:
        return f"{key}: {new} counts, the checkpoint was written with {old}"
    return f"{key}: {new} now, {old} in the checkpoint: {effect}"


def resume_lines(loaded: Loaded, now: dict[str, Any]) -> list[str]:
    """Return all that a person should know about a run that goes on.

    Args:
        loaded: the checkpoint.
        now: the facts of the run.
    """
    damaged = [f"{line}: left out, {loaded.path} is loaded instead" for line in loaded.damaged]
    return [*damaged, *compare(loaded.facts, now)]


def _dotted(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": value for key, value in options.items()}


def _shown(values: dict[str, Any], key: str) -> str:
    """Return a value as the YAML file has it."""
    if key not in values:
        return "its default"
    value = values[key]
    return value if isinstance(value, str) else json.dumps(value)
