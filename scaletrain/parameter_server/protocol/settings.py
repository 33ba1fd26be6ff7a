"""The options of the exchange ``parameter_server``, and the settings made of them.

``ParameterServerOptions`` is the only declaration of the options. ``scaletrain list`` and the
checks of a configuration read it from this file's source (``plugins.options``). The exchange makes
its ``Settings`` from the options. A server gets the same settings as JSON on its command line.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from scaletrain.errors import UserError, unknown
from scaletrain.host import cores

SILENCE_S = 10.0  # a host that answers nothing for this long is gone


@dataclass(frozen=True, kw_only=True)
class ParameterServerOptions:
    """The options that people set under ``exchange:``, in the order in which they are listed."""

    mode: Literal["sync", "async", "bounded", "local_sgd", "post_local"] = "sync"
    """When an update happens and who waits for it. The rules are in ``protocol/consistency.py``."""

    servers: Annotated[int, Ge(1)] = 1
    """How many servers share the model, balanced by bytes."""

    placement: Literal["auto", "dedicated", "beside"] = "auto"
    """Where servers run: as processes of their own (``dedicated``), or server k started by worker k
    (``beside``). ``auto`` is dedicated where the launcher can start them, else beside."""

    backup_workers: Annotated[int, Ge(0)] = 0
    """Spare workers in mode ``sync``: of n + b gradients the first n count, the rest is dropped."""

    staleness: Annotated[int, Ge(0)] = 3
    """How many steps a worker may be ahead of the slowest one in mode ``bounded``."""

    divide_lr: bool = True
    """Divide the learning rate by the number of workers in the modes ``async`` and ``bounded``.
    A step of all workers is then as many updates, which together move as far as one of ``sync``."""

    min_workers: Annotated[int, Ge(1)] | None = None
    """The job goes on while this many workers live. The default is all of them in the synchronous
    modes, and 1 in ``async`` and ``bounded``."""

    local_steps: Annotated[int, Ge(1)] = 16
    """Steps of a worker's own optimizer between two synchronisations, in the local modes."""

    local_after: Annotated[int, Ge(0)] = 0
    """Steps that are synchronised one by one before local steps begin, in mode ``post_local``."""

    outer: Literal["average", "nesterov"] = "average"
    """The server's optimizer in the local modes: averaging, or the Nesterov steps of DiLoCo
    (Douillard et al., 2023)."""

    outer_lr: Annotated[float, Gt(0)] = 0.7
    """Learning rate of ``outer: nesterov``."""

    outer_momentum: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Momentum of ``outer: nesterov``. It multiplies movement by about outer_lr / (1 - this)."""

    server_lr: dict | None = None
    """A schedule of torch.optim.lr_scheduler that counts a server's updates, such as
    ``{name: StepLR, step_size: 1000}``. Without one the workers send their rate."""

    wire: Literal["float32", "bf16", "fp16", "trunc16"] = "float32"
    """Element type of gradients and weights on the wire. The server's weights stay float32.
    ``trunc16`` cuts off the lower 16 bits of a float32, as TensorFlow did."""

    link: Literal["auto", "unix", "tcp"] = "auto"
    """Sockets between workers and servers. ``auto`` takes Unix sockets if there is one host."""

    security: Literal["auto", "aes", "curve", "trusted_network"] = "auto"
    """Protection of TCP links: ``aes`` (the same as ``auto``) and ``curve`` encrypt. ``aes`` is
    fast where the processor has instructions for it, ``curve`` is CurveZMQ's cipher. With
    ``trusted_network`` both ends prove that they hold the job's key, and the data is not
    encrypted."""

    connections: Annotated[int, Ge(0)] = 0
    """Connections of each worker to each server. 0: four with ``curve``, else one."""

    block_mb: Annotated[float, Ge(0)] = 0.0
    """Largest block of parameters, in MiB. 0: chosen by a short measurement of the links, and four
    in shared memory."""

    snapshot_updates: Annotated[int, Ge(1)] | None = None
    """Write a snapshot of each server every so many updates."""

    snapshot_s: Annotated[float, Gt(0)] | None = None
    """Write a snapshot of each server every so many seconds."""

    restart_servers: Annotated[int, Ge(0)] = 0
    """How often a dead server is started again, from its last snapshot."""


MODES = typing.get_args(ParameterServerOptions.__annotations__["mode"])


@dataclass(frozen=True)
class Settings(ParameterServerOptions):
    """The options with the facts of one job, and the settings that follow from both.

    All processes of a job have equal settings, so they agree without a message. Made by
    ``settings_from_options``, which checks them; tests make them directly.

    >>> Settings(workers=8, mode="async").fewest_workers
    1
    """

    workers: int
    """Number of workers of the job."""

    timeout_s: float = 60.0
    """A worker that others wait for is given up after this silence, in seconds."""

    hosts: int = 1
    """Number of hosts that servers and workers lie on."""

    def to_json(self) -> str:
        """Return the settings that differ from their defaults, as JSON for a command line."""
        changed = {}
        for field in _FIELDS:
            value = getattr(self, field.name)
            # ``workers`` has no default, and so is always there.
            if value != field.default:
                changed[field.name] = value
        return json.dumps(changed)

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """Return the settings that ``to_json`` wrote."""
        return cls(**json.loads(text))

    @property
    def local(self) -> bool:
        """Whether workers take local steps and push how far they went, instead of gradients."""
        return self.mode in ("local_sgd", "post_local")

    @property
    def is_asynchronous(self) -> bool:
        """Whether every gradient is an update of its own."""
        return self.mode in ("async", "bounded")

    @property
    def on_one_host(self) -> bool:
        """Whether Unix sockets reach all servers and workers."""
        return self.link == "unix" or (self.link == "auto" and self.hosts == 1)

    @property
    def cipher(self) -> str | None:
        """The protection of connections: ``aes``, ``curve``, or None if data is not encrypted."""
        if self.on_one_host or self.security == "trusted_network":
            return None
        return "aes" if self.security == "auto" else self.security

    @property
    def shared_memory(self) -> bool:
        """Whether tensors lie in shared memory. Values that are rounded have to cross a wire."""
        return self.on_one_host and self.wire == "float32"

    @property
    def block_bytes(self) -> int:
        """Largest size of a block of parameters, in bytes, unless it is measured.

        In shared memory large blocks fall out of the caches, and nothing travels.
        """
        return int((self.block_mb or 4.0) * (1 << 20))

    @property
    def measures_blocks(self) -> bool:
        """Whether the size of blocks follows from a measurement (``worker.calibration``)."""
        return self.block_mb == 0 and not self.shared_memory

    @property
    def num_connections(self) -> int:
        """Connections of each worker to each server.

        One thread of ZeroMQ encrypts the data of one connection, so CURVE gains from several.
        """
        default = 4 if self.cipher == "curve" else 1
        return self.connections or default

    @property
    def send_buffer_bytes(self) -> int:
        """Send buffer of a worker's socket; -1: as large as the system lets it grow.

        Many workers share a server's link in proportion to the data that each has on the way. With
        small and equal buffers none gets far ahead. Each block is complete early, and weights go
        out while gradients still come in. All buffers together still fill a link of 100 Gbit/s
        with a round trip of 100 us.
        """
        share = (1 << 20) // (self.workers * self.num_connections)
        if share > 1 << 18:
            return -1
        return max(share, 1 << 16)  # a packet has up to 64 KiB

    @property
    def blocks_ahead(self) -> int | None:
        """How many blocks a worker sends to a server before the first comes back; None: no limit.

        A block is complete with the last worker's gradient. A worker that begins late would send
        its last blocks alone, with those of all others complete before it. The server's link would
        be idle in one direction, and then carry everybody's weights in the other all at once.
        """
        if self.mode == "sync" and self.workers > 1:
            return 4 * self.num_connections
        return None

    @property
    def io_threads(self) -> int:
        """ZeroMQ's threads for input and output, in each process."""
        return max(1, min(self.num_connections, len(cores.usable())))

    @property
    def unanswered_s(self) -> float:
        """A connection is ended if the kernel at its other end answers nothing for so long."""
        return min(SILENCE_S, self.timeout_s)

    @property
    def fewest_workers(self) -> int | None:
        """The job goes on while this many workers live; None: all of them are needed."""
        # No update waits for anybody here, so a single worker can go on.
        if self.is_asynchronous:
            return self.min_workers or 1
        if self.backup_workers or self.min_workers:
            return min(self.workers - self.backup_workers, self.min_workers or self.workers)
        return None


# The facts of the job first, as on the command lines of servers.
_FIELDS = sorted(dataclasses.fields(Settings), key=lambda field: field.kw_only is True)


def settings_from_options(
    options: dict[str, Any], workers: int, timeout_s: float = 60.0, hosts: int = 1
) -> Settings:
    """Return the settings of a job that is configured with ``options``.

    The type and the range of each option were checked with the configuration. Checked here is
    whether they make sense together.

    Args:
        options: by the names of ``ParameterServerOptions``.
        workers: number of workers.
        timeout_s: silence after which a worker is given up, in seconds.
        hosts: number of hosts that servers and workers lie on.

    Raises:
        UserError: combinations that mean nothing, or that would mislead.
    """
    settings = Settings(workers, timeout_s, hosts, **options)
    _check_workers(settings)
    _check_servers(settings)
    _check_steps(settings)
    return settings


def _check_workers(settings: Settings) -> None:
    """Check how many workers an update takes. Raises ``UserError``."""
    workers, backup_workers = settings.workers, settings.backup_workers
    if settings.mode not in MODES:
        raise unknown("exchange.mode", settings.mode, MODES)
    if backup_workers and settings.mode != "sync":
        raise UserError(
            f"exchange.backup_workers: {backup_workers} needs mode: sync (now: {settings.mode})"
        )
    if backup_workers >= workers:
        raise UserError(
            f"exchange.backup_workers: {backup_workers} of {workers} workers"
            f" (allowed: 0 to {workers - 1})"
        )
    most = workers - backup_workers
    if settings.min_workers is not None and settings.min_workers > most:
        raise UserError(
            f"exchange.min_workers: {settings.min_workers} is more than the {most}"
            " that an update takes"
        )


def _check_servers(settings: Settings) -> None:
    """Check where servers run, how they are reached and restarted. Raises ``UserError``."""
    workers, hosts = settings.workers, settings.hosts
    if settings.placement == "beside" and settings.servers > workers:
        raise UserError(
            f"exchange.servers: {settings.servers} beside {workers} workers"
            f" (allowed: 1 to {workers})"
        )
    if settings.link == "unix" and hosts > 1:
        raise UserError(f"exchange.link: unix does not reach {hosts} hosts (allowed: auto, tcp)")
    has_snapshots = settings.snapshot_updates or settings.snapshot_s
    if settings.restart_servers and not has_snapshots:
        raise UserError(
            f"exchange.restart_servers: {settings.restart_servers} needs snapshots"
            " (snapshot_updates or snapshot_s)"
        )


def _check_steps(settings: Settings) -> None:
    """Check who takes the optimizer's steps. Raises ``UserError``."""
    if settings.server_lr is not None and settings.local:
        raise UserError(
            f"exchange.server_lr: has no meaning in mode: {settings.mode}"
            " (the workers take the steps)"
        )
    if settings.mode == "post_local" and not settings.local_after:
        raise UserError(
            "exchange.local_after: post_local needs the step from which on steps are local"
        )
