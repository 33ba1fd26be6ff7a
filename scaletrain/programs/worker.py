"""What every launcher starts: one worker of a training job. It reads RUN_DIR/config.yaml and its rank variables, nothing else.

``python -m scaletrain.programs.worker RUN_DIR [--resume]`` (or ``scaletrain worker RUN_DIR`` under mpirun or srun by hand).
"""

import contextlib
import gc
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from scaletrain import programs

programs.begin(__name__)

import torch
import torch.distributed as dist

from scaletrain import config as configuration
from scaletrain.config import RunConfig
from scaletrain.engine import rendezvous
from scaletrain.errors import UserError
from scaletrain.run import progress, spans
from scaletrain.run.atomic import write_json
from scaletrain.run.environment import environment
from scaletrain.run.layout import RunDir
from scaletrain.run.records import StepRecord
from scaletrain.training import workload
from scaletrain.training.exchange import Setup
from scaletrain.training.trainer import Trainer
from scaletrain.world import World


def main(run_dir: Path, resume: bool = False) -> int:
    """Train; returns the exit status: 0, or 128 + the signal that stopped the run early (its checkpoint is written)."""
    world = World.from_env()
    with progress.reporting(run_dir, world) as report, contextlib.ExitStack() as stack:
        config = configuration.load(run_dir / "config.yaml")
        resume |= (
            os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        )  # torchrun has started all workers once more
        if not resume and world.rank == 0 and (run_dir / "summary.json").exists():
            raise UserError(
                f"{run_dir}: holds a run already (allowed: another directory, --resume to go on with it)"
            )
        timeout = timedelta(seconds=config.timeout_s)
        store = rendezvous.join(world, run_dir, timeout)
        world = rendezvous.place(world, store)
        stack.enter_context(spans.recorded(run_dir, world.rank, config.trace))
        device = choose_device(config, world)
        torch.set_num_threads(threads(config, world))
        setup = Setup(store, device, timeout, run_dir)
        parts = workload.build(config, device)
        exchange = config.load("exchange")(world, setup, **config.exchange.options)
        trainer = Trainer(config, world, parts, exchange, device, run_dir, resume)
        stop = StopTogether(store, config.log_every)
        if trainer.resumed and trainer.finished and RunDir(run_dir).has_finished():
            if world.rank == 0:
                print(
                    f"nothing to do: all {trainer.num_steps} steps are done (more: --resume with larger steps or epochs)"
                )
            exchange.close()
            return 0
        if world.rank == 0:
            (run_dir / "summary.json").unlink(
                missing_ok=True
            )  # of the part before: not true any more
            if resume and not trainer.resumed:
                print(f"no checkpoint in {run_dir}: training begins anew", flush=True)
        say = _Narrator(config, world, trainer) if world.rank == 0 else None
        clock = (
            {"clock_offset_s": spans.clock_offset_s(store, world.rank, world.size)}
            if config.trace
            else {}
        )
        header, path = _header(world, trainer) | clock, run_dir / f"rank-{world.rank}.json"
        write_json(path, header)

        def on_step(record: StepRecord) -> None:
            report(record.step + 1)
            if "chosen" not in header:  # `auto` has measured by the end of its first step
                header["chosen"] = exchange.chosen()
                write_json(path, header)
            if say:
                say(record)

        programs.done()
        summary = trainer.fit(on_step, stop)
        stop.over()
        if world.rank == 0:
            write_json(run_dir / "summary.json", summary | _emulation(run_dir, config))
            if say:
                say.close(summary)
        exchange.close()
    gc.freeze()  # the interpreter's end would search all of torch for garbage, for more than a second
    stopped = stop.signal and not summary["finished"]
    # A batch script that starts the job again looks into the summary; to its srun, a bad status would be a failure.
    return 128 + stop.signal if stopped and progress.SUPERVISED not in os.environ else 0


def choose_device(config: RunConfig, world: World) -> torch.device:
    """This worker's device: ``cuda:<local rank>`` (wrapping around when workers share GPUs) where CUDA is there, else the CPU."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "device: 'cuda' is not there (torch.cuda.is_available() is false); allowed here: cpu, auto"
        )
    # A launcher may have narrowed CUDA_VISIBLE_DEVICES to this worker's own GPU: then there is one, number 0.
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def threads(config: RunConfig, world: World) -> int:
    """Compute threads of this worker: what the configuration says, else its launcher, else its share of the host's cores."""
    if config.threads != "auto":
        return config.threads
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return max(1, len(os.sched_getaffinity(0)) // world.local_size)


class StopTogether:
    """SIGINT and SIGTERM stop all ranks before the same step.

    The rank that hears a signal at step s writes the step to stop at into the store; every rank looks there at each multiple of ``every``.
    The stop lies at the second multiple after s. In synchronous training ranks are less than two steps apart, so each
    of them looks before it gets there. A second signal ends the process at once.
    """

    def __init__(self, store: dist.Store, every: int):
        self._store, self._every = store, every
        self._stop_at: int | None = None
        self._announced = False
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: Any) -> None:
        self.signal = number
        for heard in (signal.SIGINT, signal.SIGTERM):
            signal.signal(heard, signal.SIG_DFL)

    def over(self) -> None:
        """Nothing is left to stop: a batch system's warning must not end the process in its last moments, as by default it would."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def __call__(self, step: int) -> bool:
        if self.signal and not self._announced:
            at = (step // self._every + 2) * self._every
            self._store.compare_set("scaletrain/stop_at", "", str(at))
            self._announced = True
        if (
            self._stop_at is None
            and step % self._every == 0
            and self._store.check(["scaletrain/stop_at"])
        ):
            self._stop_at = int(self._store.get("scaletrain/stop_at"))
        return self._stop_at is not None and step >= self._stop_at


class _Narrator:
    """Rank 0's lines for people. Silent about steps when a progress bar follows the records (SCALETRAIN_FOLLOWED)."""

    def __init__(self, config: RunConfig, world: World, trainer: Trainer):
        self._trainer, self._every, self._said = trainer, config.log_every, time.monotonic()
        self._samples, self._seconds = 0.0, 0.0
        self._followed = bool(os.environ.get("SCALETRAIN_FOLLOWED"))
        if trainer.resumed:
            print(f"resumed at step {trainer.next_step}", flush=True)
        threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} a worker"
        exchange = configuration.exchange_label(config.exchange)
        print(
            f"workers: {world.size} ({world.launcher}), exchange {exchange}, {trainer.device.type}, {threads}"
        )
        print(*trainer.describe(), sep="\n", flush=True)

    def __call__(self, record: StepRecord) -> None:
        self._samples += record.samples
        self._seconds += record.step_s
        done, total = record.step + 1, self._trainer.num_steps
        now = time.monotonic()
        if self._followed or done % self._every or (now - self._said < 1 and done < total):
            return
        rate = self._samples / self._seconds * self._trainer.exchange.live_workers()
        # This rank's own steps: each is its share of the batch, whether or not the others live.
        left = (
            (total - done)
            * self._seconds
            * self._trainer.global_batch
            / self._samples
            / self._trainer.world.size
        )
        print(
            f"step {done}/{total}  loss {record.loss:.4f}  {rate:,.0f} samples/s  {left:.0f} s left",
            flush=True,
        )
        self._said, self._samples, self._seconds = now, 0.0, 0.0

    def close(self, summary: dict[str, Any]) -> None:
        accuracy = summary["test_accuracy"]
        shown = "" if accuracy is None else f", test accuracy {accuracy:.4f}"
        end = "done" if summary["finished"] else "stopped early"
        print(
            f"{end}: {summary['steps']} steps, loss of the last global batch {summary['final_loss']:.6g}{shown},"
            f" {summary['samples_per_s']:,.0f} samples/s, {summary['wall_s']:.1f} s",
            flush=True,
        )


def _header(world: World, trainer: Trainer) -> dict[str, Any]:
    device = trainer.device
    return {
        **world._asdict(),
        "pid": os.getpid(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "num_steps": trainer.num_steps,
        "global_batch": trainer.global_batch,
        "threads": torch.get_num_threads(),
        "cores": sorted(os.sched_getaffinity(0)),
        "environment": environment() if world.local_rank == 0 else None,
    }


def _emulation(run_dir: Path, config: RunConfig) -> dict[str, Any]:
    """What of this run is emulated: the network (the launcher's emulation.json), the accelerators (``compute``)."""
    path = run_dir / "emulation.json"
    network = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    compute = config.compute.model_dump() if config.compute else None
    return {
        "emulated": bool(network or compute),
        "emulation": {"network": network, "compute": compute},
    }


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), "--resume" in sys.argv[2:]))
    except (
        UserError
    ) as mistake:  # made before the worker could report it: in the variables that say who it is
        print(f"scaletrain: error: {mistake}", file=sys.stderr)
        sys.exit(2)
