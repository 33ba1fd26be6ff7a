"""Tests of scaletrain/notebook/ in a real kernel, and of examples/notebook.ipynb."""

import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import require

EXAMPLE = Path(__file__).parents[2] / "examples" / "notebook.ipynb"
pytestmark = pytest.mark.slow


class Notebook:
    """A notebook whose cells run one after the other in one kernel."""

    def __init__(self, client):
        self._client = client

    def run(self, source: str) -> str:
        """Run a cell; return what it shows, streams and errors alike."""
        import nbformat

        cell = nbformat.v4.new_code_cell(source)
        self._client.nb.cells.append(cell)
        self._client.execute_cell(cell, len(self._client.nb.cells) - 1)
        shown = []
        for output in cell.outputs:
            shown.append(output.get("text", ""))
            shown.append(output.get("data", {}).get("text/plain", ""))
            shown += output.get("traceback", [])
        text = "\n".join(part for part in shown if part)
        return re.sub("\x1b\\[[0-9;]*m", "", text)


@pytest.fixture(scope="module")
def notebook() -> Iterator[Notebook]:
    """A kernel that has run the cells of the example. All tests share it: it starts slowly."""
    for module in ("nbclient", "ipykernel"):
        is_there = importlib.util.find_spec(module) is not None
        require("notebook", is_there, "pip install ipykernel nbclient")
    import nbclient
    import nbformat

    client = nbclient.NotebookClient(
        nbformat.v4.new_notebook(), kernel_name="python3", timeout=60, allow_errors=True
    )
    with client.setup_kernel():
        shared = Notebook(client)
        # The kernel itself computes with several threads and goes backward: forks must bear it.
        shared.run(
            "import os, signal, sys, threading, time, psutil, torch\n"
            "import torch.distributed as dist\n"
            "from scaletrain import notebook_launch\n"
            "torch.set_num_threads(2)\n"
            "x = torch.ones(400, 400, requires_grad=True); (x @ x).sum().backward()\n"
        )
        yield shared


def test_the_example_trains_as_one_process_does(notebook: Notebook):
    import nbformat

    example = nbformat.read(EXAMPLE, as_version=4)
    shown = [notebook.run(cell.source) for cell in example.cells if cell.cell_type == "code"]
    assert "[rank 0] rank 0: loss" in shown[1] and "[rank 1] rank 1: loss" in shown[1]
    assert re.search(r"9\d\.\d% of the digits", shown[2]), shown
    difference = notebook.run(
        "alone = notebook_launch(train, workers=1, args=[200])\n"
        "max((alone[name] - weights[name]).abs().max().item() for name in alone)"
    )
    assert float(difference.split()[-1]) < 1e-3, difference


def test_groups_and_results_of_all_ranks(notebook: Notebook):
    shown = notebook.run(
        "def sum_of_ranks(factor):\n"
        "    dist.init_process_group('scaletrain')\n"
        "    total = torch.full((3,), float(dist.get_rank() + 1) * factor)\n"
        "    dist.all_reduce(total)\n"
        "    display(f'shown by {dist.get_rank()}')\n"
        "    return total.tolist(), dist.get_rank(), torch.get_num_threads()\n"
        "notebook_launch(sum_of_ranks, 2, [10], every_rank=True, threads=2)"
    )
    assert "[([30.0, 30.0, 30.0], 0, 2), ([30.0, 30.0, 30.0], 1, 2)]" in shown
    assert "[rank 1] 'shown by 1'" in shown or "[rank 1] shown by 1" in shown


def test_a_worker_is_free_of_the_kernel(notebook: Notebook):
    shown = notebook.run(
        "def descriptors(mode='socket'):\n"
        "    links = set()\n"
        "    for name in os.listdir('/proc/self/fd'):\n"
        "        try: links.add(os.readlink(f'/proc/self/fd/{name}'))\n"
        "        except OSError: pass\n"
        "    return {link for link in links if link.startswith((mode, 'anon_inode'))}\n"
        "def look():\n"
        "    try: answer = input()\n"
        "    except EOFError: answer = 'no input'\n"
        "    return [*descriptors()], threading.active_count(), os.getpgid(0) == os.getpid(), answer\n"
        "sockets = descriptors()\n"
        "theirs, threads, leads, answer = notebook_launch(look)\n"
        "len(sockets) > 5, {s for s in theirs if 'socket' in s} & sockets, threads, leads, answer"
    )
    assert "(True, set(), 1, True, 'no input')" in shown


def test_the_first_cause_is_shown_once(notebook: Notebook):
    shown = notebook.run(
        "def fail():\n"
        "    dist.init_process_group('gloo')\n"
        "    if dist.get_rank() == 1:\n"
        "        raise ValueError('no way')\n"
        "    dist.barrier()\n"
        "notebook_launch(fail, 2)"
    )
    assert shown.count("Traceback") == 1 and "raise ValueError('no way')" in shown
    assert "rank 1 on" in shown and "failed: ValueError: no way" in shown
    assert "launch.py" not in shown, "the frames of the launch explain nothing"
    killed = notebook.run("notebook_launch(lambda: os.kill(os.getpid(), signal.SIGKILL), 2)")
    assert "was ended by SIGKILL" in killed
    model = notebook.run("notebook_launch(lambda: {'model': torch.nn.Linear(1, 1)}, 2)")
    assert "returned dict with torch.nn.modules.linear.Linear in it" in model


def test_an_interrupt_ends_all_workers_and_the_kernel_goes_on(notebook: Notebook):
    shown = notebook.run(
        "import pathlib, tempfile\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "def wait():\n"
        "    helper = os.fork()\n"
        "    if helper == 0:\n"
        "        time.sleep(60)\n"
        "        os._exit(0)\n"
        "    (folder / os.environ['RANK']).touch()\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        (folder / f\"interrupted-{os.environ['RANK']}\").touch()\n"
        "        raise\n"
        "def interrupt():\n"
        "    while len(list(folder.iterdir())) < 2:\n"
        "        time.sleep(0.02)\n"
        "    os.killpg(0, signal.SIGINT)\n"
        "threading.Thread(target=interrupt).start()\n"
        "notebook_launch(wait, 2)"
    )
    assert "KeyboardInterrupt" in shown
    left = notebook.run("sorted(p.name for p in folder.iterdir()), psutil.Process().children(True)")
    assert "(['0', '1', 'interrupted-0', 'interrupted-1'], [])" in left
    # Threads and descriptors of ended launches do not add up.
    again = notebook.run(
        "before = len(os.listdir('/proc/self/fd')), threading.active_count()\n"
        "results = [notebook_launch(os.getpid, 2) for _ in range(3)]\n"
        "time.sleep(0.1)\n"
        "len(set(results)), before == (len(os.listdir('/proc/self/fd')), threading.active_count())"
    )
    assert "(3, True)" in again


def test_refusals(notebook: Notebook):
    inside = notebook.run("notebook_launch(lambda: notebook_launch(print, 2), 2)")
    assert "this process is one: rank " in inside and "Traceback" not in inside
    cuda = notebook.run(
        "really, torch.cuda.is_initialized = torch.cuda.is_initialized, lambda: True\n"
        "try: notebook_launch(print, 2)\n"
        "finally: torch.cuda.is_initialized = really"
    )
    assert "CUDA is in use in this process" in cuda and "restart the kernel" in cuda
    # torch's own words, which a GPU brings about by itself.
    late = notebook.run(
        "def late():\n"
        "    torch.cuda._is_in_bad_fork = lambda: True\n"
        "    torch.cuda.init()\n"
        "notebook_launch(late, 1)"
    )
    assert "forked subprocess" in late and "restart the kernel" in late
    for call in ("notebook_launch(print, 0)", "notebook_launch('print')"):
        assert "is not allowed (allowed: " in notebook.run(call)


def test_workers_die_with_a_kernel_that_is_killed():
    script = (
        "import os, time\n"
        "from scaletrain import notebook_launch\n"
        "notebook_launch(lambda: (print(os.getpid(), flush=True), time.sleep(60)), 2)"
    )
    kernel = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert kernel.stdout
    workers = [int(kernel.stdout.readline().split()[-1]) for _ in range(2)]
    kernel.kill()
    kernel.wait(10)
    until = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in workers):
        assert time.monotonic() < until, "a worker has outlived its kernel"
        time.sleep(0.05)
