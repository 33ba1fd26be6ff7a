"""What a single process reaches: every launcher is compared with it."""

import pytest

from tests.cluster.commands import SHORT, train


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The summary of the digits job, cut short, on one worker."""
    return train(tmp_path_factory.mktemp("alone") / "run", *SHORT)
