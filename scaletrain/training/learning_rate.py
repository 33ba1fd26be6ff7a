"""The learning rate of a step: a pure function. Schedules count optimizer steps, whatever the number of workers."""

import math

from scaletrain.config import LrSchedule


def learning_rate(schedule: LrSchedule, base_lr: float, step: int, num_steps: int) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``num_steps``.

    Policies are Caffe's (``caffe.proto``, SolverParameter.lr_policy) and the half cosine; the warm-up is linear from base_lr / warmup_steps
    to base_lr (Goyal et al. 2017, section 2.2). The policy runs over the whole run, the warm-up multiplies it.
    """
    s, i = schedule, step
    match s.name:
        case "fixed":
            factor = 1.0
        case "step":
            factor = s.gamma ** (i // s.step_size)
        case "multistep":
            factor = s.gamma ** sum(i >= fraction * num_steps for fraction in s.milestones)
        case "exp":
            factor = s.gamma**i
        case "inv":
            factor = (1 + s.gamma * i) ** -s.power
        case "poly":
            factor = (1 - i / num_steps) ** s.power
        case "sigmoid":
            factor = 1 / (1 + math.exp(-s.gamma * (i - s.step_size)))
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * i / num_steps))
    warmup = min(1.0, (i + 1) / s.warmup_steps) if s.warmup_steps else 1.0
    return base_lr * factor * warmup
