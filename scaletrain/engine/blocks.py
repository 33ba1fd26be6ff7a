"""Blocks of shared memory through which the ranks of one host pass the data of a collective."""

import contextvars
import ctypes
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scaletrain.collectives import one_hop
from scaletrain.engine.segment import Segment
from scaletrain.engine.transport import UNEVEN, Call, Ends, Reduce, mismatch

_NUMPY_OPERATIONS: dict[Reduce | None, Any] = {
    None: None,
    torch.add: np.add,
    torch.mul: np.multiply,
    torch.minimum: np.minimum,
    torch.maximum: np.maximum,
}
# numpy reduces these as fast as torch does, with a third of the overhead of a call, and on one
# thread.
_NUMPY_DTYPES = {
    torch.float32: np.float32, torch.float64: np.float64,
    torch.int8: np.int8, torch.uint8: np.uint8,
    torch.int16: np.int16, torch.int32: np.int32, torch.int64: np.int64,
}  # fmt: skip
_NUM_SETS = 2  # of blocks: one is used while slow ranks still read the other
_MOST_PLANS = 128  # kept; training sends the same few sizes at every step

# The counters of each rank in the segment, from the first that the blocks have. The rank itself
# writes them; its peers read them.
_STAGE = 0  # phases of collectives that the rank has behind it, over all collectives
_PROMISED = 1  # and on, one for each peer: the bytes that the peer gets in an uneven collective
# The words beside _STAGE, for each set of blocks: the call for which the rank uses it
# (``Call.words``), and how long its longest chunk is in an uneven collective.
_CALL = (1, 3)
_LONGEST = (5, 6)


def num_counters(size: int) -> int:
    """Return how many counters of the segment the blocks of this many ranks need."""
    return _PROMISED + size


def num_bytes(size: int, block_bytes: int) -> int:
    """Return how much memory the blocks of this many ranks need."""
    return _NUM_SETS * size * block_bytes


class Blocks:
    """Two sets of blocks, one block a rank, which collectives use in turn.

    A rank writes its own block and reads the others. No rank writes to a set before all ranks have
    entered the next use of the other set, and so have left this one. Where each rank waits for all
    others anyway, that is known; else it waits for it (``_enter``). It spares a barrier at the end.

    Args:
        segment: the memory. Its first counters (``num_counters``) are the blocks'.
        data: of ``num_bytes`` bytes.
        block_bytes: size of a block, whole cache lines.
        at_once_bytes: of a tensor up to which each rank reduces all of it.
        name: returns the number by which an error message calls a rank.
    """

    def __init__(
        self,
        segment: Segment,
        data: np.ndarray,
        block_bytes: int,
        at_once_bytes: int,
        name: Callable[[int], int],
    ):
        self.rank = segment.rank
        self.size = segment.size
        self._segment = segment
        self._words = segment.words
        self._name = name
        self._block_bytes = block_bytes
        self._at_once_bytes = at_once_bytes
        self._blocks = data.reshape(_NUM_SETS, self.size, block_bytes)
        self._torch_blocks = torch.from_numpy(self._blocks)
        # Overflow is as silent as torch's. A context that keeps this setting is entered in 0.1 us,
        # numpy's errstate in 2.4.
        self._quietly = contextvars.Context()
        self._quietly.run(np.seterr, all="ignore")
        # The places of _STAGE of all ranks, and of this rank.
        self._places = [segment.place(rank, _STAGE) for rank in range(self.size)]
        self._my_place = self._places[self.rank]
        # The others, from the rank after this one on: ranks do not all turn to the same one first.
        others = [(self.rank + distance) % self.size for distance in range(1, self.size)]
        self._others = [(rank, self._places[rank]) for rank in others]
        # All of the following belong to this rank alone.
        self._call = (0, 0)  # this rank's present call, as ``Call.words``
        self._used_for = (0, 0)  # the call of the last use
        self._stage = 0  # the value of this rank's counter _STAGE
        self._entered = 0  # the value with which it entered the present use, or the last
        self._all_entered = 0  # a value that all ranks' counters are known to have reached
        self._num_uses = 0  # how often a set of blocks was used; all ranks count alike
        self._views: dict[Any, list[Any]] = {}  # the blocks of each set and rank, by dtype
        self._hops: dict[tuple[str, int], _Hop] = {}  # by collective and root

    def announce(self, words: tuple[int, int]) -> None:
        """Take this rank's next call, as ``Call.words``."""
        self._call = words

    def close(self) -> None:
        """Let go of the memory."""
        self._views.clear()
        del self._blocks, self._torch_blocks, self._words

    # The allreduce

    def allreduce(self, tensor: Tensor, reduce: Reduce) -> None:
        """Reduce a tensor over all ranks, in place. Collective.

        Each rank owns a slice of every block, reduces it, and offers the result (the schedule
        ``direct``). Of a small tensor, every rank reads and reduces everything, in the same order,
        after one wait instead of two.

        Blocks are small enough to stay in the caches. More ranks do not have more cache, so the
        size of a block does not depend on their number.

        Args:
            tensor: one-dimensional, contiguous, on the CPU; the same dtype and number of elements
                on every rank.
            reduce: associative and commutative.

        Raises:
            TimeoutError: a rank is late; names it.
            ConnectionError: a rank is gone; names it.
            RuntimeError: a rank makes another call; names both calls.
        """
        flat, views, operation, copy = self._ready(tensor, reduce)
        if tensor.nbytes <= self._at_once_bytes:
            self._quietly.run(self._reduce_at_once, flat, operation, views, copy)
            return
        # Equal blocks: a short last one would cost as much waiting as a full one.
        count = len(flat)
        num_blocks = -(-tensor.nbytes // self._block_bytes)
        for index in range(num_blocks):
            block = flat[index * count // num_blocks : (index + 1) * count // num_blocks]
            self._quietly.run(self._reduce_by_slices, block, operation, views, copy)

    def _ready(
        self, tensor: Tensor, reduce: Reduce | None
    ) -> tuple[Any, list[Any], Any, Callable[[Any, Any], None]]:
        """Return a tensor, the blocks, the operation and a copy of one library for its dtype."""
        dtype = _NUMPY_DTYPES.get(tensor.dtype)
        if dtype is not None and reduce in _NUMPY_OPERATIONS:
            return (
                array(tensor, dtype),
                self._blocks_of(dtype),
                _NUMPY_OPERATIONS[reduce],
                np.copyto,
            )
        return tensor, self._blocks_of(tensor.dtype), reduce, _copy_tensor

    def _reduce_at_once(self, flat: Any, operation: Any, views: list[Any], copy: Any) -> None:
        """Reduce a small block: every rank reduces all of it.

        1. Copy this rank's values into its block, and say so.
        2. Wait until every rank has.
        3. Reduce the blocks of all ranks, in the order of the ranks.
        """
        count = len(flat)
        blocks = self._enter(views)
        copy(blocks[self.rank][:count], flat)
        self._say_entered()
        for rank, place in self._others:
            self._wait_for_entry(rank, place)
        self._all_entered = self._entered
        operation(blocks[0][:count], blocks[1][:count], out=flat)
        for rank in range(2, self.size):
            operation(flat, blocks[rank][:count], out=flat)

    def _reduce_by_slices(self, flat: Any, operation: Any, views: list[Any], copy: Any) -> None:
        """Reduce a block: every rank reduces its slice.

        1. Copy the slices that others reduce into this rank's block, and say so.
        2. Take this rank's slice from each other rank as soon as that rank has done step 1.
        3. Offer the sum, and say so.
        4. Take the sum of each other slice as soon as its rank has done step 3.
        """
        count = len(flat)
        size = self.size
        me = self.rank
        segment = self._segment
        blocks = self._enter(views)
        edges = [rank * count // size for rank in range(size + 1)]
        low, high = edges[me], edges[me + 1]
        my_block = blocks[me]
        # Others reduce everything except this rank's own slice, which stays where it is.
        if low:
            copy(my_block[:low], flat[:low])
        if high < count:
            copy(my_block[high:count], flat[high:])
        self._say_entered()
        my_slice = flat[low:high]
        for rank, place in self._others:
            self._wait_for_entry(rank, place)
            added = blocks[rank][low:high]
            operation(my_slice, added, out=my_slice)
        self._all_entered = self._entered
        # The sum takes the place of the slice that was added last: this core has just fetched it,
        # and nobody else needs it. It lies in the block of the rank before this one.
        copy(added, my_slice)
        self._stage += 1
        segment.write(_STAGE, self._stage)
        for rank, _ in self._others:
            segment.wait(rank, _STAGE, self._stage)
            low, high = edges[rank], edges[rank + 1]
            copy(flat[low:high], blocks[rank - 1][low:high])

    # The other collectives

    def exchange(self, call: Call, ends: Ends) -> None:
        """Run a collective of one hop. See ``OneHop.exchange``.

        Chunks pass through the blocks in pieces, the same number on all ranks. In each use of a
        set, a rank:

        1. copies a piece of each chunk that it sends into its block, and says so;
        2. copies a piece of each chunk of its own that it keeps;
        3. takes a piece of each chunk that it receives, as soon as the sender has done step 1.
        """
        hop = self._hops.get((call.collective, call.root))
        if hop is None:
            schedule = one_hop.proved(call.collective, self.size, call.root)
            hop = _Hop.of(schedule, self.rank)
            self._hops[call.collective, call.root] = hop
        if ends.sources or ends.targets:
            chunks = self._ready_ends(call, ends)
            self._quietly.run(self._pass_on, hop, call, chunks)
        else:
            self._meet()

    def _meet(self) -> None:
        """Wait until every rank has come."""
        self._enter(self._blocks_of(np.uint8))
        self._say_entered()
        for rank, place in self._others:
            self._wait_for_entry(rank, place)
        self._all_entered = self._entered

    def _ready_ends(self, call: Call, ends: Ends) -> "_Chunks":
        """Return the chunks as arrays of one library, with its functions for them."""
        views = self._blocks_of(np.uint8)
        operation = None
        copy: Any = np.copyto
        ready: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
        for tensors, chunks in zip(ends, ready, strict=True):
            for chunk, tensor in tensors.items():
                if call.reduce is None:
                    # What is not reduced are bytes, whatever their dtype.
                    chunks[chunk] = array(tensor, np.uint8)
                else:
                    chunks[chunk], views, operation, copy = self._ready(tensor, call.reduce)
        sources, targets = ready
        kept = []
        for chunk, into in targets.items():
            # A sum begins with the own chunk, if there is something to add to it.
            if chunk in sources and (call.reduce is None or self.size == 1):
                # FSDP gathers in place: its own chunk is there already.
                if ends.sources[chunk].data_ptr() != ends.targets[chunk].data_ptr():
                    kept.append((into, sources[chunk]))
        return _Chunks(sources, targets, kept, views, operation, copy)

    def _pass_on(self, hop: "_Hop", call: Call, chunks: "_Chunks") -> None:
        """Run the uses of an exchange."""
        piece = len(chunks.views[0][0]) // hop.most_posts
        longest = chunks.longest()
        is_uneven = call.num_elements == UNEVEN
        num_uses = max(1, -(-longest // piece))
        if not is_uneven:
            # Equal pieces: a short last one would cost as much waiting as a full one.
            piece = -(-longest // num_uses)
        index = 0
        while index < num_uses:
            low, high = index * piece, (index + 1) * piece
            blocks = self._enter(chunks.views)
            my_block = blocks[self.rank]
            for slot, chunk in enumerate(hop.posts):
                sent = chunks.sources[chunk][low:high]
                chunks.copy(my_block[slot * piece : slot * piece + len(sent)], sent)
            if is_uneven:
                self._promise(hop, chunks, longest)
            self._say_entered()
            for into, source in chunks.kept:
                chunks.copy(into[low:high], source[low:high])
            added_to = chunks.sources
            for take in hop.takes:
                self._wait_for_entry(take.src, self._places[take.src])
                into = chunks.targets[take.chunk][low:high]
                if is_uneven:
                    num_uses = max(num_uses, self._promised_uses(take, piece, chunks))
                taken = blocks[take.src][take.slot * piece : take.slot * piece + len(into)]
                if take.add:
                    chunks.operation(added_to[take.chunk][low:high], taken, out=into)
                    added_to = chunks.targets
                else:
                    chunks.copy(into, taken)
            if len(hop.takes) == self.size - 1:
                self._all_entered = self._entered
            index += 1

    def _promise(self, hop: "_Hop", chunks: "_Chunks", longest: int) -> None:
        """Write how many bytes each peer gets, and how long the longest chunk is."""
        number = (self._num_uses - 1) & 1
        for peer, chunk in hop.receivers:
            place = self._segment.place(self.rank, _PROMISED + peer)
            self._words[place + number] = len(chunks.sources[chunk])
        self._words[self._my_place + _LONGEST[number]] = longest

    def _promised_uses(self, take: "_Take", piece: int, chunks: "_Chunks") -> int:
        """Return how many uses a peer's longest chunk takes.

        Raises:
            RuntimeError: the peer sends another number of bytes than this rank expects.
        """
        number = (self._num_uses - 1) & 1
        promised = self._words[self._segment.place(take.src, _PROMISED + self.rank) + number]
        expected = len(chunks.targets[take.chunk])
        if promised != expected:
            collective = Call.of_words(*self._call).name()
            raise RuntimeError(
                f"the ranks' calls do not match: in {collective}, rank {self._name(self.rank)}"
                f" expects {expected:,} bytes from rank {self._name(take.src)}, which sends"
                f" {promised:,}"
            )
        return -(-self._words[self._places[take.src] + _LONGEST[number]] // piece)

    # The uses of sets

    def _enter(self, views: list[Any]) -> Any:
        """Begin to use the next set, and return its blocks: this rank's may be written to now."""
        number = self._num_uses & 1
        if self._all_entered < self._entered:
            for rank, place in self._others:
                self._segment.wait(rank, _STAGE, self._entered)
                self._check_same(self._used_for, rank, place + _CALL[1 - number])
            self._all_entered = self._entered
        self._used_for = self._call
        self._num_uses += 1
        place = self._my_place + _CALL[number]
        self._words[place], self._words[place + 1] = self._call
        return views[number]

    def _say_entered(self) -> None:
        """Say that this rank's block holds its data, and that it has left the last set."""
        self._stage += 1
        self._entered = self._stage
        self._segment.write(_STAGE, self._stage)

    def _wait_for_entry(self, rank: int, place: int) -> None:
        """Wait until a rank's block holds its data.

        Args:
            rank: the rank.
            place: of its counter _STAGE.

        Raises:
            RuntimeError: it makes another call than this rank.
        """
        if self._words[place] < self._entered:
            self._segment.wait(rank, _STAGE, self._entered)
        self._check_same(self._call, rank, place + _CALL[(self._num_uses - 1) & 1])

    def _check_same(self, call: tuple[int, int], rank: int, place: int) -> None:
        """Raise RuntimeError unless a rank used a set for the same call as this rank.

        Args:
            call: of this rank, as ``Call.words``.
            rank: the rank.
            place: of the words with its call.
        """
        wanted = self._words[place], self._words[place + 1]
        if wanted != call:
            mine, other = Call.of_words(*call), Call.of_words(*wanted)
            raise mismatch(mine, other, self._name(self.rank), self._name(rank))

    def _blocks_of(self, dtype: Any) -> list[Any]:
        """Return the blocks, by set and rank, as numpy's arrays or torch's tensors of a dtype."""
        views = self._views.get(dtype)
        if views is None:
            blocks: Any = self._torch_blocks if isinstance(dtype, torch.dtype) else self._blocks
            views = []
            for number in range(_NUM_SETS):
                views.append([blocks[number][rank].view(dtype) for rank in range(self.size)])
            self._views[dtype] = views
        return views


class _Take(NamedTuple):
    """A chunk that this rank receives."""

    src: int
    slot: int  # its place in the sender's block, in pieces
    chunk: int
    add: bool


class _Hop(NamedTuple):
    """A schedule of one round, compiled for one rank."""

    posts: tuple[int, ...]  # the chunks that this rank sends, in the order of the slots
    receivers: tuple[tuple[int, int], ...]  # (peer, chunk) of all that it sends
    takes: tuple[_Take, ...]  # what it receives, in the order in which it is reduced
    most_posts: int  # the most chunks that any rank sends: each has an equal part of the block

    @classmethod
    def of(cls, schedule: one_hop.Schedule, rank: int) -> "_Hop":
        """Return one rank's part of a schedule."""
        posts: list[list[int]] = [[] for _ in range(schedule.size)]
        receivers = []
        takes = []
        for src, dst, chunk, add in itertools.chain(*schedule.rounds):
            # What goes to several ranks lies in the block once.
            if chunk not in posts[src]:
                posts[src].append(chunk)
            if src == rank:
                receivers.append((dst, chunk))
            if dst == rank:
                takes.append(_Take(src, posts[src].index(chunk), chunk, add))
        most_posts = max(1, *[len(chunks) for chunks in posts])
        return cls(tuple(posts[rank]), tuple(receivers), tuple(takes), most_posts)


class _Chunks(NamedTuple):
    """The chunks of an exchange as arrays of one library, and its functions for them."""

    sources: Mapping[int, Any]
    targets: Mapping[int, Any]
    kept: list[tuple[Any, Any]]  # (target, source) of the chunks that this rank copies to itself
    views: list[Any]
    operation: Any
    copy: Any

    def longest(self) -> int:
        """Return the length of the longest chunk."""
        return max(len(chunk) for chunk in (*self.sources.values(), *self.targets.values()))


def array(tensor: Tensor, dtype: Any) -> np.ndarray:
    """Return the elements of a contiguous tensor, for as long as the caller holds the tensor.

    ``Tensor.numpy`` would keep the tensor's storage from being resized ever after.
    """
    if not tensor.numel():
        return np.empty(0, dtype)
    memory: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return np.frombuffer(memory, dtype)


def _copy_tensor(into: Tensor, source: Tensor) -> None:
    into.copy_(source)
