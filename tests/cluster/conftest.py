"""What a single process reaches: every launcher is compared with it."""

import shutil

import pytest

from scaletrain.errors import UserError
from scaletrain.rehearsal import machine
from tests.cluster.commands import SHORT, train
from tests.conftest import require


@pytest.fixture
def namespaces():
    """What emulated hosts need; without it a skip that says what is missing."""
    try:
        machine.check()
    except UserError as missing:
        require("namespaces", False, str(missing))


@pytest.fixture
def iptables():
    """What drops packets on emulated hosts."""
    is_installed = shutil.which("iptables", path=machine.PATH) is not None
    require("iptables", is_installed, "Debian: apt-get install iptables")


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The summary of the digits job, cut short, on one worker."""
    return train(tmp_path_factory.mktemp("alone") / "run", *SHORT)
