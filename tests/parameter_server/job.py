"""A small job for the tests: servers and workers, and the same training in one process.

Servers and workers run as threads or processes.

``python -m tests.parameter_server.job RUN_DIR RANK SETTINGS STEPS DELAY_S`` is a worker; it prints
a line a step.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from scaletrain import programs

programs.begin(__name__)

import torch
import torch.distributed as dist
from torch import nn

from scaletrain.parameter_server.protocol import placement
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.server.server import Server
from scaletrain.parameter_server.worker.exchange import ParameterServerExchange
from scaletrain.world import World
from tests.ranks import Program

ROOT = Path(__file__).parents[2]
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}


SEEDING = threading.Lock()  # torch's generator is the process's


def model() -> nn.Module:
    with SEEDING:
        torch.manual_seed(7)
        return nn.Sequential(
            nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 4)
        )


def loss(net: nn.Module, step: int, rank: int) -> torch.Tensor:
    """What only this rank and step could contribute."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(8, 12, generator=generator).to(next(net.parameters()).device) * (1 + rank)
    return (net(x) - x[:, :4].sin()).square().mean()


def single(
    steps: int, workers: int, make=lambda p: torch.optim.SGD(p, **SGD)
) -> list[torch.Tensor]:
    """The same training in one process."""
    net = model()
    optimizer = make(net.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        (sum(loss(net, step, rank) for rank in range(workers)) / workers).backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@contextlib.contextmanager
def servers(settings: Settings, run_dir: Path) -> Iterator[list[Server]]:
    """The job's servers as threads, which saves starting them."""
    started = [Server(settings, run_dir, index) for index in range(settings.servers)]
    running = [threading.Thread(target=server.serve, daemon=True) for server in started]
    for thread in running:
        thread.start()
    try:
        yield started
    finally:
        for server in started:
            server.stop()
        for thread in running:
            thread.join(10)
            assert not thread.is_alive()


@contextlib.contextmanager
def server_processes(settings: Settings, run_dir: Path) -> Iterator[list[Program]]:
    """The job's servers, ended on leaving."""
    started = [start_server(settings, run_dir, index) for index in range(settings.servers)]
    try:
        yield started
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start_server(settings: Settings, run_dir: Path, index: int) -> Program:
    argv = placement.command(settings, run_dir, index)
    return Program(*argv[argv.index("-m") + 1 :])


def exchange(settings: Settings, run_dir: Path, rank: int) -> ParameterServerExchange:
    run_dir.mkdir(parents=True, exist_ok=True)  # a FileStore waits for ever in a missing one
    store = dist.FileStore(str(run_dir / "store"), settings.workers)
    world = World(rank, settings.workers, rank, settings.workers, launcher="local")
    if settings.placement == "auto":
        # By ``servers`` or ``server_processes``.
        settings = dataclasses.replace(settings, placement="dedicated")
    return ParameterServerExchange(settings, world, run_dir, store)


def work(
    settings: Settings,
    run_dir: Path,
    rank: int,
    steps: int,
    make=lambda p: torch.optim.SGD(p, **SGD),
    on_step: Callable[[int, ParameterServerExchange], None] = lambda step, joined: None,
    meet: Callable[[], object] = lambda: None,
    device: str = "cpu",
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Train as one worker; returns the weights and the last record."""
    net = model().to(device)
    optimizer = make(net.parameters())
    joined = exchange(settings, run_dir, rank)
    joined.attach(net, optimizer)
    meet()  # whoever comes later than the others' first step leaves out what they have done
    step = joined.skip(steps)
    while step < steps:
        optimizer.zero_grad()
        loss(net, step, rank).backward()
        joined.step()
        step += 1
        on_step(step, joined)
        step += joined.skip(steps - step)
    total = joined.sum(torch.tensor([1.0, 10.0**rank]))
    joined.close()
    return [p.detach().cpu() for p in net.parameters()], joined.record() | {
        "workers": float(total[0])
    }


def threads(jobs: list[Callable[[], object]], timeout_s: float = 60) -> list[object]:
    """Run workers as threads; raises the first error."""
    results: list[object] = [TimeoutError("no result")] * len(jobs)

    def run(index: int) -> None:
        try:
            results[index] = jobs[index]()
        except BaseException as error:
            results[index] = error

    running = [
        threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(jobs))
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(timeout_s)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def train(
    settings: Settings, run_dir: Path, steps: int, **options
) -> list[tuple[list[torch.Tensor], dict[str, float]]]:
    """Servers and workers of one job; returns what each worker has in the end."""
    with servers(settings, run_dir):
        return threads(
            [
                lambda r=rank: work(settings, run_dir, r, steps, **options)
                for rank in range(settings.workers)
            ]
        )  # type: ignore[return-value]


class Worker:
    """A worker as a process of its own."""

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        rank: int,
        steps: int,
        delay_s: float = 0.0,
        on_host: Callable[[list[str]], Sequence[str]] | None = None,
    ):
        arguments = [str(run_dir), str(rank), settings.to_json(), str(steps), str(delay_s)]
        self.process: Program | subprocess.Popen
        if on_host is None:
            self.process = Program("tests.parameter_server.job", *arguments, piped=True)
            self._output = self.process.output
        else:
            self.process = subprocess.Popen(
                on_host([sys.executable, "-m", "tests.parameter_server.job", *arguments]),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            self._output = self.process.stdout
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._output:
            self.lines.append(line.rstrip())

    @property
    def step(self) -> int:
        return max(
            (int(line.split()[1]) for line in self.lines if line.startswith("step ")), default=0
        )

    def wait_for(self, step: int, timeout_s: float = 40) -> None:
        deadline = time.monotonic() + timeout_s
        while self.step < step:
            assert self.process.poll() is None, f"the worker ended: {self.lines[-5:]}"
            assert time.monotonic() < deadline, f"still at step {self.step}: {self.lines[-5:]}"
            time.sleep(0.01)

    def end(self, timeout_s: float = 40) -> int:
        status = self.process.wait(timeout_s)
        self._thread.join(5)
        return status

    def result(self) -> dict:
        return json.loads(next(line for line in reversed(self.lines) if line.startswith("{")))


@contextlib.contextmanager
def workers(
    settings: Settings, run_dir: Path, steps: int, delays: dict[int, float] | None = None
) -> Iterator[list[Worker]]:
    started = [
        Worker(settings, run_dir, rank, steps, (delays or {}).get(rank, 0.0))
        for rank in range(settings.workers)
    ]
    with killed_at_the_end(started):
        yield started


@contextlib.contextmanager
def killed_at_the_end(started: list[Worker]) -> Iterator[None]:
    try:
        yield
    finally:
        for worker in started:
            worker.process.kill()
            worker.process.wait()


def statistics(run_dir: Path, index: int = 0) -> dict:
    return json.loads((run_dir / f"server-{index}.json").read_text())


def main() -> None:
    run_dir, rank, settings = Path(sys.argv[1]), int(sys.argv[2]), Settings.from_json(sys.argv[3])
    steps, delay_s = int(sys.argv[4]), float(sys.argv[5])

    live = settings.workers
    programs.done()

    def on_step(step: int, joined: ParameterServerExchange) -> None:
        nonlocal live
        live = joined.live_workers()
        print("step", step, time.monotonic(), flush=True)
        time.sleep(delay_s)

    weights, record = work(settings, run_dir, rank, steps, on_step=on_step)
    final = (
        torch.stack([loss(model_with(weights), 99999, r).detach() for r in range(settings.workers)])
        .mean()
        .item()
    )
    digest = float(sum(w.double().sum() for w in weights))
    print(json.dumps({"loss": final, "digest": digest, "live": live, **record}), flush=True)


def model_with(weights: list[torch.Tensor]) -> nn.Module:
    net = model()
    with torch.no_grad():
        for parameter, weight in zip(net.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return net


if __name__ == "__main__":
    main()
