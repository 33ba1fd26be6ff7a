"""Scripted faults: ``{at_step: 20, cut: 3}`` pulls host 3's cable after 20 steps.

``{after_s: 2, heal: 3}`` puts it back two seconds after the fault before it in the list. It cannot
wait for a step, since no step is done while a cable is cut.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scaletrain.errors import UserError, unknown
from scaletrain.units import bits_per_s

ACTIONS = {
    "cut": "the host's cable is pulled",
    "heal": "the cable is put back",
    "kill": "every process on the host gets SIGKILL",
    "slow": "its accelerator takes `factor` times as long, or its link gets another `bandwidth`",
}
_KEYS = {"at_step", "after_s", "factor", "bandwidth"}  # of a fault, beside its action


class Fault(NamedTuple):
    """One thing that happens to one host."""

    at_step: int  # it happens once the first worker has done this many steps, during the next one
    action: str  # a key of ACTIONS
    host: int
    factor: float | None = None  # of ``slow``: of the emulated accelerator's time
    bandwidth: str | None = None  # of ``slow``: of the host's link, from then on
    after_s: float | None = None  # seconds after the fault before it; None: at its step

    def __str__(self) -> str:
        if self.after_s is None:
            text = f"at step {self.at_step}: {self.action} h{self.host}"
        else:
            text = f"{self.after_s:g} s later: {self.action} h{self.host}"
        if self.factor:
            text += f" x {self.factor:g}"
        elif self.bandwidth:
            text += f" to {self.bandwidth}"
        return text


def parse(faults: Sequence[Any], hosts: int) -> tuple[Fault, ...]:
    """Return the faults of a configuration, in the order of their steps.

    Args:
        faults: mappings such as ``{"at_step": 20, "cut": 3}``, as they come from YAML.
        hosts: how many hosts there are.

    Raises:
        UserError: one of them is not a fault; the message names it as ``faults[INDEX]``.
    """
    parsed: list[Fault] = []
    for index, fault in enumerate(faults):
        before = parsed[-1] if parsed else None
        parsed.append(_parse(f"faults[{index}]", fault, hosts, before))
    # The sort keeps the order of equal steps: one with ``after_s`` stays behind its predecessor.
    return tuple(sorted(parsed, key=lambda fault: fault.at_step))


def _parse(where: str, fault: Any, hosts: int, before: Fault | None) -> Fault:
    action = _action(where, fault)
    after_s = fault.get("after_s")
    step = fault.get("at_step")
    if after_s is not None:
        step = _step_of_predecessor(where, after_s, step, before)
    if not _is_count(step):
        raise UserError(
            f"{where}.at_step: {step!r} is not allowed (allowed: a number of steps, 0 or more)"
        )
    host = fault[action]
    if not _is_count(host) or host >= hosts:
        raise UserError(f"{where}.{action}: {host!r} is not a host (allowed: 0 to {hosts - 1})")
    factor = fault.get("factor")
    bandwidth = fault.get("bandwidth")
    if action == "slow":
        _check_slowness(where, factor, bandwidth)
    elif factor is not None or bandwidth is not None:
        raise UserError(f"{where}: factor and bandwidth belong to slow, not to {action}")
    if factor is not None:
        factor = float(factor)
    return Fault(step, action, host, factor, bandwidth, after_s)


def _action(where: str, fault: Any) -> str:
    """Return the one key of a fault that is an action."""
    if not isinstance(fault, Mapping):
        raise UserError(
            f"{where}: {fault!r} is not allowed"
            " (allowed: a mapping such as {at_step: 20, cut: 3})"
        )
    for key in fault:
        if key not in _KEYS and key not in ACTIONS:
            raise unknown(f"{where}: key", str(key), [*_KEYS, *ACTIONS])
    actions = [key for key in fault if key in ACTIONS]
    if len(actions) != 1:
        raise UserError(f"{where}: {fault!r} must have exactly one of {', '.join(ACTIONS)}")
    return actions[0]


def _step_of_predecessor(where: str, after_s: Any, step: Any, before: Fault | None) -> int:
    is_duration = isinstance(after_s, int | float) and after_s >= 0
    if step is not None or before is None or not is_duration:
        raise UserError(
            f"{where}.after_s: {after_s!r} must be seconds after the fault before it,"
            " without at_step"
        )
    return before.at_step


def _check_slowness(where: str, factor: Any, bandwidth: Any) -> None:
    if (factor is None) == (bandwidth is None):
        raise UserError(
            f"{where}: slow needs one of factor (such as 2.0) and bandwidth (such as 100Mbit)"
        )
    if factor is not None:
        if not isinstance(factor, int | float) or factor <= 0:
            raise UserError(
                f"{where}.factor: {factor!r} is not allowed (allowed: a number above 0)"
            )
        return
    try:
        # Only for its errors: a mistake shows before the run, not at the fault's step.
        bits_per_s(bandwidth)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def _is_count(value: Any) -> bool:
    """Return True for a whole number, 0 or more. To Python, True is a number as well."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
