"""host/comparison.py: do hosts fit together? Bug it catches: a difference between hosts that shows
as a hang an hour later.
"""

import dataclasses
from typing import Any

import pytest

from scaletrain.host.addresses import InterfaceAddress
from scaletrain.host.check import ABSENT, BROKEN, OK
from scaletrain.host.comparison import HostReport, compare
from scaletrain.host.facts import HostFacts

NAMES = ("a", "b", "c")


def report(number: int, **changes: Any) -> HostReport:
    """A host that fits: it has eth0, a second network and everything else as the others have."""
    name = NAMES[number]
    facts = HostFacts(
        name=name,
        python="3.11.7",
        torch="2.13.0",
        nccl="2.29.1",
        scaletrain="0.1.0",
        addresses=[
            InterfaceAddress("eth0", f"10.0.0.{number}"),
            InterfaceAddress("ib0", f"10.1.0.{number}"),
        ],
        name_leads_to=f"10.0.0.{number}",
        shared_memory_bytes=1 << 30,
        open_files=65536,
        sees_file=True,
    )
    reached = {
        NAMES[other]: [f"10.0.0.{other}", f"10.1.0.{other}"]
        for other in range(3)
        if other != number
    }
    of_facts = {key: value for key, value in changes.items() if hasattr(facts, key)}
    of_report = {key: value for key, value in changes.items() if key not in of_facts}
    facts = dataclasses.replace(facts, **of_facts)
    whole = HostReport(name, facts, clock_lead_s=0.0, clock_error_s=0.001, reached=reached)
    return dataclasses.replace(whole, **of_report)


def test_hosts_that_fit():
    checks = compare([report(0), report(1), report(2)], "/shared")
    assert {check.status for check in checks} == {OK}
    details = {check.name: check.detail for check in checks}
    assert details["network"].startswith("all meet at eth0 (10.0.0.0); a to b by eth0")
    assert details["torch"] == "2.13.0 on all hosts"


BY_IB = {"a": ["10.1.0.0"], "c": ["10.0.0.2", "10.1.0.2"]}
CASES = [
    ("Python", {"python": "3.12.1"}, BROKEN, "3.11.7 on a, c; 3.12.1 on b"),
    ("torch", {"torch": "2.12.0"}, BROKEN, "2.13.0 on a, c; 2.12.0 on b"),
    ("torch", {"torch": None}, BROKEN, "none on b"),
    ("NCCL", {"nccl": None}, BROKEN, "2.29.1 on a, c; none on b"),
    ("scaletrain", {"scaletrain": "0.2.0"}, BROKEN, "0.2.0 on b"),
    ("network", {"reached": {"a": ["10.0.0.0"]}}, BROKEN, "b does not reach c"),
    ("network", {"reached": {}}, BROKEN, "b does not reach a; b does not reach c"),
    ("network", {"reached": BY_IB}, OK, "all meet at ib0 (10.1.0.0)"),
    ("host names", {"name_leads_to": "127.0.1.1"}, ABSENT, "b: b is 127.0.1.1"),
    ("host names", {"name_leads_to": ""}, ABSENT, "b: b does not resolve"),
    ("clocks", {"clock_lead_s": 100.0}, ABSENT, "b is 100.0 s ahead of a"),
    ("clocks", {"clock_lead_s": -100.0}, ABSENT, "a is 100.0 s ahead of b"),
    ("clocks", {"clock_lead_s": 9.0, "clock_error_s": 5.0}, OK, "within"),
    ("shared directory", {"sees_file": False}, BROKEN, "/shared is not seen on b"),
    ("/dev/shm", {"shared_memory_bytes": 64 << 20}, BROKEN, "b: 64 MiB free"),
    ("/dev/shm", {"shared_memory_bytes": None}, BROKEN, "b has none"),
    ("open files", {"open_files": 1024}, ABSENT, "b: 1,024"),
    ("open files", {"open_files": -1}, OK, "at least"),
]


@pytest.mark.parametrize(("name", "change", "status", "words"), CASES)
def test_one_host_differs(name: str, change: dict[str, Any], status: str, words: str):
    checks = compare([report(0), report(1, **change), report(2)], "/shared")
    by_name = {check.name: check for check in checks}
    assert by_name[name].status == status and words in by_name[name].detail, by_name[name]
    assert status == OK or by_name[name].fix
    # Nothing else is blamed.
    assert {check.name for check in checks if check.status != OK} <= {name}


def test_no_torch_anywhere_is_no_success():
    checks = compare([report(0, torch=None), report(1, torch=None)], "/shared")
    torch = next(check for check in checks if check.name == "torch")
    assert torch.status == BROKEN and torch.needed


def test_no_network_that_all_share():
    first = report(0)
    second = report(1, reached={"a": ["10.0.0.0"], "c": ["10.0.0.2"]})
    third = report(2, reached={"a": ["10.1.0.0"], "b": ["10.0.0.1"]})
    network = compare([first, second, third], "/shared")[4]
    assert network.status == BROKEN and "no address of a is reached by all" in network.detail
    assert "SCALETRAIN_INTERFACE" in network.fix


def test_facts_travel_as_json():
    facts = report(0).facts
    assert HostFacts.from_json(facts.to_json()) == facts
