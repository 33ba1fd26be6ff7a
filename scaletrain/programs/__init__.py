"""How our programs load torch: without garbage collection, which would take nearly half of the time that a worker needs to start.

While torch's modules load, the collector searches all that they have made again and again, and finds next to nothing.
"""

import gc


def begin(name: str) -> None:
    """Before a program imports torch. ``name`` is the caller's ``__name__``: nothing happens where it is imported as a module."""
    if name == "__main__":
        gc.disable()


def done() -> None:
    """Once its work begins: the collector runs again, and leaves alone what has been loaded."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
