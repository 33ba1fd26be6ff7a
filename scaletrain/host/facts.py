"""Facts about this host that must fit the other hosts of a job."""

import dataclasses
import importlib.metadata
import platform
import resource
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletrain._version import __version__
from scaletrain.host.addresses import InterfaceAddress, ipv4_addresses
from scaletrain.host.names import host_name


@dataclass(frozen=True)
class HostFacts:
    """The facts that one host reports about itself."""

    name: str  # its own, where the person may have called it differently
    python: str
    torch: str | None  # None: not installed
    nccl: str | None  # of torch's wheels; None: torch was built without it, or brings its own
    scaletrain: str
    addresses: list[InterfaceAddress]  # without loopback
    name_leads_to: str  # the address of the host's own name; empty: none
    shared_memory_bytes: int | None  # free in /dev/shm; None: it is not there
    open_files: int  # that a process may have
    sees_file: bool  # that another host has written to the directory of runs

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "HostFacts":
        """Return the facts that ``to_json`` wrote."""
        addresses = [InterfaceAddress(*entry) for entry in value["addresses"]]
        return cls(**{**value, "addresses": addresses})

    def to_json(self) -> dict[str, Any]:
        """Return the facts as a value for JSON."""
        return dataclasses.asdict(self)


def gather(file: Path, content: str) -> HostFacts:
    """Return the facts of this host. Imports no torch.

    Args:
        file: that another host has written.
        content: the text that it wrote.
    """
    name = socket.gethostname()
    return HostFacts(
        name=host_name(),
        python=platform.python_version(),
        torch=_torch_version(),
        nccl=_nccl_version(),
        scaletrain=__version__,
        addresses=[entry for entry in ipv4_addresses() if not entry.is_loopback],
        name_leads_to=_address_of(name),
        shared_memory_bytes=_shared_memory_bytes(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        sees_file=_holds(file, content),
    )


def _torch_version() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def _nccl_version() -> str | None:
    for distribution in importlib.metadata.distributions():
        # The name ends with the version of CUDA, such as nvidia-nccl-cu13.
        if (distribution.metadata["Name"] or "").startswith("nvidia-nccl-"):
            return distribution.version
    return None


def _address_of(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def _shared_memory_bytes() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def _holds(file: Path, content: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == content
    except OSError:
        return False
