"""programs/__init__.py and the package's own __init__.py: how quickly programs load torch.

Bugs it catches: a library that stops garbage collection in other people's programs; an
``import torch`` that loads all of ours.
"""

import gc
import subprocess
import sys

import pytest

from scaletrain import programs


def test_collection_waits_until_a_program_has_loaded():
    assert gc.isenabled()
    programs.begin("scaletrain.programs.worker")  # imported, not run
    assert gc.isenabled()
    try:
        programs.begin("__main__")
        assert not gc.isenabled()
        programs.done()
        assert gc.isenabled() and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.enable()


@pytest.mark.slow
def test_torch_loads_our_engine_when_a_group_is_made():
    code = (
        "import sys, torch, torch.distributed as dist\n"
        "print(sorted(name for name in sys.modules if name.startswith('scaletrain.')))\n"
        "dist.init_process_group('scaletrain', store=dist.HashStore(), rank=0, world_size=1)\n"
        "print(type(dist.group.WORLD).__module__)\n"
        "print(sorted({'pydantic', 'ruamel.yaml', 'click', 'rich'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == [
        "['scaletrain._version', 'scaletrain.engine', 'scaletrain.engine.backend']",
        "scaletrain.engine.process_group",
        "[]",  # what reads configurations would make a script wait longer than gloo does
    ]
