"""One parameter server: owns blocks, answers workers, and goes on when some of them die or send rubbish.

``python -m scaletrain.programs.parameter_server RUN_DIR INDEX SETTINGS [--until-left]``, SETTINGS as JSON. One thread. Its parts: ``endpoint``
(who may talk to it), ``blocks`` (gradients, updates, weights), ``snapshots``, ``tally`` (what is counted).
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol import consistency, wire
from scaletrain.parameter_server.protocol.memory import SUPPORTED, Slab
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.wire import Dtype, Header, Kind, Message, Refused
from scaletrain.parameter_server.server import blocks
from scaletrain.parameter_server.server.blocks import Blocks
from scaletrain.parameter_server.server.endpoint import Endpoint, Peer
from scaletrain.parameter_server.server.snapshots import Snapshots
from scaletrain.parameter_server.server.sums import Sums
from scaletrain.parameter_server.server.tally import Tally
from scaletrain.run.atomic import write_json

log = logging.getLogger(__name__)

TICK_S = 0.25  # sign of life to every worker; a closed connection is noticed by it
STATISTICS_S = 1.0


class Server:
    """Server ``index`` of a job. ``serve`` runs until SIGTERM, or with ``until_left`` until all workers have left."""

    def __init__(self, settings: Settings, run_dir: Path, index: int):
        self.settings, self.run_dir, self.index = settings, run_dir, index
        self._endpoint = Endpoint(settings, run_dir, index, self._handle, self._came, self._closed)
        self._snapshots = Snapshots(settings, run_dir / f"server-{index}.safetensors")
        self._tally = Tally()
        self._sums = Sums(settings.workers)
        self._blocks: Blocks | None = None  # until the first worker says what they are
        self._first_join = 0.0
        self._aborted: str | None = None
        self._stop = False

    def serve(self, until_left: bool = False) -> None:
        try:
            self._restore()
            self._endpoint.open()
            tick = written = 0.0
            while not self._stop:
                self._endpoint.serve(tick - time.monotonic())
                now = time.monotonic()
                if now >= tick:
                    self._tick(now)
                    tick = now + TICK_S
                if now >= written + STATISTICS_S:
                    self._write_statistics()
                    written = now
                if until_left and self._blocks and not self._blocks.rule.live:
                    rule = self._blocks.rule
                    self._stop |= len(rule.left | rule.lost) >= self.settings.workers or bool(
                        self._aborted
                    )
            self._write_statistics()
        finally:
            self._endpoint.close()

    def stop(self, *_: Any) -> None:
        """End ``serve`` (also a signal handler)."""
        self._stop = True

    def _restore(self) -> None:
        """Go on from the last snapshot when the same launch starts this server again."""
        header = self._snapshots.found()
        if header is None:
            return
        self._blocks = Blocks(
            self.settings, self.index, header["setup"], self._endpoint, self._tally, self._abort
        )
        self._blocks.restore(self._snapshots.load(self._blocks.shard))
        log.warning("server %d: restored at update %d", self.index, self._blocks.updates)

    # Messages

    def _handle(self, peer: Peer, message: Message) -> None:
        """What an admitted worker says. Raises ``Refused``."""
        kind, owned = message.header.kind, self._blocks
        if self._aborted:
            self._endpoint.answer(
                peer, Header(Kind.ABORT), wire.to_json({"message": self._aborted})
            )
        elif kind == Kind.SETUP:
            self._set_up(peer, message)
        elif kind not in blocks.KINDS | {Kind.SUM, Kind.PAUSE, Kind.LEAVE}:
            raise Refused("not a message for a server")
        elif owned is None or peer.rank not in owned.rule.live:
            raise Refused("not set up")
        elif kind == Kind.SUM:
            self._sum(peer, message)
        elif kind == Kind.PAUSE:
            owned.perform(owned.rule.pause(peer.rank))
            self._endpoint.answer(peer, Header(Kind.PAUSED))
        elif kind == Kind.LEAVE:
            owned.perform(owned.rule.leave(peer.rank))
            self._endpoint.answer(peer, Header(Kind.LEFT))
            self._sum_up()
        else:
            owned.handle(peer, message)

    def _set_up(self, peer: Peer, message: Message) -> None:
        value = message.json()
        setup = {name: value.get(name) for name in ("blocks", "optimizer")}
        if self._blocks is None:
            try:
                self._blocks = Blocks(
                    self.settings, self.index, setup, self._endpoint, self._tally, self._abort
                )
            except (ValueError, UserError) as error:
                raise Refused(f"setup: {error}") from None
        elif setup != self._blocks.setup:
            raise Refused(
                "setup: this worker's model or optimizer is not the one that the server has"
            )
        owned, shard = self._blocks, self._blocks.shard
        owned.slabs.pop(peer.rank, None)
        if value.get("gradients") is not None and shard.slab is not None and SUPPORTED:
            try:
                owned.slabs[peer.rank] = Slab.open(
                    value["gradients"], shard.dense_elements, len(shard.blocks)
                )
            except (ValueError, OSError) as error:
                log.warning(
                    "server %d: worker %d: no shared memory: %s", self.index, peer.rank, error
                )
        step = value.get("step")
        self._first_join = self._first_join or time.monotonic()
        begin = owned.rule.join(
            peer.rank, step if type(step) is int and 0 <= step < 1 << 48 else None
        )
        answer = {
            "initialised": owned.ready, "step": begin, "sum": self._sums.next(), "restored": self._snapshots.restored_at,
            "weights": shard.slab.handle() if shard.slab and peer.rank in owned.slabs else None,
            "versions": {str(key): version for key, version in owned.rule.version.items()},
        }  # fmt: skip
        self._endpoint.answer(peer, Header(Kind.READY), wire.to_json(answer))

    def _sum(self, peer: Peer, message: Message) -> None:
        header = message.header
        if header.dtype != Dtype.FLOAT64 or header.flags or header.count > wire.MAX_SUM_VALUES:
            raise Refused("bad vector to sum")
        try:
            done = self._sums.add(
                header.step, peer.rank, np.frombuffer(message.payloads[0], np.float64)
            )
        except ValueError as error:
            raise Refused(str(error)) from None
        if done is not None:
            self._endpoint.answer(
                peer, Header(Kind.TOTAL, Dtype.FLOAT64, step=header.step, count=len(done)), done
            )
        self._sum_up()

    def _sum_up(self) -> None:
        if self._blocks is None:
            return
        rule = self._blocks.rule
        for number, total, ranks in self._sums.complete(
            rule.live, rule.live | rule.lost | rule.left
        ):
            for rank in rule.live.intersection(ranks):
                self._endpoint.tell(
                    rank, Header(Kind.TOTAL, Dtype.FLOAT64, step=number, count=len(total)), total
                )

    # Faults

    def _came(self, rank: int) -> None:
        self._lose(rank, "started again")
        self._tally.came(rank)

    def _closed(self, rank: int) -> None:
        self._lose(rank, "its connection is closed")

    def _lose(self, rank: int, reason: str) -> None:
        owned = self._blocks
        if owned is None or rank not in owned.rule.live:
            return
        self._endpoint.forget(rank, reason)
        owned.slabs.pop(rank, None)
        self._tally.lose(rank, reason, owned.updates)
        owned.perform(owned.rule.lose(rank))
        if not self._aborted:  # that says it all, and those who end after it are no news
            log.warning("server %d: worker rank %d was lost: %s", self.index, rank, reason)
        self._sum_up()

    def _abort(self, action: consistency.Abort) -> None:
        self._aborted = (
            f"worker rank {action.rank} was lost ({self._tally.lost[-1]['reason']}); {action.alive} of {self.settings.workers}"
            f" workers are left and an update takes {action.needed} (exchange.min_workers lets the job go on with fewer)"
        )
        log.error("server %d: %s", self.index, self._aborted)
        assert self._blocks
        for rank in list(self._blocks.rule.live):
            self._endpoint.tell(rank, Header(Kind.ABORT), wire.to_json({"message": self._aborted}))

    def _tick(self, now: float) -> None:
        """Several times a second: signs of life, silent and missing workers, snapshots."""
        owned, limit = self._blocks, self.settings.timeout_s
        self._endpoint.ping(len(owned.rule.live) if owned else 0)
        if owned is None:
            return
        rule = owned.rule
        if not self._aborted:
            for rank in rule.awaited() | self._sums.awaited(rule.live):
                # Whoever is awaited without having been heard for so long hangs; evaluation and saving take less.
                if self._endpoint.silent_s(rank) > limit:
                    self._lose(rank, f"silent for {limit:g} s while others waited for it")
            if now - self._first_join > limit:
                for rank in sorted(
                    set(range(self.settings.workers)) - rule.live - rule.lost - rule.left
                ):
                    rule.join(rank)
                    self._lose(rank, f"did not come within {limit:g} s")
        if owned.ready and self._snapshots.due(owned.updates):
            self.snapshot()

    # Snapshots and statistics

    def snapshot(self) -> None:
        """Write RUN_DIR/server-<index>.safetensors."""
        assert self._blocks
        self._snapshots.save(self._blocks.shard, self._blocks.setup, self._blocks.rule.version)

    def _write_statistics(self) -> None:
        value = {
            "server": self.index,
            "mode": self.settings.mode,
            "updates": self._blocks.updates if self._blocks else 0,
            "parameters": self._blocks.shard.num_parameters if self._blocks else 0,
            "owned_bytes": self._blocks.shard.num_bytes if self._blocks else 0,
            "mapped_bytes": sum(slab.num_bytes for slab in self._blocks.slabs.values())
            if self._blocks
            else 0,
            "refused": dict(self._endpoint.refused),
            "restored_at_update": self._snapshots.restored_at,
            "snapshot_at_update": self._snapshots.saved_at,
            "aborted": self._aborted,
            "cores": sorted(os.sched_getaffinity(0)),
        }
        write_json(self.run_dir / f"server-{self.index}.json", value | self._tally.as_json())
