"""The command line and environment that others see of this process: ``ps``, /proc, psutil.

The package setproctitle writes a title over the command line that the process began with, and needs
room there. The kernel can also show text from another place, for the environment as well.
"""

import ctypes
from collections.abc import Mapping, Sequence

from scaletrain.host.processes import stat_fields

_PR_SET_MM = 35
_PR_SET_MM_MAP = 14
_UNCHANGED = 0xFFFFFFFF  # of the descriptor of the program's file
# Fields of prctl_mm_map in <linux/prctl.h>, in their order, and the field of proc(5) that each is
# now. The kernel takes all of them at once.
_FIELDS = {
    "start_code": 26, "end_code": 27, "start_data": 45, "end_data": 46, "start_brk": 47, "brk": None, "start_stack": 28,
    "arg_start": 48, "arg_end": 49, "env_start": 50, "env_end": 51, "auxv": None,
}  # fmt: skip

# The text that the kernel shows must stay in memory.
_shown: "ctypes.Array[ctypes.c_char] | None" = None


class _Map(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in _FIELDS),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_uint32),
    ]


def show(argv: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Show a command line and an environment as this process's own.

    Return False if the kernel cannot do that: the old ones are shown then.
    """
    global _shown
    fields = stat_fields("self")
    if len(fields) < 50:
        return False
    arguments = b"".join(_encoded(word) for word in argv)
    variables = b"".join(_encoded(f"{name}={value}") for name, value in environ.items())
    buffer = ctypes.create_string_buffer(arguments + variables)
    start = ctypes.addressof(buffer)
    library = ctypes.CDLL(None, use_errno=True)
    library.sbrk.restype = ctypes.c_void_p
    now = _Map(exe_fd=_UNCHANGED)
    for name, number in _FIELDS.items():
        if number is not None:
            setattr(now, name, int(fields[number - 3]))  # the list begins with field 3
    # Read last: it must not move between here and the call.
    now.arg_start = start
    now.arg_end = now.env_start = start + len(arguments)
    now.env_end = now.env_start + len(variables)
    now.brk = library.sbrk(0)
    size = ctypes.sizeof(now)
    if library.prctl(_PR_SET_MM, _PR_SET_MM_MAP, ctypes.byref(now), size, 0) != 0:
        return False
    _shown = buffer
    return True


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogateescape") + b"\0"
