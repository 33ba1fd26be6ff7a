"""The learning rate of a step: a pure function of the step, whatever the number of workers."""

import math

from scaletrain.config import LrSchedule
from scaletrain.config.schema import LrScaling

# Policies that look at the length of the run: another length changes the rate of every step.
STRETCHED = ("multistep", "poly", "cosine")
_REFERENCE_BATCH = 256  # of the rules that are shown and not applied; Goyal et al.'s


def learning_rates(
    schedule: LrSchedule, base_lrs: list[float], step: int, num_steps: int
) -> list[float]:
    """Return the rate of each parameter group in one optimizer step.

    The policy runs over the whole run, and the warm-up multiplies it: linearly from
    base_lr / warmup_steps to base_lr.

    torch's momentum holds gradients without their rates, so it needs none of the correction for
    changing rates of Goyal et al. 2017, section 3: it is the form that the correction leads to.

    Args:
        schedule: policy and warm-up.
        base_lrs: the rates that they multiply, one for each group. ``min_lr`` is that of the first.
        step: the step, from 0.
        num_steps: steps of the whole run.

    Source:
        Caffe's ``SolverParameter.lr_policy`` (caffe.proto) and the half cosine; the warm-up is that
        of Goyal et al. 2017 (arXiv 1706.02677), section 2.2.
    """
    floor = 0.0  # as a part of the rate
    if schedule.min_lr:
        floor = schedule.min_lr / base_lrs[0]
    match schedule.name:
        case "fixed":
            factor = 1.0
        case "step":
            factor = schedule.gamma ** (step // schedule.step_size)
        case "multistep":
            # Milestones are fractions of the run, so they move with its length.
            passed = [m for m in schedule.milestones if step >= m * num_steps]
            factor = schedule.gamma ** len(passed)
        case "exp":
            factor = schedule.gamma**step
        case "inv":
            factor = (1 + schedule.gamma * step) ** -schedule.power
        case "poly":
            factor = floor + (1 - floor) * (1 - step / num_steps) ** schedule.power
        case "sigmoid":
            factor = 1 / (1 + math.exp(-schedule.gamma * (step - schedule.step_size)))
        case "cosine":
            factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
    factor = max(floor, factor)
    if schedule.warmup_steps:
        # ``step + 1``, since a factor of 0 would make the first step useless.
        factor *= min(1.0, (step + 1) / schedule.warmup_steps)
    return [base_lr * factor for base_lr in base_lrs]


def scale(scaling: LrScaling, batch: int) -> float:
    """Return the factor of a rule for a batch.

    >>> scale(LrScaling(rule="sqrt", base_batch=64), 256)
    2.0
    """
    ratio = batch / scaling.base_batch
    return ratio if scaling.rule == "linear" else math.sqrt(ratio)


def describe(schedule: LrSchedule, base_lrs: list[float], batch: int, num_steps: int) -> list[str]:
    """Return the arithmetic of the rates, as lines for people.

    Args:
        schedule: policy, warm-up and scaling, which the rates have in them.
        base_lrs: the rates that the schedule multiplies, one for each group.
        batch: samples a step, of all workers.
        num_steps: steps of the whole run.
    """
    rates = _listed(base_lrs)
    lines = []
    arithmetic, constancy = "", "; it does not change with the number of workers"
    if schedule.scaling is not None:
        arithmetic, constancy = _arithmetic(schedule.scaling, base_lrs, batch), ""
    elif batch != _REFERENCE_BATCH:
        rules = {}
        for rule in ("linear", "sqrt"):
            factor = scale(LrScaling(rule=rule, base_batch=_REFERENCE_BATCH), batch)
            rules[rule] = f"{base_lrs[0] * factor:.4g}"
        lines.append(
            f"scaling rules: {base_lrs[0]:g} tuned for {_REFERENCE_BATCH} samples a step would be"
            f" {rules['linear']} for {batch} by the linear rule, {rules['sqrt']} by the square root"
            " (lr_schedule.scaling applies one)"
        )
    warmup = ""
    if schedule.warmup_steps:
        warmup = f", {schedule.warmup_steps} steps of warm-up"
    if schedule.warmup_steps > num_steps:
        warmup += f" (longer than the run: the rate never reaches {rates})"
    floor = f", no less than {schedule.min_lr:g}" if schedule.min_lr else ""
    policy = f"{schedule.name}{floor}{warmup}{constancy}"
    return [f"learning rate: {rates} for {batch} samples{arithmetic}, {policy}", *lines]


def _arithmetic(scaling: LrScaling, base_lrs: list[float], batch: int) -> str:
    """Return how a rule made the rates, such as `` = 0.1 x 512/256 (linear rule)``."""
    factor = scale(scaling, batch)
    before = _listed([rate / factor for rate in base_lrs])
    if scaling.rule == "linear":
        return f" = {before} x {batch}/{scaling.base_batch} (linear rule)"
    return f" = {before} x sqrt({batch}/{scaling.base_batch}) (square-root rule)"


def _listed(rates: list[float]) -> str:
    """Return different rates in words."""
    return ", ".join(f"{rate:g}" for rate in dict.fromkeys(rates))
