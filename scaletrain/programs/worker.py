"""One worker of a training job, as every launcher starts it.

``python -m scaletrain.programs.worker RUN_DIR [--resume]``, or ``scaletrain worker RUN_DIR`` under
mpirun or srun by hand. It reads RUN_DIR/config.yaml and its rank variables, nothing else.
"""

import contextlib
import gc
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from scaletrain import programs

programs.begin(__name__)  # before torch is imported

import torch
import torch.distributed as dist

from scaletrain import config as configuration
from scaletrain.config import RunConfig, presence
from scaletrain.engine import rendezvous
from scaletrain.errors import UserError
from scaletrain.host import cores
from scaletrain.run import progress, spans, watch
from scaletrain.run.atomic import write_json
from scaletrain.run.environment import environment
from scaletrain.run.layout import RunDir
from scaletrain.run.records import StepRecord, cut_lines
from scaletrain.run.time_left import TimeLeft
from scaletrain.timeouts import Timeouts
from scaletrain.training import weights, workload
from scaletrain.training.compiling import explained
from scaletrain.training.exchange import Setup
from scaletrain.training.fingerprint import fingerprint
from scaletrain.training.stopping import SaveTogether, StopTogether
from scaletrain.training.trainer import Trainer
from scaletrain.units import duration, plural
from scaletrain.world import World

_DATA = "scaletrain/data"  # in the job's store: the fingerprint of rank 0's data sets


def main(run_dir: Path, resume: bool = False) -> int:
    """Train, and return the exit status.

    It is 0, or 128 + the signal that stopped the run early; its checkpoint is written then.
    """
    world = World.from_env()
    files = RunDir(run_dir)
    with progress.reporting(run_dir, world) as report, contextlib.ExitStack() as stack:
        stack.enter_context(explained())  # failures of a compiler, whenever it runs
        # 1. Read the configuration, and meet the other ranks.
        config = configuration.load(files.config)
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            resume = True  # torchrun has started all workers once more
        # Rank 0 alone, and before the ranks meet: nothing has been written by then.
        if world.rank == 0:
            if not resume:
                _check_unused(files)
            presence.check(config, begins=not (resume and files.checkpoints()))
        timeouts = Timeouts(config.timeout_s)
        store = rendezvous.join(world, run_dir, timeouts.join)
        world = rendezvous.place(world, store)
        stack.enter_context(spans.recorded(run_dir, world.rank, config.trace))

        # 2. Build the model, its data and the trainer.
        setup = Setup(store, choose_device(config, world), timeouts, run_dir)
        trainer = _build(config, world, setup, resume)
        # Until here a signal ends the process in the usual way: nothing is worth a checkpoint yet.
        stop = StopTogether(store, config.log_every)
        # A batch job that is started once too often must not evaluate and write everything again.
        if trainer.resumed and trainer.finished and files.has_finished():
            if world.rank == 0:
                print(_nothing_to_do(trainer))
            trainer.exchange.close()
            return 0

        # 3. Say what begins.
        header = _HeaderFile(files.header(world.rank), world, trainer)
        # Collective, and over the store: each rank's clock is compared with that of rank 0.
        if config.trace:
            header.add("clock_offset_s", spans.clock_offset_s(store, world.rank, world.size))
        # Before the first step: the progress bar waits for it.
        header.write()
        narrator = _Narrator(config, world, trainer, header.facts)
        if world.rank == 0:
            files.summary.unlink(missing_ok=True)  # of the part before: not true any more
            if resume and not trainer.resumed:
                print(f"no checkpoint in {run_dir}: training begins anew", flush=True)
            narrator.begin()
            done = trainer.next_step if trainer.resumed else 0
            cut_lines(files.evaluations, lambda evaluation: evaluation["step"] <= done)

        # 4. Train.
        def on_step(record: StepRecord) -> None:
            report(record.step + 1)
            header.add_choice()
            narrator.step(record)

        programs.done()
        save = SaveTogether(store, config.log_every, files, world.rank)
        summary = trainer.fit(on_step, stop, narrator.evaluated, save)
        stop.over()

        # 5. Say what was reached.
        if trainer.leads:
            write_json(files.summary, summary | _emulation(files, config))
            narrator.end(summary)
        # Still inside `reporting`: an exchange that cannot close is a failure of this worker.
        trainer.exchange.close()
    # At its end the interpreter would search all of torch for garbage, for more than a second.
    gc.freeze()
    stopped_early = stop.signal and not summary["finished"]
    # A batch script that starts the job again reads the summary; a bad status would tell its srun
    # that the job failed.
    if stopped_early and progress.SUPERVISED not in os.environ:
        return 128 + stop.signal
    return 0


def _who_was_slow(files: RunDir) -> str:
    """Return one line about who held up the others, by the files of all ranks."""
    culprits = watch.culprits_of_run(files)
    if not culprits:
        return "no rank or link stands out as slow"
    return f"slow: {culprits[0].sentence()}"


def _nothing_to_do(trainer: Trainer) -> str:
    if trainer.stop_reason:
        return f"nothing to do: {trainer.stop_reason} (more: --resume with other callbacks)"
    return (
        f"nothing to do: all {trainer.num_steps} steps are done"
        " (more: --resume with larger steps or epochs)"
    )


def _check_unused(files: RunDir) -> None:
    """Raise ``UserError`` if the directory holds a finished run."""
    if files.summary.exists():
        raise UserError(
            f"{files.path}: holds a run already"
            " (allowed: another directory, --resume to go on with it)"
        )


def _build(config: RunConfig, world: World, setup: Setup, resume: bool) -> Trainer:
    """Build model, data and exchange, and the trainer that uses them (collective).

    Rank 0 prints the lines that a person should read about a run that goes on.
    """
    # Before the model is built: its initialisation already computes.
    torch.set_num_threads(threads(config, world))
    parts = workload.build(config, setup.device, world.group_number(config.groups))
    _check_same_data(parts, config, world, setup.store)
    exchange = config.load("exchange")(world, setup, **config.exchange.options)
    lines: list[str] = []
    goes_on = resume and RunDir(setup.run_dir).checkpoints()
    if config.init_from and not goes_on:
        lines += weights.load(config.init_from, parts.model)
    trainer = Trainer(config, world, parts, exchange, setup.device, setup.run_dir, resume)
    lines += trainer.resume_lines
    if world.rank == 0:
        for line in lines:
            print(line, flush=True)
    return trainer


def _check_same_data(
    parts: workload.Workload, config: RunConfig, world: World, store: dist.Store
) -> None:
    """Raise ``UserError`` if this rank's data sets are not rank 0's.

    Ranks that share out different data would train on, with some samples twice and some never. A
    worker that was started again compares with the file that rank 0 wrote at first.
    """
    leaves_out = config.leaves_out_samples
    own = " ".join(
        str(fingerprint(dataset, leaves_out)) for dataset in (parts.data.train, parts.data.test)
    )
    if world.rank == 0:
        store.set(_DATA, own)
    elif store.get(_DATA).decode() != own:
        raise UserError(
            f"data: rank {world.rank}'s data set differs from rank 0's in its length or samples"
            " (let the factory read and draw the same on every rank: the same files in the same"
            " order, a fixed seed)"
        )


def choose_device(config: RunConfig, world: World) -> torch.device:
    """Return this worker's device.

    It is ``cuda:<local rank>`` if CUDA is available (modulo the number of GPUs, where workers share
    them), else the CPU.

    Raises:
        UserError: the configuration asks for CUDA, which is not available.
    """
    has_cuda = torch.cuda.is_available()
    if config.device == "cpu" or (config.device == "auto" and not has_cuda):
        return torch.device("cpu")
    if not has_cuda:
        raise UserError(
            "device: 'cuda' is not there (torch.cuda.is_available() is false);"
            " allowed here: cpu, auto"
        )
    # A launcher may have narrowed CUDA_VISIBLE_DEVICES to this worker's own GPU, which is then 0.
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def threads(config: RunConfig, world: World) -> int:
    """Return the number of this worker's compute threads.

    The configuration decides, else the launcher, else the worker gets its share of the host's
    cores.
    """
    if config.threads != "auto":
        return config.threads
    from_launcher = os.environ.get("OMP_NUM_THREADS", "")
    # OpenMP also allows a list, with a number for each nesting level, which says nothing here.
    if from_launcher.isdigit():
        return max(1, int(from_launcher))
    return max(1, cores.count() // world.local_size)


class _Narrator:
    """The lines for people, of the rank that leads (``Trainer.leads``).

    It leaves the steps out if a progress bar follows the records (SCALETRAIN_FOLLOWED).
    """

    def __init__(self, config: RunConfig, world: World, trainer: Trainer, header: dict[str, Any]):
        self._world = world
        self._trainer = trainer
        self._num_steps = trainer.num_steps  # as planned: data may end earlier
        self._every = config.log_every
        self._is_followed = bool(os.environ.get("SCALETRAIN_FOLLOWED"))
        self._printed_at = time.monotonic()
        self._time_left = TimeLeft.of_header(header)
        self._samples = 0  # of this rank since the last line
        self._seconds = 0.0  # that they took

    def begin(self) -> None:
        """Say what is trained, and how."""
        trainer = self._trainer
        config = trainer.config
        if trainer.resumed:
            print(f"resumed at step {trainer.next_step}", flush=True)
        print(
            f"workers: {self._world.size} ({self._world.launcher}),"
            f" exchange {configuration.exchange_label(config.exchange)}, {trainer.device.type},"
            f" {plural(torch.get_num_threads(), 'thread')} a worker"
        )
        print(*trainer.describe(), sep="\n", flush=True)

    def step(self, record: StepRecord) -> None:
        """Print a line now and then: at most one a second, and always one at the end."""
        if not self._trainer.leads:
            return
        if record.skipped:
            back = ""
            if self._trainer.config.nonfinite == "roll_back":
                back = "; the weights go back to the newest checkpoint"
            print(f"step {record.step}: left out, its gradient is not finite{back}", flush=True)
        for line in record.bad_samples:
            print(f"step {record.step}: left out: {line}", flush=True)
        self._time_left.add(record)
        self._samples += record.samples
        self._seconds += record.step_s
        done, total = record.step + 1, self._trainer.num_steps
        now = time.monotonic()
        is_too_early = now - self._printed_at < 1 and done < total
        if self._is_followed or done % self._every or is_too_early:
            return
        rate = self._samples / self._seconds * self._trainer.exchange.live_workers()
        left = duration(self._time_left.seconds() or 0.0)
        loss = "not finite" if record.loss is None else f"{record.loss:.4f}"
        print(
            f"step {done}/{total}  loss {loss}  {rate:,.0f} samples/s  {left} left",
            flush=True,
        )
        self._printed_at = now
        self._samples, self._seconds = 0, 0.0

    def evaluated(self, step: int, figures: dict[str, float | None]) -> None:
        """Record an evaluation, and print it unless it is the last: the end says that one."""
        if not self._trainer.leads:
            return
        known = {name: value for name, value in figures.items() if value is not None}
        with open(RunDir(self._trainer.run_dir).evaluations, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | known) + "\n")
        if step < self._trainer.num_steps:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in known.items())
            print(f"step {step}/{self._trainer.num_steps}  {shown}", flush=True)

    def end(self, summary: dict[str, Any]) -> None:
        """Print the run's last lines: what was reached, and who held up the others."""
        accuracy = ""
        if summary["test_accuracy"] is not None:
            accuracy = f", test accuracy {summary['test_accuracy']:.4f}"
        for name, value in summary.items():
            is_own = name.startswith("test_") and name not in ("test_loss", "test_accuracy")
            if is_own and value is not None:
                accuracy += f", {name} {value:.4g}"
        loss = "not finite"
        if summary["final_loss"] is not None:
            loss = f"{summary['final_loss']:.6g}"
        outcome = "done" if summary["finished"] else "stopped early"
        if "stopped" in summary:
            print(f"training ends: {summary['stopped']}")
        if self._trainer.num_steps < self._num_steps:
            outcome = "done, since the data has ended"
        print(
            f"{outcome}: {summary['steps']} steps,"
            f" loss of the last global batch {loss}{accuracy},"
            f" {summary['samples_per_s']:,.0f} samples/s, {summary['wall_s']:.1f} s",
            flush=True,
        )
        if self._trainer.world.size > 1:
            print(_who_was_slow(RunDir(self._trainer.run_dir)), flush=True)


class _HeaderFile:
    """The facts about this worker that reports show, as a file."""

    def __init__(self, path: Path, world: World, trainer: Trainer):
        device = trainer.device
        is_cuda = device.type == "cuda"
        # Unknown for a stream: the first evaluation shows how long one takes.
        num_test_samples = trainer.num_test_samples or 0
        self._path = path
        self._exchange = trainer.exchange
        self.facts: dict[str, Any] = {
            **world._asdict(),
            "pid": os.getpid(),
            "device": str(device),
            "device_name": torch.cuda.get_device_name(device) if is_cuda else "cpu",
            "num_steps": trainer.num_steps,
            "global_batch": trainer.global_batch,
            # For the time that is left.
            "evaluate_every": trainer.config.evaluate_every,
            "save_every": trainer.config.checkpoint.every_steps,
            "test_samples": math.ceil(num_test_samples / world.size),
            "threads": torch.get_num_threads(),
            "cores": cores.usable(),
            # The same for all workers of a host, so one of them writes it.
            "environment": environment() if world.local_rank == 0 else None,
        }

    def add(self, name: str, value: Any) -> None:
        self.facts[name] = value

    def add_choice(self) -> None:
        """Write the choice of ``auto``, once: it has measured by the end of its first step."""
        if "chosen" not in self.facts:
            self.add("chosen", self._exchange.chosen())
            self.write()

    def write(self) -> None:
        write_json(self._path, self.facts)


def _emulation(files: RunDir, config: RunConfig) -> dict[str, Any]:
    """Return which parts of this run are emulated: the network, the accelerators, or none."""
    network = None
    if files.emulation.exists():
        network = json.loads(files.emulation.read_text(encoding="utf-8"))
    compute = config.compute.model_dump() if config.compute else None
    return {
        "emulated": bool(network or compute),
        "emulation": {"network": network, "compute": compute},
    }


if __name__ == "__main__":
    try:
        with progress.ending():
            status = main(Path(sys.argv[1]), "--resume" in sys.argv[2:])
        sys.exit(status)
    except UserError as mistake:
        # The worker could not report it: the mistake is in the variables that say which rank it is.
        print(f"scaletrain: error: {mistake}", file=sys.stderr)
        sys.exit(2)
