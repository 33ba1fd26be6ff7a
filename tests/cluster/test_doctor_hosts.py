"""``scaletrain doctor --hosts`` on hosts that an ssh of ours reaches. Bug it catches: a host that
cannot be asked, or a cut network, that looks well.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from scaletrain.cli import cli
from scaletrain.errors import UserError
from scaletrain.launching import reach
from scaletrain.rehearsal import Cluster
from tests.cluster.commands import clean, command


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that puts an ssh on PATH: by host, what runs the command ``$*`` there."""

    def put(hosts: dict[str, str]) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        cases = "\n".join(f"  {name}) {run} ;;" for name, run in hosts.items())
        (folder / "ssh").write_text(
            '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nhost=$1; shift\n'
            f'case $host in\n{cases}\n  *) echo "ssh: no host $host" >&2; exit 255 ;;\nesac\n'
        )
        (folder / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.chdir(tmp_path)
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            monkeypatch.delenv(name)
        return folder

    return put


def doctor(*arguments: str) -> tuple[int, dict[str, dict]]:
    done = CliRunner().invoke(cli, ["doctor", "--json", *arguments])
    assert done.exit_code in (0, 1), done.output
    report = json.loads(done.stdout)
    assert report["ok"] == (done.exit_code == 0)
    assert all(check["fix"] for check in report["checks"] if check["status"] != "ok")
    return done.exit_code, {check["name"]: check for check in report["checks"]}


@pytest.mark.timeout(60)
def test_hosts_that_cannot_be_asked_are_named_with_their_fix(ssh, tmp_path: Path):
    here = 'exec sh -c "$*"'
    python = shlex.quote(sys.executable)
    ssh(
        {
            # A shell that greets, and a host that cannot see our directory.
            "a": f"echo welcome; {here}",
            "b": 'cd /; exec sh -c "$(echo "$*" | sed s,-doctor-,-elsewhere-,)"',
            "old": f'exec sh -c "$(echo "$*" | sed s,{python},/opt/none/python,)"',
        }
    )
    (tmp_path / "hosts").write_text("a slots=4\nb:2 # second\n\nold\nnone\na\n")
    status, checks = doctor("--hostfile", "hosts")
    assert status == 1
    assert "no host none" in checks["host none"]["detail"]
    assert "ssh-copy-id none" in checks["host none"]["fix"]
    assert "/opt/none/python" in checks["host old"]["detail"]
    assert "same path" in checks["host old"]["fix"]
    assert checks["torch"]["status"] == "ok" and checks["clocks"]["status"] == "ok"
    assert "not seen on b" in checks["shared directory"]["detail"]
    assert not list(tmp_path.glob(".scaletrain-doctor*"))


@pytest.mark.cluster
@pytest.mark.timeout(100)
@pytest.mark.usefixtures("namespaces")
def test_a_cut_host_is_found(ssh, tmp_path: Path):
    with Cluster(3, bandwidth=None) as network:
        hosts = {}
        for number, name in enumerate(network.names):
            hosts[name] = f'exec {shlex.join(network.command(number, ["sh", "-c"]))} "$*"'
        ssh(hosts)
        status, checks = doctor("--hosts", "h[0-2]")
        assert status == 0, checks
        assert f"all meet at eth0 ({network.addresses[0]})" in checks["network"]["detail"]
        network.cut(2)
        status, checks = doctor("--hosts", "h[0-2]")
        assert status == 1
        assert "h0 does not reach h2; h1 does not reach h2" in checks["network"]["detail"]


def test_the_hosts_that_are_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2],gpu")
    assert reach.named_hosts("", None) == ["n1", "n2", "gpu"]
    assert reach.named_hosts("x:2,y", None) == ["x", "y"]
    (tmp_path / "hosts").write_text("x\n")
    with pytest.raises(UserError, match="not in both"):
        reach.named_hosts("x", tmp_path / "hosts")
    monkeypatch.delenv("SLURM_JOB_NODELIST")
    assert reach.named_hosts("", None) == []


def test_one_host_is_no_comparison():
    done = CliRunner().invoke(cli, ["doctor", "--hosts", "a,a"])
    assert done.exit_code != 0 and "two different hosts" in str(done.output) + str(done.exception)


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_directory_that_is_not_there_is_one_line(tmp_path: Path):
    argv = command("doctor", "--hosts", "a,b", "--run-dir", str(tmp_path / "none"))
    done = subprocess.run(argv, env=clean(), capture_output=True, text=True, timeout=40)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "none" in done.stderr
