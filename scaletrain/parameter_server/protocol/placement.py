"""Which server processes a job needs, where they run, and where they listen."""

import json
import tempfile
from pathlib import Path

from scaletrain.config import RunConfig
from scaletrain.launching.job import Companion, Program
from scaletrain.parameter_server.protocol.settings import Settings, settings_from_options
from scaletrain.run.job_key import private_directory
from scaletrain.run.layout import RunDir

BESIDE = "beside"  # server k is started by worker k
DEDICATED = "dedicated"  # the launcher starts them before the workers

_MAX_DIRECTORY = 90  # of the 107 characters that the kernel allows for the path of a socket


def of_run(config: RunConfig) -> Settings:
    """Return the settings of a configured run. Raises ``UserError``."""
    num_hosts = hosts(config.launcher.name, 1)
    options = config.exchange.options
    return settings_from_options(options, config.workers, config.timeout_s, num_hosts)


def hosts(launcher: str, num_nodes: int) -> int:
    """Return how many hosts servers and workers lie on.

    A rehearsal gives each server an (emulated) host of its own.
    """
    return num_nodes + 1 if launcher == "rehearsal" else num_nodes


def resolve(settings: Settings, launcher: str, configured: bool = True) -> str:
    """Return where servers run: ``BESIDE`` or ``DEDICATED``.

    The option's ``auto`` is dedicated where the launcher starts companions on the workers'
    network. It does so for a configured run alone: nobody starts companions of a person's own
    program.

    Args:
        settings: of the job.
        launcher: the launcher's name.
        configured: whether the run has a configuration.
    """
    if settings.placement != "auto":
        return settings.placement
    starts_companions = configured and launcher in ("local", "rehearsal")
    return DEDICATED if starts_companions else BESIDE


def companions(config: RunConfig, run_dir: Path) -> tuple[Companion, ...]:
    """Return the server processes that the launcher has to start.

    Touches no file: keys and sockets are made by the processes themselves.
    """
    settings = of_run(config)
    if resolve(settings, config.launcher.name) == BESIDE:
        return ()
    servers = []
    for index in range(settings.servers):
        argv = command(settings, run_dir, index)
        servers.append(Companion(f"server {index}", argv, restarts=settings.restart_servers))
    return tuple(servers)


def min_workers(config: RunConfig) -> int | None:
    """Return how many workers must live for the job to go on (see ``Job.min_workers``)."""
    return of_run(config).fewest_workers


def command(settings: Settings, run_dir: Path, index: int) -> tuple[str, ...]:
    """Return the command line of server ``index``."""
    return Program.PARAMETER_SERVER.command(run_dir, index, settings.to_json())


def address_path(run_dir: Path, index: int) -> Path:
    """Return the file in which server ``index`` writes where it listens."""
    return RunDir(run_dir).server_address(index)


def read_address(run_dir: Path, index: int) -> dict[str, object] | None:
    """Return where server ``index`` listens; None while it is not up.

    Returns:
        ``endpoints`` (ZeroMQ addresses), ``host``, ``pid`` and ``time``.
    """
    try:
        value = json.loads(address_path(run_dir, index).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("endpoints"), list):
        return None
    return value


def socket_path(run_dir: Path, index: int) -> Path:
    """Return the path of a server's Unix socket, in a directory of mode 0700.

    The kernel limits the length of such a path. A deep run directory gets its sockets elsewhere.
    """
    if len(str(RunDir(run_dir).private)) > _MAX_DIRECTORY:
        directory = Path(tempfile.mkdtemp(prefix="scaletrain-"))
    else:
        directory = private_directory(run_dir)
    return directory / f"server-{index}"
