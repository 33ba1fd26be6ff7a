"""The programs that are started with ``python -m``, one a file, and how they load torch.

They load torch without garbage collection, which would take nearly half of the time that a worker
needs to start. While torch's modules load, the collector searches all that they have created again
and again, and finds next to nothing to free.
"""

import gc


def begin(name: str) -> None:
    """Stop garbage collection, before a program imports torch.

    Args:
        name: the caller's ``__name__``. Nothing happens in a module that is only imported.
    """
    if name == "__main__":
        gc.disable()


def done() -> None:
    """Start garbage collection again, once a program has loaded and its work begins.

    The collector leaves everything alone that has been loaded.
    """
    if not gc.isenabled():
        # Without it, the first full collection would search all of torch once more.
        gc.freeze()
        gc.enable()
