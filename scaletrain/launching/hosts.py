"""Host lists as SLURM writes them: ``n[01-03,7],gpu1`` is n01, n02, n03, n7 and gpu1."""

import itertools
import re

from scaletrain.errors import UserError

_MOST = 65536  # hosts; beyond that it is a slip of the keyboard


def expand(text: str) -> list[str]:
    """The hosts of a list, in order, as ``scontrol show hostnames`` gives them. What follows a bracket (``:2``) goes to each of its hosts.

    Raises:
        UserError: not such a list.
    """
    found: list[str] = []
    for word in re.split(r",(?![^\[]*\])", text.strip()):
        parts = re.split(r"\[([^\[\]]*)\]", word)  # text, range, text, range, ..., text
        if not word or set("[] \t") & set("".join(parts[::2])):
            raise _wrong(text)
        choices = [
            [part] if index % 2 == 0 else _numbers(part, text) for index, part in enumerate(parts)
        ]
        found += (
            "".join(choice)
            for choice in itertools.islice(itertools.product(*choices), _MOST + 1 - len(found))
        )
        if len(found) > _MOST:
            raise UserError(f"launcher.hosts: {text!r} is more than {_MOST} hosts")
    return found


def _numbers(ranges: str, text: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if not int(first) <= int(last) < int(first) + _MOST:
            raise _wrong(text)
        numbers += (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return numbers


def _wrong(text: str) -> UserError:
    return UserError(
        f"launcher.hosts: {text!r} is not a list of hosts (allowed: h1,h2 or n[01-16,20])"
    )
