"""TCP between any hosts, through gloo's point-to-point messages."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.engine.transport import Group, Receive, Transport


class Gloo:
    """Point-to-point over gloo. Receives are posted before sends, or two ranks that send large messages to each other serialise."""

    def __init__(self, group: Group):
        self.rank, self.size = group.rank, group.size
        self._timeout_s = group.timeout.total_seconds()
        self._pg = dist.ProcessGroupGloo(group.store, group.rank, group.size, group.timeout)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def swap(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> None:
        overwritten = any(
            _overlap(receive.into, tensor) for receive in receives if receive.reduce is None for _, tensor in sends
        )
        if overwritten:
            sends = [(peer, tensor.clone()) for peer, tensor in sends]
        landings = self._landings(receives)
        # A gloo Work that is dropped before it completes loses its message silently: all are kept until all are done.
        works = [
            (r.src, self._pg.recv([landing.view(torch.uint8)], r.src, 0))
            for r, landing in zip(receives, landings, strict=True)
        ]
        works += [(peer, self._pg.send([tensor.view(torch.uint8)], peer, 0)) for peer, tensor in sends]
        for peer, work in works:
            try:
                work.wait()
            except RuntimeError as error:
                if "Timed out" in str(error) or "timeout" in str(error).lower():
                    raise TimeoutError(f"rank {peer} did not answer within {self._timeout_s:g} s") from error
                raise ConnectionError(f"rank {peer} is gone") from error
        for receive, landing in zip(receives, landings, strict=True):
            if receive.reduce is not None:
                receive.reduce(receive.into, landing, out=receive.into)

    def _landings(self, receives: Sequence[Receive]) -> list[Tensor]:
        """Where bytes arrive: the target itself, or a piece of the scratch when they are to be reduced into it."""
        reduced = [receive for receive in receives if receive.reduce is not None]
        sizes = [-(-receive.into.nbytes // 64) * 64 for receive in reduced]  # every piece is aligned
        if sum(sizes) > self._scratch.numel():
            self._scratch = torch.empty(sum(sizes), dtype=torch.uint8)
        pieces = iter(self._scratch[: sum(sizes)].split(sizes) if sizes else ())
        return [
            receive.into if receive.reduce is None else next(pieces)[: receive.into.nbytes].view(receive.into.dtype)
            for receive in receives
        ]

    def close(self) -> None:
        self._scratch = torch.empty(0, dtype=torch.uint8)


def _overlap(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def transport(group: Group) -> Transport:
    return Gloo(group)
