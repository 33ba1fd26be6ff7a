"""Check that this host has what a run needs: files, folders, packages, a person's modules.

Only a host on which workers run can tell. So ``scaletrain train`` looks if all workers run on its
host, and rank 0 looks in any case, before it meets the others. Nothing is imported.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from scaletrain import plugins, torch_names
from scaletrain.config.grammar import is_users_own
from scaletrain.config.schema import Named, RunConfig
from scaletrain.errors import UserError
from scaletrain.needs import IsFile, IsFolder, Needs
from scaletrain.run.layout import RunDir

# A GPU has one of these files: of NVIDIA (also Jetson's), of Windows' subsystem, of AMD.
_GPU_FILES = ("nvidiactl", "nvmap", "nvhost-ctrl", "dxg", "kfd")

TORCHMETRICS = Needs(package="torchmetrics", fix='pip install "scaletrain[metrics]"')


def check(config: RunConfig, where: str = "", *, begins: bool = True) -> None:
    """Raise ``UserError`` if this host lacks something that a run needs.

    Args:
        config: the run.
        where: the beginning of an error's line, such as the file's name and a colon.
        begins: False: it goes on from a checkpoint, and needs no other weights.
    """
    for kind, key, named in _parts(config):
        place = f"{where}{key}"
        if is_users_own(named.name):
            plugins.check_module(place, named.name, config.search_path)
        _check_paths(kind, place, named, config.search_path)
        plugins.needs(kind, named.name).check_installed(f"{place}: {named.name}")
    for figure, named in config.metrics.items():
        place = f"{where}metrics.{figure}"
        if is_users_own(named.name):
            plugins.check_module(place, named.name, config.search_path)
        else:
            TORCHMETRICS.check_installed(f"{place}: {named.name}")
    if config.device == "cuda":
        _check_gpu(where)
    if begins and config.init_from is not None:
        check_weights(Path(config.init_from.path), where)


def _check_gpu(where: str) -> None:
    """Raise ``UserError`` if this host has no GPU for torch, by all signs. Loads no driver."""
    reason = ""
    if torch_names.has_gpu_support() is False:
        reason = "this torch was built for CPUs"
    elif os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        reason = "CUDA_VISIBLE_DEVICES hides all GPUs"
    elif not any(Path("/dev", name).exists() for name in _GPU_FILES):
        reason = "this host has no GPU"
    if reason:
        raise UserError(f"{where}device: 'cuda' is not allowed: {reason} (allowed here: cpu, auto)")


def check_weights(path: Path, where: str = "") -> None:
    """Raise ``UserError`` if there is neither a file nor a checkpoint of a run at a path.

    Args:
        path: of ``init_from``.
        where: the beginning of an error's line.
    """
    if not path.exists():
        raise UserError(
            f"{where}init_from: there is no {path} (allowed: a file, or the directory of a run)"
        )
    if path.is_dir() and not RunDir(path).checkpoints():
        raise UserError(
            f"{where}init_from: {path} holds no checkpoint (allowed: a file, or the directory of a"
            " run with one)"
        )


def _parts(config: RunConfig) -> Iterator[tuple[str, str, Named]]:
    """Yield the kind, the key and the name of every part that has a factory."""
    for kind in ("model", "data", "workload", "loss", "optimizer", "exchange"):
        named: Named | None = getattr(config, kind)
        if named is not None:
            yield kind, kind, named
    for index, named in enumerate(config.callbacks):
        yield "callback", f"callbacks[{index}]", named


def _check_paths(kind: str, place: str, named: Named, search_path: Path | None) -> None:
    """Raise ``UserError`` if an option names a file or a folder that does not exist."""
    marked: dict[str, IsFile | IsFolder] = {}
    marked |= plugins.marked_options(kind, named.name, IsFile, search_path)
    marked |= plugins.marked_options(kind, named.name, IsFolder, search_path)
    for option, mark in marked.items():
        name = named.options.get(option)
        if name:
            mark.check(f"{place}.{option}", name)
