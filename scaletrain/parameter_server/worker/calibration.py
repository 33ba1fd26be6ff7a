"""The size of blocks, chosen by a short measurement of the links.

A step pushes and pulls a server's share of the model, S bytes, in blocks of b bytes. Two costs
depend on b. Each block has a cost of its own, whatever its size: S / b of them take S / b * t. And
the last block goes there and back when nothing else is left to do: b * r, with r the seconds that a
byte takes there and back. Their sum is smallest for b = sqrt(S * t / r). So fast links get large
blocks, and slow ones small ones. A step's weights do not depend on the size, not by a bit.
"""

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker.link import Identity, ServerLink
from scaletrain.run import progress
from scaletrain.timeouts import Timeouts
from scaletrain.world import World

# t: messages, the optimizer's step and the answer, in a server's and a worker's Python
# (benchmarks/results/parameter_server.md).
_BLOCK_S = 0.6e-3
_SMALLEST = 1 << 17  # bytes; below, messages keep the cores busy that train
_LARGEST = 1 << 23
_UNMEASURED = 1 << 23  # where no measurement succeeded
_MEASURE_S = 0.25  # of all servers together
_PATIENCE_S = 10.0  # a last rank that comes later than this is not waited for
_KEY = "scaletrain/parameter_server/blocks"
_RATE_KEY = "scaletrain/parameter_server/rate"


@dataclass(frozen=True)
class Cut:
    """The size of blocks, and the measurement that it follows from."""

    block_bytes: int
    bytes_per_s: float | None = None  # there and back, of the slowest link; None: not measured

    def to_json(self) -> dict[str, Any]:
        """Return the choice for the run's header and summary."""
        megabytes_per_s = None if self.bytes_per_s is None else self.bytes_per_s / 1e6
        return {"block_mb": self.block_bytes / (1 << 20), "link_mb_per_s": megabytes_per_s}

    def __str__(self) -> str:
        size = f"blocks: {self.block_bytes / (1 << 20):g} MiB"
        if self.bytes_per_s is None:
            return f"{size} (the links could not be measured)"
        return f"{size} (a server sends back {self.bytes_per_s / 1e6:.3g} MB/s)"


def agree(
    settings: Settings,
    run_dir: Path,
    world: World,
    store: dist.Store,
    num_bytes: int,
    is_beside: bool = False,
) -> Cut:
    """Return the size of blocks; every worker of a job gets the same one.

    1. Rank 0 measures. Where the only server runs beside it, and other workers on other hosts, the
       last rank measures, and rank 0 waits for that, but not for ever.
    2. Rank 0 chooses, and the others wait for its choice. Workers that come later, and a rank 0
       that was started again, take what is there.

    Args:
        settings: of the job.
        run_dir: of the job.
        world: this worker's place.
        store: of the job, sealed.
        num_bytes: size of the model without sparse tables.
        is_beside: whether server k runs beside worker k.

    Raises:
        ServerError: a server cannot be reached, or refuses.
    """
    if not settings.measures_blocks:
        return Cut(settings.block_bytes)
    measurer = 0
    if is_beside and settings.servers == 1 and settings.hosts > 1:
        measurer = world.size - 1
    if 0 < world.rank == measurer and not store.check([_KEY]):
        store.set(_RATE_KEY, json.dumps(measure(settings, run_dir, world.rank)))
    if world.rank == 0 and not store.check([_KEY]):
        rate = None
        if measurer == 0:
            rate = measure(settings, run_dir, world.rank)
        elif _comes(store, _RATE_KEY):
            rate = json.loads(store.get(_RATE_KEY))
        cut = choose(math.ceil(num_bytes / settings.servers), rate)
        store.set(_KEY, json.dumps(dataclasses.asdict(cut)))
        return cut
    with progress.waiting("rank 0, which measures the links"):
        return Cut(**json.loads(store.get(_KEY)))


def _comes(store: dist.Store, key: str) -> bool:
    """Wait for a key for a while; return True if it has come."""
    deadline = time.monotonic() + _PATIENCE_S
    with progress.waiting("the last rank, which measures the link"):
        while time.monotonic() < deadline:
            if store.check([key]):
                return True
            time.sleep(0.02)
    return False


def measure(settings: Settings, run_dir: Path, rank: int) -> float | None:
    """Return the seconds that a byte takes to the slowest server and back; None: unknown.

    Takes ``_MEASURE_S`` at most, once the servers are up.

    Raises:
        ServerError: a server cannot be reached, or refuses.
    """
    deadline = time.monotonic() + Timeouts(settings.timeout_s).join_s
    # No worker: it joins under an identity of its own.
    identity = Identity.make(settings, run_dir, rank, {})
    slowest: float | None = None
    try:
        for server in range(settings.servers):
            link = ServerLink(identity, server, [])
            with progress.waiting("the parameter servers"):
                rate = link.measure(deadline, _MEASURE_S / settings.servers)
            if rate is not None:
                slowest = max(rate, slowest or 0.0)
    finally:
        identity.context.term()
    return slowest


def choose(num_bytes: int, rate: float | None) -> Cut:
    """Return the size of blocks for a server's share of the model, a power of two.

    Args:
        num_bytes: of the share.
        rate: seconds that a byte takes there and back; None: unknown.

    >>> choose(100_000_000, 2e-9).block_bytes >> 20
    4
    >>> choose(30_000_000, 160e-9).block_bytes >> 10  # 100 Mbit/s
    256
    """
    if rate is None:
        return Cut(_UNMEASURED)
    best = math.sqrt(num_bytes * _BLOCK_S / rate)
    rounded = 2 ** round(math.log2(max(best, 1.0)))
    return Cut(min(max(rounded, _SMALLEST), _LARGEST), 1 / rate)
