"""The outcome of a trial, as ``scaletrain doctor`` shows it."""

from typing import NamedTuple

OK = "ok"
ABSENT = "absent"  # optional, and not here
BROKEN = "broken"  # here, but it does not work
SHARED_MEMORY_BYTES = 256 << 20  # free in /dev/shm, that training may need


class Check(NamedTuple):
    """The outcome of one trial."""

    name: str
    status: str  # OK, ABSENT or BROKEN
    detail: str
    fix: str = ""
    needed: bool = False  # by the default path
