"""Host lists in SLURM's notation: ``n[01-03,7],gpu1`` is n01, n02, n03, n7 and gpu1.

The package python-hostlist reads the same notation, but it also accepts an empty list, an empty
name (``h1,``) and a name with a space, and it limits the single entries only, not the list.
"""

import re

from scaletrain.errors import UserError

SHARE_RUN_DIR = "the run directory must be a folder that all hosts share"  # for ``explain``
_MAX_HOSTS = 65536  # a longer list is a slip of the keyboard


def from_options(hosts: str, hostfile: str) -> list[str]:
    """Return the hosts of a launcher's option ``hosts``; none if the option is not set.

    Raises:
        UserError: ``hosts`` is not a list of hosts, or the option ``hostfile`` is set as well.
    """
    if hosts and hostfile:
        raise UserError(
            "launcher.hosts and launcher.hostfile: name the hosts in one of them, not in both"
        )
    if not hosts:
        return []
    return expand(hosts)


def expand(text: str) -> list[str]:
    """Return the hosts of a list in order, as ``scontrol show hostnames`` gives them.

    Text behind a bracket belongs to each of its hosts.

    >>> expand("n[08-10]:2,gpu1")
    ['n08:2', 'n09:2', 'n10:2', 'gpu1']

    Raises:
        UserError: the text is not such a list, or names too many hosts.
    """
    hosts: list[str] = []
    for entry in _split_outside_brackets(text.strip()):
        hosts += _expand_entry(entry, text)
        if len(hosts) > _MAX_HOSTS:
            raise _too_many(text)
    return hosts


def _split_outside_brackets(text: str) -> list[str]:
    """Split at the commas that separate entries; those in brackets separate numbers."""
    # A comma is within brackets if the next bracket after it is a closing one.
    return re.split(r",(?![^\[]*\])", text)


def _expand_entry(entry: str, text: str) -> list[str]:
    """Return the hosts of one entry, such as ``r[1-2]n[0-1]``; ``text`` is for errors."""
    parts = re.split(r"\[([^\[\]]*)\]", entry)
    literals = parts[::2]  # text stands at even places, the content of brackets at odd ones
    # A bracket that is left outside the pairs has no partner.
    if not entry or re.search(r"[\[\] \t]", "".join(literals)):
        raise _not_a_list(text)
    hosts = [""]
    for place, part in enumerate(parts):
        choices = [part] if place % 2 == 0 else _numbers(part, text)
        # Before the product is made: two brackets of 0-65535 would fill the memory.
        if len(hosts) * len(choices) > _MAX_HOSTS:
            raise _too_many(text)
        hosts = [host + choice for host in hosts for choice in choices]
    return hosts


def _numbers(ranges: str, text: str) -> list[str]:
    """Return the numbers of ``01-03,7``, filled up with zeros to the width of a range's start."""
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise _not_a_list(text)
        width = len(match[1])
        first = int(match[1])
        last = int(match[2] or match[1])
        # The upper limit keeps a slip such as 1-9999999999 from filling the memory below.
        if not first <= last < first + _MAX_HOSTS:
            raise _not_a_list(text)
        for number in range(first, last + 1):
            numbers.append(str(number).zfill(width))
    return numbers


def _not_a_list(text: str) -> UserError:
    return UserError(
        f"launcher.hosts: {text!r} is not a list of hosts (allowed: h1,h2 or n[01-16,20])"
    )


def _too_many(text: str) -> UserError:
    return UserError(f"launcher.hosts: {text!r} is more than {_MAX_HOSTS} hosts")
