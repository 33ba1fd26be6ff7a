"""The algorithm of one allreduce, and how a person names an algorithm or a wire."""

import os
from typing import Any, NamedTuple

AUTO = "auto"  # the engine chooses
NATIVE = "native"  # the wire's own allreduce: gloo's, MPI's, or the one that shared memory has


class Choice(NamedTuple):
    """An algorithm, and how a message is cut for it."""

    collective: str
    segments: int  # parts of the message that go through the schedule side by side


WIRES_OWN = Choice(NATIVE, 1)


class Options(NamedTuple):
    """How allreduces run.

    Each is the name of a file in ``collectives/`` or ``engine/transport/``, with options if need be
    (``pipelined_tree:segments=8``), or ``auto``.
    """

    collective: str = AUTO
    transport: str = AUTO

    @classmethod
    def from_env(cls) -> "Options":
        """Return the options that the environment sets.

        Raises:
            UserError: a variable names an algorithm, wire or option that does not exist.
        """
        options = cls(
            os.environ.get("SCALETRAIN_COLLECTIVE", AUTO),
            os.environ.get("SCALETRAIN_TRANSPORT", AUTO),
        )
        check(options.collective, "collective", "SCALETRAIN_COLLECTIVE")
        check(options.transport, "transport", "SCALETRAIN_TRANSPORT")
        return options


def check(text: str, kind: str, key: str = "") -> tuple[str, dict[str, Any]]:
    """Return the name and the options of a collective or transport as a person writes it.

    Args:
        text: ``auto``, ``NAME``, or ``NAME:OPTION=VALUE:...``; for a collective also ``native``.
        kind: ``collective`` or ``transport``.
        key: the key or variable that a person set, for error messages.

    Raises:
        UserError: no such name, option or value.
    """
    allowed = (AUTO, NATIVE) if kind == "collective" else (AUTO,)
    if text in allowed:
        return text, {}
    # Not at the top: modules that read configurations take longer to load than the engine.
    from scaletrain.config import plugin_spec

    return plugin_spec(kind, text, key or kind, allowed)
