"""What a run needs of its host: told without importing it, and only where it is really missing."""

import sys
from pathlib import Path
from typing import Any

import pytest

from scaletrain import config, plugins, torch_names
from scaletrain.config import presence
from scaletrain.errors import UserError
from scaletrain.needs import Needs

JOB: dict[str, Any] = {"model": "mlp", "data": "digits", "batch_size": 8, "steps": 1}


def lack(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        presence.check(config.check(JOB | tree), "job.yaml: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("package", "tree", "told"),
    [
        (
            "mnist1d",
            {"data": "mnist1d"},
            'data: mnist1d needs mnist1d (pip install "scaletrain[data]")',
        ),
        (
            "horovod",
            {"exchange": "horovod"},
            "exchange: horovod needs horovod (build it with `make horovod`)",
        ),
        (
            "torchmetrics",
            {"metrics": {"f1": "F1Score"}},
            'metrics.f1: F1Score needs torchmetrics (pip install "scaletrain[metrics]")',
        ),
        (
            "tensorboard",
            {"callbacks": ["tensorboard"]},
            'callbacks[0]: tensorboard needs tensorboard (pip install "scaletrain[trackers]")',
        ),
        (
            "wandb",
            {"callbacks": ["drift", "wandb"]},
            'callbacks[1]: wandb needs wandb (pip install "scaletrain[trackers]")',
        ),
        (
            "mlflow",
            {"callbacks": ["mlflow"]},
            'callbacks[0]: mlflow needs mlflow (pip install "scaletrain[trackers]")',
        ),
        (
            "prometheus_client",
            {"callbacks": ["prometheus"]},
            'callbacks[0]: prometheus needs prometheus_client (pip install "scaletrain[trackers]")',
        ),
    ],
)
def test_a_package_that_is_not_installed(
    package: str, tree: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)  # Python then finds no such module
    assert lack(tree) == f"job.yaml: {told}"


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        (
            {"init_from": "."},
            "init_from: FOLDER holds no checkpoint (allowed: a file, or the directory of a run"
            " with one)",
        ),
        (
            {"data": {"name": "image_folder", "folder": ".", "test_folder": "gone"}},
            "data.test_folder: 'gone' is not allowed (allowed: a folder; there is no FOLDER/gone)",
        ),
        (
            {"data": {"name": "cifar", "folder": "here"}},
            "data.folder: 'here' is not allowed (allowed: a folder; there is no FOLDER/here)",
        ),
        (
            {"data": {"name": "text_file", "file": "here", "test_file": "gone"}},
            "data.test_file: 'gone' is not allowed (allowed: a file; there is no FOLDER/gone)",
        ),
        (
            {"data": {"name": "arrays", "inputs": "here", "targets": "y.npy"}},
            "data.targets: 'y.npy' is not allowed (allowed: a file; there is no FOLDER/y.npy)",
        ),
        (
            {
                "data": {"name": "idx", "images": "here", "labels": "a"}
                | {"test_images": "here", "test_labels": "here"}
            },
            "data.labels: 'a' is not allowed (allowed: a file; there is no FOLDER/a)",
        ),
        (
            {"metrics": {"f1": "gone:F1"}},
            "metrics.f1: 'gone:F1': no module 'gone' (looked in FOLDER and on Python's path)",
        ),
        (
            {"loss": "gone:f"},
            "loss: 'gone:f': no module 'gone' (looked in FOLDER and on Python's path)",
        ),
        (
            {"callbacks": ["drift", "gone:f"]},
            "callbacks[1]: 'gone:f': no module 'gone' (looked in FOLDER and on Python's path)",
        ),
    ],
)
def test_a_file_or_module_that_is_not_there(
    tree: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    assert lack(tree) == f"job.yaml: {told.replace('FOLDER', str(tmp_path))}"


@pytest.mark.parametrize(
    ("built", "visible", "files", "reason"),
    [
        (False, "0", ["here"], "this torch was built for CPUs"),
        (True, "", ["here"], "CUDA_VISIBLE_DEVICES hides all GPUs"),
        (True, "-1", ["here"], "CUDA_VISIBLE_DEVICES hides all GPUs"),
        (None, "0", ["gone"], "this host has no GPU"),
    ],
)
def test_a_gpu_that_is_not_there(
    built: bool | None,
    visible: str,
    files: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "here").touch()
    monkeypatch.setattr(torch_names, "has_gpu_support", lambda: built)
    monkeypatch.setattr(presence, "_GPU_FILES", [tmp_path / name for name in files])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    told = f"job.yaml: device: 'cuda' is not allowed: {reason} (allowed here: cpu, auto)"
    assert lack({"device": "cuda"}) == told
    presence.check(config.check(JOB | {"device": "auto"}))
    # Where nothing speaks against it, the worker has the last word.
    monkeypatch.setattr(torch_names, "has_gpu_support", lambda: True)
    monkeypatch.setattr(presence, "_GPU_FILES", [tmp_path / "here"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    presence.check(config.check(JOB | {"device": "cuda"}))


def test_torchs_build_is_read_without_importing_it():
    import torch

    assert torch_names.has_gpu_support() == bool(torch.version.cuda or torch.version.hip)


def test_every_plugin_that_needs_a_package_is_known():
    """Bug it catches: NEEDS in another form, which is silently not read."""
    needed = {}
    for kind, where in plugins.KINDS.items():
        for name in plugins.names(kind):
            source = Path(plugins.__file__).parent / where.folder / f"{name}.py"
            if "Needs(" in source.read_text(encoding="utf-8"):
                needed[name] = plugins.needs(kind, name)
                assert needed[name] != Needs(), name
                assert bool(needed[name].package) == bool(needed[name].fix), name
    assert {
        "arrays",
        "clip",
        "drift",
        "early_stop",
        "horovod",
        "prune",
        "mnist1d",
        "wandb",
        "mlflow",
        "tensorboard",
        "prometheus",
    } <= set(needed)


def test_options_of_a_persons_own_factory_may_name_files(tmp_path: Path):
    (tmp_path / "own1.py").write_text(
        "def pairs(*, table: Annotated[str, IsFile()], more: Annotated[str, IsFolder()] = ''): ...\n"
    )
    tree = {"source": str(tmp_path / "c.yaml"), "data": {"name": "own1:pairs", "table": "gone"}}
    assert "data.table: 'gone' is not allowed (allowed: a file; there is no " in lack(tree)
    (tmp_path / "there").touch()
    tree["data"] = {"name": "own1:pairs", "table": str(tmp_path / "there")}
    presence.check(config.check(JOB | tree))
    tree["data"]["more"] = str(tmp_path / "there")
    assert "data.more" in lack(tree), "a file is no folder"


def test_a_resumed_run_needs_no_initial_weights():
    run = config.check(JOB | {"init_from": "gone.pt"})
    presence.check(run, begins=False)
    with pytest.raises(UserError, match=r"^init_from: there is no /.*/gone\.pt \(allowed"):
        presence.check(run)


def test_modules_that_python_would_find_are_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each is imported as a worker would: both must agree."""
    package = tmp_path / "own2"
    (package / "inner").mkdir(parents=True)  # a namespace
    (package / "inner" / "deep.py").write_text("def f(): ...\n")
    made = tmp_path / "own3"
    made.mkdir()
    (made / "__init__.py").write_text(
        "import sys, types\nmade = sys.modules['own3.made'] = types.ModuleType('own3.made')\n"
        "made.f = print\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("own2.inner.deep:f", "own3.made:f", "os.path:join", "json.decoder:JSONDecoder"):
        plugins.check_module("model", name, tmp_path)
        assert callable(plugins.load("model", name, tmp_path)), name
    for name in ("own2.inner.gone:f", "own2.gone.deep:f", "json.gone:f", "gone:f"):
        with pytest.raises(UserError) as early:
            plugins.check_module("model", name, tmp_path)
        with pytest.raises(UserError) as late:
            plugins.load("model", name, tmp_path)
        assert str(early.value) == str(late.value)


def test_nothing_is_imported(tmp_path: Path):
    for name in ("own4", "own5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemError('imported')\n")
        (tmp_path / name / "net.py").write_text("raise SystemError('imported')\nnet = 1\n")
    tree = {"source": str(tmp_path / "c.yaml"), "model": "own4.net:net", "data": "own5.net:net"}
    presence.check(config.check(JOB | tree))
