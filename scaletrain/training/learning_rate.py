"""The learning rate of a step: a pure function of the step, whatever the number of workers."""

import math

from scaletrain.config import LrSchedule


def learning_rate(schedule: LrSchedule, base_lr: float, step: int, num_steps: int) -> float:
    """Return the rate of one optimizer step.

    The policy runs over the whole run, and the warm-up multiplies it: linearly from
    base_lr / warmup_steps to base_lr.

    Args:
        schedule: policy and warm-up.
        base_lr: the rate that they multiply.
        step: the step, from 0.
        num_steps: steps of the whole run.

    Source:
        Caffe's ``SolverParameter.lr_policy`` (caffe.proto) and the half cosine; the warm-up is that
        of Goyal et al. 2017 (arXiv 1706.02677), section 2.2.
    """
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
            factor = (1 - step / num_steps) ** schedule.power
        case "sigmoid":
            factor = 1 / (1 + math.exp(-schedule.gamma * (step - schedule.step_size)))
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    if schedule.warmup_steps:
        # ``step + 1``, since a factor of 0 would make the first step useless.
        factor *= min(1.0, (step + 1) / schedule.warmup_steps)
    return base_lr * factor
