"""Reach several hosts as a launcher would, and collect the facts about each.

Inside an allocation of SLURM, ``srun`` starts the program that answers; elsewhere ``ssh`` does.
"""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from scaletrain.errors import UserError
from scaletrain.host.comparison import HostReport
from scaletrain.host.facts import HostFacts
from scaletrain.host.processes import telling_line
from scaletrain.launching import hosts as host_lists
from scaletrain.launching.job import Program

_ANSWER_S = 60.0  # a host that does not answer within this time is given up
_SSH_FAILED = 255  # ssh's own exit status; all others come from the command there
_CLOCK_LOOKS = 5  # the quickest answer tells the clock best
_SSH = ("ssh", "-oBatchMode=yes", "-oConnectTimeout=10", "-oStrictHostKeyChecking=accept-new")


class Unreached(NamedTuple):
    """A host that could not be asked."""

    host: str
    problem: str
    fix: str


def named_hosts(hosts: str, hostfile: Path | None) -> list[str]:
    """Return the hosts that a person means, each once.

    Args:
        hosts: ``a,b`` or ``n[01-04]``; empty: the hosts of the host file, or of the SLURM
            allocation around us.
        hostfile: a file for mpirun: a host a line, perhaps with ``slots=4`` or ``:4`` behind it.
    """
    if hosts and hostfile:
        raise UserError("--hosts and --hostfile: name the hosts in one of them, not in both")
    entries: list[str] = []
    if hosts:
        entries = host_lists.expand(hosts)
    elif hostfile:
        for line in hostfile.read_text(encoding="utf-8").splitlines():
            words = line.partition("#")[0].split()
            entries += words[:1]
    elif "SLURM_JOB_NODELIST" in os.environ:
        entries = host_lists.expand(os.environ["SLURM_JOB_NODELIST"])
    # Slots may stand behind a name, and a host may be listed once for each of them.
    return list(dict.fromkeys(entry.partition(":")[0] for entry in entries))


def command_on(host: str, argv: Sequence[str]) -> list[str]:
    """Return the command that runs ``argv`` on a host, in this working directory."""
    if "SLURM_JOB_ID" in os.environ and shutil.which("srun"):
        srun = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}"]
        return [*srun, "--unbuffered", *argv]
    # ssh joins its arguments, and a shell there takes them apart again.
    remote = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(argv)}"
    return [*_SSH, host, remote]


def ask(hosts: Sequence[str], directory: Path) -> tuple[list[HostReport], list[Unreached]]:
    """Ask all hosts at once.

    Args:
        hosts: as the person calls them.
        directory: a file is written to it, for the hosts to see.

    Raises:
        UserError: nothing can be written there.
    """
    content = secrets.token_hex(16)
    file = directory.resolve() / f".scaletrain-doctor-{content[:8]}"
    try:
        file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}") from None
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(hosts)) as pool:
        stack.callback(file.unlink, missing_ok=True)

        def everywhere(act: Callable[[_Conversation], Any]) -> None:
            for _ in pool.map(act, [c for c in conversations if not c.problem]):
                pass

        conversations = []
        for host in hosts:
            argv = Program.HOST_FACTS.command(file, content)
            conversations.append(stack.enter_context(_Conversation(host, argv)))
        everywhere(_Conversation.ask_for_facts)
        everywhere(_Conversation.ask_for_clock)
        endpoints = {c.host: c.endpoints() for c in conversations if c.facts}
        everywhere(lambda conversation: conversation.ask_for_peers(endpoints))
        reports = []
        unreached = []
        for conversation in conversations:
            if conversation.problem or conversation.facts is None:
                unreached.append(conversation.unreached())
            else:
                reports.append(conversation.report(conversation.facts))
    return reports, unreached


@contextlib.contextmanager
def _limit(process: subprocess.Popen[str]) -> Iterator[None]:
    """End a process that does not answer in time, and with it the wait for its output."""
    timer = threading.Timer(_ANSWER_S, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Conversation:
    """Questions to the program on one host, and its answers. One thread at a time uses it."""

    def __init__(self, host: str, argv: Sequence[str]):
        self.host = host
        self.facts: HostFacts | None = None
        self.problem = ""  # why there are no more answers
        self._port = 0
        self._clock_lead_s = 0.0
        self._clock_error_s = 0.0
        self._reached: dict[str, list[str]] = {}
        self._argv = command_on(host, argv)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "_Conversation":
        try:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            self.problem = f"{self._argv[0]}: {error.strerror}"
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is None:
            return
        # The end of its input ends the program there, and so the command here.
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=5.0)
        self._process.kill()
        self._process.wait()

    def ask_for_facts(self) -> None:
        """Learn the host's facts."""
        answer = self._ask("facts")
        if answer is not None:
            facts, self._port = answer
            self.facts = HostFacts.from_json(facts)

    def ask_for_clock(self) -> None:
        """Learn how far the host's clock is ahead of ours."""
        self._clock_error_s = float("inf")
        for _ in range(_CLOCK_LOOKS):
            asked_at = time.time()
            clock = self._ask("clock")
            if clock is None:
                return
            error_s = (time.time() - asked_at) / 2
            if error_s < self._clock_error_s:
                self._clock_error_s = error_s
                self._clock_lead_s = clock - (asked_at + error_s)

    def endpoints(self) -> list[int | str]:
        """Return where the program on this host listens: the port, and the host's addresses."""
        assert self.facts
        return [self._port, *[entry.address for entry in self.facts.addresses]]

    def ask_for_peers(self, endpoints: dict[str, list[int | str]]) -> None:
        """Learn at which of the others' addresses this host reaches them."""
        others = {host: where for host, where in endpoints.items() if host != self.host}
        self._reached = self._ask(others) or {}

    def report(self, facts: HostFacts) -> HostReport:
        """Return the facts that were learnt."""
        return HostReport(self.host, facts, self._clock_lead_s, self._clock_error_s, self._reached)

    def unreached(self) -> Unreached:
        """Return why nothing was learnt, and the remedy."""
        if self._argv[0] == "srun":
            fix = f"see srun --nodelist={self.host} hostname; is the host in the allocation?"
        elif self._process and self._process.poll() not in (None, _SSH_FAILED):
            fix = (
                "install the same environment at the same path there, and enter a shared directory"
            )
        else:
            fix = f"ssh {self.host} true must work without a password (ssh-copy-id {self.host})"
        return Unreached(self.host, self.problem, fix)

    def _ask(self, question: Any) -> Any:
        """Return the answer to a question; None if there is none, which ``problem`` explains."""
        process = self._process
        assert process and process.stdin and process.stdout and process.stderr
        # If it has ended, the end of its output says so below.
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        with _limit(process):
            for line in process.stdout:
                # A shell's start-up files may print something before the first answer.
                with contextlib.suppress(ValueError):
                    return json.loads(line)
        self.problem = telling_line(process.stderr.read(), "no answer")
        return None
