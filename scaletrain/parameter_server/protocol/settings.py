"""The options of the exchange ``parameter_server``, checked together; every process of a job reads the same ones."""

import os
from typing import Any, NamedTuple

from scaletrain.errors import UserError, unknown

SILENCE_S = 10.0  # a link without a sign of life for this long is cut
MODES = ("sync", "async", "bounded", "local_sgd", "post_local")


class Settings(NamedTuple):
    """See docs/parameter_server.md for each."""

    workers: int
    timeout_s: float = 60.0
    hosts: int = 1
    mode: str = "sync"
    servers: int = 1
    placement: str = "auto"
    backup_workers: int = 0
    staleness: int = 3
    divide_lr: bool = True
    min_workers: int | None = None
    local_steps: int = 16
    local_after: int = 0
    outer: str = "average"
    outer_lr: float = 0.7
    outer_momentum: float = 0.5
    server_lr: dict[str, Any] | None = None
    wire: str = "float32"
    link: str = "auto"
    security: str = "auto"
    connections: int = 0
    block_mb: float = 0.0
    snapshot_updates: int | None = None
    snapshot_s: float | None = None
    restart_servers: int = 0

    @property
    def local(self) -> bool:
        """Workers take local steps and push how far they went, instead of gradients."""
        return self.mode in ("local_sgd", "post_local")

    @property
    def on_one_host(self) -> bool:
        return self.link == "unix" or (self.link == "auto" and self.hosts == 1)

    @property
    def encrypted(self) -> bool:
        return not self.on_one_host and self.security != "trusted_network"

    @property
    def shared_memory(self) -> bool:
        """Tensors lie in shared memory; what is rounded for a wire has to cross one."""
        return self.on_one_host and self.wire == "float32"

    @property
    def block_bytes(self) -> int:
        """A message is encrypted as a whole before any of it leaves: smaller ones overlap better. Without encryption
        the server's work for each, some 0.6 ms, speaks for large ones; in shared memory those fall out of the caches."""
        default = 1.0 if self.encrypted else 4.0 if self.on_one_host else 8.0
        return int((self.block_mb or default) * (1 << 20))

    @property
    def num_connections(self) -> int:
        """Of each worker to each server: encryption is one thread's work a connection."""
        return self.connections or (4 if self.encrypted else 1)

    @property
    def send_buffer_bytes(self) -> int:
        """Of a worker's socket; -1: as large as the system lets it grow.

        Many workers share a server's link in the proportion of what each has on the way. With small and equal buffers none gets far ahead,
        so each block is complete early, and weights go out while gradients still come in. All together they still fill a link of
        100 Gbit/s with a round trip of 100 us.
        """
        share = (1 << 20) // (self.workers * self.num_connections)
        return max(share, 1 << 16) if share <= 1 << 18 else -1

    @property
    def blocks_ahead(self) -> int | None:
        """How many blocks a worker sends to a server before the first of them has come back as weights; None: as many as it has.

        A block is complete with the last worker's gradient. A worker that begins late would send its last blocks alone, with all others'
        behind them: a server's link idle in one direction, and then everybody's weights for the other all at once.
        """
        return 4 * self.num_connections if self.mode == "sync" and self.workers > 1 else None

    @property
    def io_threads(self) -> int:
        """ZeroMQ's, of each process."""
        return max(1, min(self.num_connections, len(os.sched_getaffinity(0))))

    @property
    def heartbeat_ms(self) -> int:
        """ZeroMQ cuts a connection that was silent for so long."""
        return max(4, int(min(SILENCE_S, self.timeout_s) * 1000))

    @property
    def fewest_workers(self) -> int | None:
        """The job goes on while this many workers live; None: all of them are needed."""
        if self.mode in ("async", "bounded"):
            return self.min_workers or 1
        if self.backup_workers or self.min_workers:
            return min(self.workers - self.backup_workers, self.min_workers or self.workers)
        return None


def settings(
    options: dict[str, Any], workers: int, timeout_s: float = 60.0, hosts: int = 1
) -> Settings:
    """Options as the configuration holds them -> Settings.

    Raises:
        UserError: combinations that mean nothing, or that would not do what they seem to say.
    """
    made = Settings(workers=workers, timeout_s=timeout_s, hosts=hosts, **options)
    if made.mode not in MODES:
        raise unknown("exchange.mode", made.mode, MODES)
    if made.backup_workers and made.mode != "sync":
        raise UserError(
            f"exchange.backup_workers: {made.backup_workers} needs mode: sync (now: {made.mode})"
        )
    if made.backup_workers >= workers:
        raise UserError(
            f"exchange.backup_workers: {made.backup_workers} of {workers} workers (allowed: 0 to {workers - 1})"
        )
    if made.min_workers is not None and made.min_workers > workers - made.backup_workers:
        most = workers - made.backup_workers
        raise UserError(
            f"exchange.min_workers: {made.min_workers} is more than the {most} that an update takes"
        )
    if made.placement == "beside" and made.servers > workers:
        raise UserError(
            f"exchange.servers: {made.servers} beside {workers} workers (allowed: 1 to {workers})"
        )
    if made.link == "unix" and hosts > 1:
        raise UserError(f"exchange.link: unix does not reach {hosts} hosts (allowed: auto, tcp)")
    if made.restart_servers and not (made.snapshot_updates or made.snapshot_s):
        raise UserError(
            f"exchange.restart_servers: {made.restart_servers} needs snapshots (snapshot_updates or snapshot_s)"
        )
    if made.server_lr is not None and made.local:
        raise UserError(
            f"exchange.server_lr: has no meaning in mode: {made.mode} (the workers take the steps)"
        )
    if made.mode == "post_local" and not made.local_after:
        raise UserError(
            "exchange.local_after: post_local needs the step from which on steps are local"
        )
    return made
