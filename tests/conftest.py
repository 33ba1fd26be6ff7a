"""Shared by all tests: parts a machine may lack, and a run directory."""

import os
import signal

import pytest


def require(part: str, condition: bool, how: str) -> None:
    """Go on when ``condition`` holds; else skip, saying how to get ``part``. Where
    SCALETRAIN_REQUIRE lists it (CI), fail instead.
    """
    if condition:
        return
    message = f"needs {part}: {how}"
    if part in os.environ.get("SCALETRAIN_REQUIRE", "").split(","):
        pytest.fail(f"{message} (required by SCALETRAIN_REQUIRE)", pytrace=False)
    pytest.skip(message)


def pytest_configure() -> None:
    """Give tests the usual signals: `nohup make test &` in a script ignores two, and all processes
    that tests start would inherit that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: what needs no process, then what starts some, then clusters, containers
    last (an image is built).
    """

    def cost(item: pytest.Item) -> int:
        slow, cluster = (item.get_closest_marker(name) is not None for name in ("slow", "cluster"))
        return slow + 2 * cluster + ("containers" in item.nodeid)

    items.sort(key=cost)
