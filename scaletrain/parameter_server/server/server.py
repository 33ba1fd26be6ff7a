"""One parameter server: it owns blocks, answers workers, and goes on when some die.

The program is ``scaletrain.programs.parameter_server``. Its parts: ``endpoint`` (which peers may
talk to it), ``blocks`` (gradients, updates, weights), ``sums``, ``snapshots``, and ``tally`` (what
it counts). All of them run on the one thread that calls ``Server.serve``, so nothing is locked.
"""

import logging
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from scaletrain.errors import UserError
from scaletrain.host import cores
from scaletrain.host.stopwatch import Stopwatch
from scaletrain.parameter_server.protocol import wire
from scaletrain.parameter_server.protocol.memory import Slab
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.wire import Dtype, Header, Message, MessageKind, Refused
from scaletrain.parameter_server.server import blocks
from scaletrain.parameter_server.server.blocks import Blocks
from scaletrain.parameter_server.server.endpoint import Endpoint, Peer
from scaletrain.parameter_server.server.shard import ModelDescription, Shard
from scaletrain.parameter_server.server.snapshots import Snapshots
from scaletrain.parameter_server.server.sums import Sums
from scaletrain.parameter_server.server.tally import Tally
from scaletrain.run.atomic import write_json
from scaletrain.run.layout import RunDir
from scaletrain.run.links import LinkWriter
from scaletrain.timeouts import Timeouts

log = logging.getLogger(__name__)

TICK_S = 0.25  # between two signs of life to every worker, which find closed connections
STATISTICS_S = 1.0  # between two writes of the statistics
_MAX_STEP = 1 << 48


class Server:
    """Server ``index`` of a job.

    Args:
        settings: of the job.
        run_dir: of the job.
        index: of the server, 0 to ``settings.servers - 1``.
    """

    def __init__(self, settings: Settings, run_dir: Path, index: int):
        self.settings = settings
        self.run_dir = RunDir(run_dir)
        self.index = index
        self._endpoint = Endpoint(settings, run_dir, index, self)
        self._snapshots = Snapshots(settings, self.run_dir.server_snapshot(index))
        self._tally = Tally()
        self._links = LinkWriter(self.run_dir.server_links(index))
        self._sums = Sums(settings.workers)
        # None until the first worker describes them, or a snapshot does.
        self._blocks: Blocks | None = None
        # Since when all workers are expected, on the monotonic clock: the first one joined, or a
        # snapshot was restored. None before. Written by _set_up and _restore, read by
        # _give_up_missing.
        self._expected_since: float | None = None
        # Why training cannot go on. Written by _abort once, read by all who answer workers.
        self._aborted: str | None = None
        self._has_lost_statistics = False  # and has said so; see _write_statistics
        # The only state that others write: signal handlers and, in tests, other threads (stop).
        # Read by serve.
        self._stop = False
        self._looks = Stopwatch()

    def serve(self, until_left: bool = False) -> None:
        """Serve until ``stop``, or with ``until_left`` until all workers have left.

        Raises:
            UserError: the job's keys can be read by others.
        """
        try:
            # Weights come before the socket: a worker that connects finds them restored.
            self._restore()
            self._endpoint.open()
            next_tick = next_statistics = 0.0
            while not self._stop:
                # 1. Handle messages until the next tick.
                self._endpoint.serve(next_tick - time.monotonic())
                now = time.monotonic()
                absent_s = self._looks.absence()
                if absent_s:
                    # The workers were stopped with it, most likely.
                    self._endpoint.forgive(absent_s)
                    if self._expected_since is not None:
                        self._expected_since += absent_s
                # 2. Hosts that are gone, signs of life, silent and missing workers, snapshots,
                #    connections.
                if now >= next_tick:
                    self._endpoint.end_unanswered()
                    self._tick(now)
                    self._links.sample()
                    next_tick = now + TICK_S
                # 3. Statistics.
                if now >= next_statistics:
                    self._write_statistics()
                    next_statistics = now + STATISTICS_S
                # 4. End with the last worker.
                if until_left and self._all_left():
                    break
            # Nothing is lost if this server was told to end.
            if self._may_come_back() and self._blocks is not None and self._blocks.ready:
                self._save_snapshot()
            self._write_statistics()
        finally:
            self._links.close()
            self._endpoint.close(keep_keys=self._may_come_back())

    def stop(self, *_: Any) -> None:
        """End ``serve``. Also a signal handler; may be called by any thread."""
        self._stop = True

    def _restore(self) -> None:
        """Go on from the last snapshot if the same launch starts this server again."""
        header = self._snapshots.find()
        if header is None:
            return
        self._blocks = self._make_blocks(header.description)
        self._snapshots.load(self._blocks.shard)
        self._blocks.restore(header.rule)
        self._tally.restore(header.tally)
        self._expected_since = time.monotonic()
        log.warning("server %d: restored at update %d", self.index, self._blocks.updates)

    def _make_blocks(self, description: ModelDescription) -> Blocks:
        """Return the blocks that a worker or a snapshot describes.

        Raises:
            ValueError: the description is malformed, or the model too large for this host.
            UserError: the schedule of the learning rate is not one of torch's.
        """
        shard = Shard(self.settings, self.index, description)
        return Blocks(
            self.settings, shard, self._endpoint, self._tally, self._abort, self._keep_first
        )

    def _keep_first(self) -> None:
        """Write the first snapshot, if a successor may need one."""
        if self.settings.restart_servers:
            self._save_snapshot()

    def _save_snapshot(self) -> None:
        """Write a snapshot of all that a successor goes on with."""
        owned = self._blocks
        assert owned is not None
        self._snapshots.save(owned.shard, owned.rule.state(), self._tally.counts())

    def _all_left(self) -> bool:
        """Return True if no worker lives and none can come back."""
        if self._blocks is None or self._blocks.rule.live:
            return False
        rule = self._blocks.rule
        return self._aborted is not None or len(rule.left | rule.lost) >= self.settings.workers

    def _may_come_back(self) -> bool:
        """Return True if a successor may serve the workers that there are."""
        return self.settings.restart_servers > 0 and not self._all_left()

    # Messages (called by the endpoint)

    def handle(self, peer: Peer, message: Message) -> None:
        """Handle a message of an admitted worker. Raises ``Refused``."""
        kind = message.header.kind
        if kind == MessageKind.PROBE:
            header = message.header
            answer = Header(MessageKind.PROBED, header.dtype, count=header.count)
            self._endpoint.answer(peer, answer, message.payloads[0])
            return
        if self._aborted:
            payload = wire.to_json({"message": self._aborted})
            self._endpoint.answer(peer, Header(MessageKind.ABORT), payload)
            return
        if kind == MessageKind.SETUP:
            self._set_up(peer, message)
            return
        if kind not in blocks.KINDS and kind not in (
            MessageKind.SUM,
            MessageKind.SCALE,
            MessageKind.PAUSE,
            MessageKind.LEAVE,
        ):
            raise Refused("not a message for a server")
        owned = self._blocks
        if owned is None or peer.rank not in owned.rule.live:
            raise Refused("not set up")
        match kind:
            case MessageKind.SUM:
                self._add_up(owned, peer, message)
            case MessageKind.SCALE:
                owned.scale(message)
                self._endpoint.answer(peer, Header(MessageKind.SCALED, step=message.header.step))
            case MessageKind.PAUSE:
                owned.perform(owned.rule.pause(peer.rank))
                self._endpoint.answer(peer, Header(MessageKind.PAUSED))
            case MessageKind.LEAVE:
                owned.perform(owned.rule.leave(peer.rank))
                self._endpoint.answer(peer, Header(MessageKind.LEFT))
                self._complete_sums(owned)
            case _:
                owned.handle(peer, message)

    def _set_up(self, peer: Peer, message: Message) -> None:
        """Let a worker join: compare its model with the others', share memory, say where to begin.

        Raises:
            Refused: the model is malformed, or not the one that the other workers have.
        """
        value = message.json()
        description = ModelDescription.from_json(value)
        if self._blocks is None:
            try:
                self._blocks = self._make_blocks(description)
            except (ValueError, UserError) as error:
                raise Refused(f"setup: {error}") from None
        elif description != self._blocks.shard.description:
            raise Refused(
                "setup: this worker's model or optimizer is not the one that the server has"
            )
        owned = self._blocks
        self._map_gradients(owned, peer.rank, value.get("gradients"))
        if self._expected_since is None:
            self._expected_since = time.monotonic()
        step = value.get("step")
        if type(step) is not int or not 0 <= step < _MAX_STEP:
            step = None
        if step is None:
            self._sums.came(peer.rank)
        answered = _answered_steps(value.get("answered"), owned.rule.version)
        begin = owned.rule.join(peer.rank, step, answered)
        owned.perform(owned.rule.settle())
        self._endpoint.answer(peer, Header(MessageKind.READY), self._ready(owned, peer.rank, begin))

    def _map_gradients(self, owned: Blocks, rank: int, handle: Any) -> None:
        """Map the memory that holds a worker's gradients, if both are on one host.

        Args:
            owned: the server's blocks.
            rank: of the worker.
            handle: ``Slab.handle`` of the worker's memory, from the wire; None without shared
                memory.
        """
        # A worker that was started again brings new memory, or none.
        owned.slabs.pop(rank, None)
        shard = owned.shard
        if handle is None or shard.slab is None:
            return
        try:
            slab = Slab.open(handle, shard.dense_elements, len(shard.blocks))
        except (ValueError, OSError) as error:
            log.warning("server %d: worker %d: no shared memory: %s", self.index, rank, error)
            return
        owned.slabs[rank] = slab

    def _ready(self, owned: Blocks, rank: int, begin: int) -> bytes:
        """Return the payload of READY: the facts with which a worker begins."""
        weights = None  # they travel
        if owned.shard.slab is not None and rank in owned.slabs:
            weights = owned.shard.slab.handle()
        return wire.to_json(
            {
                "initialised": owned.ready,
                "step": begin,
                "met": self._sums.met_step,
                "restored": self._snapshots.restored_at,
                "weights": weights,
                "versions": {str(key): version for key, version in owned.rule.version.items()},
            }
        )

    def _add_up(self, owned: Blocks, peer: Peer, message: Message) -> None:
        """Take a worker's vector for a sum over all of them.

        Raises:
            Refused: it is not float64, too long, or not as long as the others' vectors.
        """
        header = message.header
        if header.dtype != Dtype.FLOAT64 or header.flags or header.count > wire.MAX_SUM_VALUES:
            raise Refused("bad vector to sum")
        values = np.frombuffer(message.payloads[0], np.float64)
        try:
            total = self._sums.add(header.step, peer.rank, values)
        except ValueError as error:
            raise Refused(str(error)) from None
        if total is not None:
            self._endpoint.answer(peer, _total_header(header.step, total), total)
        self._complete_sums(owned)

    def _complete_sums(self, owned: Blocks) -> None:
        """Send the sums that no live worker is missing from (any more)."""
        rule = owned.rule
        ever_joined = rule.live | rule.lost | rule.left
        for total in self._sums.complete(rule.live, ever_joined):
            header = _total_header(total.number, total.values)
            for rank in rule.live.intersection(total.ranks):
                self._endpoint.tell(rank, header, total.values)

    # Faults

    def worker_came(self, rank: int) -> None:
        """Forget the former self of a worker that was started again."""
        self._lose(rank, "started again")
        self._tally.came(rank)

    def worker_closed(self, rank: int) -> None:
        """Give up a worker after its connection has closed."""
        self._lose(rank, "its connection is closed")

    def _lose(self, rank: int, reason: str) -> None:
        """Go on without a worker, if it lives."""
        owned = self._blocks
        if owned is None or rank not in owned.rule.live:
            return
        self._endpoint.forget(rank, reason)
        owned.slabs.pop(rank, None)
        self._tally.lose(rank, reason, owned.updates)
        owned.perform(owned.rule.lose(rank))
        if not self._aborted:  # workers that end after an abort are no news
            log.warning("server %d: worker rank %d was lost: %s", self.index, rank, reason)
        self._complete_sums(owned)

    def _abort(self, reason: str) -> None:
        """Tell all workers that training cannot go on."""
        owned = self._blocks
        assert owned is not None  # its rule decides on this
        self._aborted = reason
        log.error("server %d: %s", self.index, self._aborted)
        payload = wire.to_json({"message": self._aborted})
        for rank in list(owned.rule.live):
            self._endpoint.tell(rank, Header(MessageKind.ABORT), payload)

    def _tick(self, now: float) -> None:
        """Look after the workers, several times a second."""
        owned = self._blocks
        if owned is None:
            self._endpoint.ping(0)
            return
        self._endpoint.ping(len(owned.rule.live))
        if not self._aborted:
            self._give_up_silent(owned)
            self._give_up_missing(owned, now)
        if owned.ready and self._snapshots.due(owned.updates, owned.rule.lost):
            self._save_snapshot()

    def _give_up_silent(self, owned: Blocks) -> None:
        """Give up workers that others wait for and that have sent nothing for too long.

        A worker that takes so long hangs: evaluation and saving take less time.
        """
        limit_s = self.settings.timeout_s
        for rank in owned.rule.awaited() | self._sums.awaited(owned.rule.live):
            if self._endpoint.silent_s(rank) > limit_s:
                self._lose(rank, f"silent for {limit_s:g} s while others waited for it")

    def _give_up_missing(self, owned: Blocks, now: float) -> None:
        """Give up workers that did not come in time after the first one, or after a restart."""
        limit_s = Timeouts(self.settings.timeout_s).join_s
        if self._expected_since is None or now - self._expected_since <= limit_s:
            return
        rule = owned.rule
        missing = set(range(self.settings.workers)) - rule.live - rule.lost - rule.left
        for rank in sorted(missing):
            # The rule can lose only a worker that has joined.
            rule.join(rank)
            self._lose(rank, f"did not come within {limit_s:g} s")

    # Statistics

    def _write_statistics(self) -> None:
        """Write the counts to the run directory; a full disk, or no descriptors, end no server."""
        value: dict[str, Any] = {
            "server": self.index,
            "mode": self.settings.mode,
            "updates": 0,
            "parameters": 0,
            "owned_bytes": 0,
            "mapped_bytes": 0,
            "refused": dict(self._endpoint.refused),
            "turned_away": self._endpoint.turned_away,
            "restored_at_update": self._snapshots.restored_at,
            "snapshot_at_update": self._snapshots.saved_at,
            "aborted": self._aborted,
            "cores": cores.usable(),
        }
        owned = self._blocks
        if owned is not None:
            value["updates"] = owned.updates
            value["parameters"] = owned.shard.num_parameters
            value["owned_bytes"] = owned.shard.num_bytes
            value["mapped_bytes"] = sum(slab.num_bytes for slab in owned.slabs.values())
        path = self.run_dir.server_statistics(self.index)
        try:
            write_json(path, value | self._tally.as_json())
        except OSError as error:
            # Tried again in a second; the line need not be.
            if not self._has_lost_statistics:
                log.warning("server %d: statistics are not written: %s", self.index, error)
            self._has_lost_statistics = True


def _answered_steps(value: Any, keys: Collection[int]) -> dict[int, int]:
    """Return the steps that a worker names for blocks in SETUP; those that make sense."""
    steps: dict[int, int] = {}
    if not isinstance(value, dict):
        return steps
    for key in keys:
        step = value.get(str(key))
        if type(step) is int and 0 <= step < _MAX_STEP:
            steps[key] = step
    return steps


def _total_header(number: int, values: np.ndarray) -> Header:
    """Return the header of a sum's total."""
    return Header(MessageKind.TOTAL, Dtype.FLOAT64, step=number, count=len(values))
