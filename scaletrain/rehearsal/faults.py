"""Scripted faults of a rehearsal: ``{at_step: 20, cut: 3}`` pulls host 3's cable once the job has done 20 steps.

``{after_s: 2, heal: 3}`` puts it back two seconds after the fault before it in the list: a job whose cable is cut takes no further step.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from scaletrain.errors import UserError, unknown
from scaletrain.units import bits_per_s

ACTIONS = {
    "cut": "the host's cable is pulled",
    "heal": "the cable is put back",
    "kill": "every process on the host gets SIGKILL",
    "slow": "its emulated accelerator takes `factor` times as long, or its link gets another `bandwidth`",
}


_KEYS = {"at_step", "after_s", "factor", "bandwidth"}


class Fault(NamedTuple):
    """One thing that happens to one host, when the first worker has done ``at_step`` steps (so: during the next step), and, if
    ``after_s`` is given, so many seconds after the fault before it."""

    at_step: int
    action: str
    host: int
    factor: float | None = None
    bandwidth: str | None = None
    after_s: float | None = None

    def __str__(self) -> str:
        how = (
            f" x {self.factor:g}"
            if self.factor
            else f" to {self.bandwidth}"
            if self.bandwidth
            else ""
        )
        when = f"at step {self.at_step}" if self.after_s is None else f"{self.after_s:g} s later"
        return f"{when}: {self.action} h{self.host}{how}"


def parse(faults: Sequence[Any], hosts: int) -> tuple[Fault, ...]:
    """The faults of a configuration, in the order of their steps. Raises ``UserError`` for what is none."""
    parsed: list[Fault] = []
    for index, fault in enumerate(faults):
        parsed.append(_parse(index, fault, hosts, parsed[-1] if parsed else None))
    return tuple(
        sorted(parsed, key=lambda fault: fault.at_step)
    )  # what comes after a fault stays behind it


def _parse(index: int, fault: Any, hosts: int, before: Fault | None) -> Fault:
    where = f"launcher.faults.{index}"
    if not isinstance(fault, dict):
        raise UserError(
            f"{where}: {fault!r} is not allowed (allowed: a mapping such as {{at_step: 20, cut: 3}})"
        )
    for key in fault:
        if key not in _KEYS | ACTIONS.keys():
            raise unknown(f"{where}: key", str(key), [*_KEYS, *ACTIONS])
    actions = [key for key in fault if key in ACTIONS]
    if len(actions) != 1:
        raise UserError(f"{where}: {fault!r} must have exactly one of {', '.join(ACTIONS)}")
    action = actions[0]
    step, host, factor, bandwidth = (
        fault.get("at_step"),
        fault[action],
        fault.get("factor"),
        fault.get("bandwidth"),
    )
    after_s = fault.get("after_s")
    if after_s is not None:
        if (
            step is not None
            or before is None
            or not isinstance(after_s, int | float)
            or after_s < 0
        ):
            raise UserError(
                f"{where}.after_s: {after_s!r} must be seconds after the fault before it, without at_step"
            )
        step = before.at_step
    if not _whole(step):
        raise UserError(
            f"{where}.at_step: {step!r} is not allowed (allowed: a number of steps, 0 or more)"
        )
    if not _whole(host) or host >= hosts:
        raise UserError(f"{where}.{action}: {host!r} is not a host (allowed: 0 to {hosts - 1})")
    if action != "slow" and (factor is not None or bandwidth is not None):
        raise UserError(f"{where}: factor and bandwidth belong to slow, not to {action}")
    if action == "slow":
        if (factor is None) == (bandwidth is None):
            raise UserError(
                f"{where}: slow needs one of factor (such as 2.0) and bandwidth (such as 100Mbit)"
            )
        if factor is not None and not (isinstance(factor, int | float) and factor > 0):
            raise UserError(
                f"{where}.factor: {factor!r} is not allowed (allowed: a number above 0)"
            )
        if bandwidth is not None:
            try:
                bits_per_s(bandwidth)
            except UserError as error:
                raise UserError(f"{where}.{error}") from None
    return Fault(step, action, host, None if factor is None else float(factor), bandwidth, after_s)  # type: ignore[arg-type]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
