"""A file that another program writes, shown as it grows."""

import contextlib
import sys
from pathlib import Path


class GrowingOutput:
    """The output of a job elsewhere, in a file that grows.

    Args:
        path: the file; it may come later, and it may be written anew from its beginning.
        prefix: stands before each line; empty for the only output on the screen.
    """

    def __init__(self, path: Path, prefix: str = ""):
        self.path = path
        self._prefix = prefix.encode()
        self._shown_bytes = 0

    def show(self, whole_lines: bool) -> None:
        """Print the text that was added since the last call.

        Args:
            whole_lines: leave an unfinished line for later, if lines get a prefix.
        """
        # Bytes: a look may cut a character in two.
        with contextlib.suppress(OSError), open(self.path, "rb") as file:
            file.seek(self._shown_bytes)
            data = file.read()
            # Several outputs take turns on the screen: half a line would get two prefixes.
            if self._prefix and whole_lines:
                data = data[: data.rfind(b"\n") + 1]
            self._shown_bytes += len(data)
            for line in data.splitlines(keepends=True):
                sys.stdout.buffer.write(self._prefix + line)
            sys.stdout.flush()
