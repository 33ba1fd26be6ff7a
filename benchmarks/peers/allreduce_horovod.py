"""Horovod's allreduce of a torch tensor, in place, under mpirun: the peer `horovod` of `scaletrain
bench collectives`.
"""

import json
import sys
import time
from pathlib import Path

import horovod
import horovod.torch as hvd
import torch


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    task = json.loads(folder.joinpath("task.json").read_text(encoding="utf-8"))
    hvd.init()
    size = hvd.size()
    results = []
    for num_bytes in task["sizes"]:
        count = max(1, num_bytes // 4)
        tensor = torch.empty(count)

        def allreduce(tensor: torch.Tensor = tensor, name: str = f"tensor{num_bytes}") -> None:
            hvd.allreduce_(
                tensor, name=name, op=hvd.Sum
            )  # every operation has a name: unnamed ones are numbered per rank

        wrong = 0
        for _ in range(2):
            tensor.copy_((torch.arange(count) % 251 + hvd.rank()).float())
            allreduce()
            wrong += int(
                (tensor != size * (torch.arange(count) % 251) + size * (size - 1) // 2).sum()
            )
        tensor.zero_()
        began = time.perf_counter()
        allreduce()
        value = torch.tensor([time.perf_counter() - began])
        once = float(hvd.allreduce(value, name=f"once{num_bytes}", op=hvd.Max))
        times = []
        for _ in range(max(3, min(400, int(task["seconds"] / once)))):
            began = time.perf_counter()
            allreduce()
            times.append(time.perf_counter() - began)
        results.append(
            {
                "contender": f"horovod {horovod.__version__}",
                "size_bytes": num_bytes,
                "times_s": times,
                "wrong": wrong,
            }
        )
    folder.joinpath(f"{hvd.rank()}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
