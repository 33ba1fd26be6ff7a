"""Do several hosts fit together? Pure: facts go in, checks with their fixes come out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scaletrain.host.addresses import InterfaceAddress
from scaletrain.host.check import ABSENT, BROKEN, OK, SHARED_MEMORY_BYTES, Check
from scaletrain.host.facts import HostFacts
from scaletrain.units import plural

_OPEN_FILES = 4096  # sockets to all peers, shared memory and loader processes
_CLOCK_S = 1.0  # clocks may differ by this much: file times and traces still make sense
_MOST_SHOWN = 6  # pairs of hosts that a line names


@dataclass(frozen=True)
class HostReport:
    """The facts that were found out about one host that was reached."""

    host: str  # as the person calls it
    facts: HostFacts
    clock_lead_s: float  # of its clock over that of the host that asks
    clock_error_s: float  # the lead may be wrong by this much
    # By host as the person calls it: the addresses of that host at which this one reached it.
    reached: Mapping[str, Sequence[str]]


def compare(reports: Sequence[HostReport], directory: str) -> list[Check]:
    """Return whether hosts fit together.

    Args:
        reports: of at least two hosts.
        directory: in which a file was written on one host, for the others to see.
    """
    return [
        *_versions(reports),
        _network(reports),
        _names(reports),
        _clocks(reports),
        _shared_directory(reports, directory),
        _shared_memory(reports),
        _open_files(reports),
    ]


def _versions(reports: Sequence[HostReport]) -> list[Check]:
    checks = []
    for name, fix in (
        ("python", "run the same Python on all hosts, from the same path"),
        ("torch", "install the same torch on all hosts: pip install torch=={}"),
        ("nccl", "install the same torch on all hosts, from the same index: it brings NCCL"),
        ("scaletrain", "install the same scaletrain on all hosts: pip install scaletrain=={}"),
    ):
        hosts: dict[str, list[str]] = {}  # by version
        for report in reports:
            version = getattr(report.facts, name) or "none"
            hosts.setdefault(version, []).append(report.host)
        title = {"python": "Python", "nccl": "NCCL"}.get(name, name)
        if len(hosts) == 1:
            version = next(iter(hosts))
            # A build without NCCL fits another one without it. A host without torch trains nothing.
            status = BROKEN if (name, version) == ("torch", "none") else OK
            fix = "install torch on all hosts: pip install torch"
            checks.append(Check(title, status, f"{version} on all hosts", fix, needed=True))
            continue
        found = [f"{version} on {_listed(names)}" for version, names in hosts.items()]
        wanted = next(version for version in hosts if version != "none")
        checks.append(Check(title, BROKEN, "; ".join(found), fix.format(wanted), needed=True))
    return checks


def _network(reports: Sequence[HostReport]) -> Check:
    """Check that every two hosts reach each other, and that all can meet at one address."""
    pairs = []
    cut = []
    for report in reports:
        for other in reports:
            if other is report:
                continue
            reached = _entries(other, report.reached.get(other.host, ()))
            if reached:
                pairs.append(f"{report.host} to {other.host} by {reached[0].interface}")
            else:
                cut.append(f"{report.host} does not reach {other.host}")
    if cut:
        fix = (
            "open TCP between the hosts for all ports (firewall, security group); ranks meet at"
            " ports that the kernel chooses"
        )
        return Check("network", BROKEN, _shortened(cut), fix, needed=True)
    meeting = _meeting_address(reports)
    if meeting is None:
        fix = "name a network that all hosts are on: SCALETRAIN_INTERFACE=NAME"
        detail = f"no address of {reports[0].host} is reached by all; {_shortened(pairs)}"
        return Check("network", BROKEN, detail, fix, needed=True)
    detail = f"all meet at {meeting.interface} ({meeting.address}); {_shortened(pairs)}"
    return Check("network", OK, detail)


def _meeting_address(reports: Sequence[HostReport]) -> InterfaceAddress | None:
    """Return the address of the first host that a job would choose; None if none fits all."""
    first, *others = reports
    for entry in first.facts.addresses:
        if all(entry.address in report.reached.get(first.host, ()) for report in others):
            return entry
    return None


def _entries(report: HostReport, addresses: Sequence[str]) -> list[InterfaceAddress]:
    """Return a host's interfaces with some of its addresses."""
    return [entry for entry in report.facts.addresses if entry.address in addresses]


def _names(reports: Sequence[HostReport]) -> Check:
    """Check that no host's name leads to the host's loopback, where no other host is."""
    wrong = []
    for report in reports:
        facts = report.facts
        if not facts.name_leads_to:
            wrong.append(f"{report.host}: {facts.name} does not resolve")
        elif facts.name_leads_to.startswith("127."):
            wrong.append(f"{report.host}: {facts.name} is {facts.name_leads_to}")
    if not wrong:
        return Check("host names", OK, "each host's name leads to its own network address")
    fix = (
        "in /etc/hosts there, give the name the host's network address: other programs (gloo, MPI)"
        " tell their peers the address of the name. scaletrain itself does not need it"
    )
    return Check("host names", ABSENT, _shortened(wrong), fix)


def _clocks(reports: Sequence[HostReport]) -> Check:
    leads = [report.clock_lead_s for report in reports]
    spread_s = max(leads) - min(leads)
    error_s = max(report.clock_error_s for report in reports)
    if spread_s <= _CLOCK_S + 2 * error_s:
        return Check("clocks", OK, f"within {spread_s + 2 * error_s:.3f} s")
    ahead = max(reports, key=lambda report: report.clock_lead_s)
    behind = min(reports, key=lambda report: report.clock_lead_s)
    detail = f"{ahead.host} is {spread_s:.1f} s ahead of {behind.host}"
    fix = "start chrony or systemd-timesyncd there; scaletrain goes on, but traces and logs mislead"
    return Check("clocks", ABSENT, detail, fix)


def _shared_directory(reports: Sequence[HostReport], directory: str) -> Check:
    blind = [report.host for report in reports if not report.facts.sees_file]
    if not blind:
        return Check("shared directory", OK, f"{directory} is the same on all hosts", needed=True)
    detail = f"a file in {directory} is not seen on {_listed(blind)}"
    fix = "give --run-dir a directory that all hosts mount (NFS, Lustre, ...)"
    return Check("shared directory", BROKEN, detail, fix, needed=True)


def _shared_memory(reports: Sequence[HostReport]) -> Check:
    small = []
    for report in reports:
        free_bytes = report.facts.shared_memory_bytes
        if free_bytes is None:
            small.append(f"{report.host} has none")
        elif free_bytes < SHARED_MEMORY_BYTES:
            small.append(f"{report.host}: {free_bytes / 2**20:,.0f} MiB free")
    if not small:
        least = min(report.facts.shared_memory_bytes or 0 for report in reports)
        return Check("/dev/shm", OK, f"at least {least / 2**20:,.0f} MiB free on each host")
    fix = "mount a larger one: mount -o remount,size=2G /dev/shm (docker run --shm-size=2g)"
    return Check("/dev/shm", BROKEN, _shortened(small), fix)


def _open_files(reports: Sequence[HostReport]) -> Check:
    few = []
    for report in reports:
        # -1 stands for no limit.
        if 0 <= report.facts.open_files < _OPEN_FILES:
            few.append(f"{report.host}: {report.facts.open_files:,}")
    if not few:
        return Check("open files", OK, f"at least {_OPEN_FILES:,} for a process on each host")
    fix = "ulimit -n 65536, for good in /etc/security/limits.conf: many ranks need many sockets"
    return Check("open files", ABSENT, _shortened(few), fix)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_SHOWN])
    if len(names) > _MOST_SHOWN:
        shown += f", and {plural(len(names) - _MOST_SHOWN, 'more host')}"
    return shown


def _shortened(words: Sequence[str]) -> str:
    shown = "; ".join(words[:_MOST_SHOWN])
    if len(words) > _MOST_SHOWN:
        shown += f"; and {len(words) - _MOST_SHOWN:,} more"
    return shown
