"""Which server processes a job needs, and where they run."""

import json
import os
from pathlib import Path

from scaletrain.config import RunConfig
from scaletrain.launching.job import Companion, Program
from scaletrain.parameter_server.protocol.settings import Settings, settings

BESIDE = "beside"  # server k is started by worker k
DEDICATED = "dedicated"  # the launcher starts them before the workers


def of_run(config: RunConfig) -> Settings:
    """The settings of a configured run. Raises ``UserError``."""
    return settings(
        config.exchange.options, config.workers, config.timeout_s, hosts(config.launcher.name, 1)
    )


def hosts(launcher: str, num_nodes: int) -> int:
    """How many hosts servers and workers lie on. A rehearsal gives each server an (emulated) host of its own."""
    return num_nodes + 1 if launcher == "rehearsal" else num_nodes


def resolve(made: Settings, launcher: str, configured: bool = True) -> str:
    """``auto``: dedicated where the launcher of a configured run starts companions on the workers' network, else beside the workers."""
    if made.placement != "auto":
        return made.placement
    return DEDICATED if configured and launcher in ("local", "rehearsal") else BESIDE


def companions(config: RunConfig, run_dir: Path) -> tuple[Companion, ...]:
    """The server processes that the launcher has to start. Pure: keys and sockets are made by the processes themselves."""
    made = of_run(config)
    if resolve(made, config.launcher.name) == BESIDE:
        return ()
    return tuple(
        Companion(f"server {index}", command(made, run_dir, index), restarts=made.restart_servers)
        for index in range(made.servers)
    )


def min_workers(config: RunConfig) -> int | None:
    """See ``Job.min_workers``."""
    return of_run(config).fewest_workers


def command(made: Settings, run_dir: Path, index: int) -> tuple[str, ...]:
    """What starts server ``index``."""
    text = json.dumps(
        {
            key: value
            for key, value in made._asdict().items()
            if value != made._field_defaults.get(key)
        }
    )
    return Program.PARAMETER_SERVER.command(run_dir, index, text)


def address_path(run_dir: Path, index: int) -> Path:
    return run_dir / f"server-{index}.address.json"


def read_address(run_dir: Path, index: int) -> dict[str, object] | None:
    """Where server ``index`` listens: endpoints, host, pid. None while it is not up."""
    try:
        value = json.loads(address_path(run_dir, index).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("endpoints"), list) else None


def socket_path(run_dir: Path, index: int) -> Path:
    """A Unix socket in a directory of mode 0700; the kernel allows 107 characters, so deep run directories get one elsewhere."""
    import tempfile

    directory = run_dir / ".sockets"
    if len(str(directory)) > 90:
        directory = Path(tempfile.mkdtemp(prefix="scaletrain-"))
    directory.mkdir(mode=0o700, exist_ok=True)
    os.chmod(directory, 0o700)
    return directory / f"server-{index}"
