"""Each layer's forward and backward time, parameters, activations and traffic, as `caffe time` does; is data or weights larger?"""

import contextlib
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import click


@click.command("model")
@click.argument("path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.option(
    "--batch", type=click.IntRange(min=1), help="Samples a pass [default: the config's batch_size]."
)
@click.option(
    "--passes",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Timed passes, after one warm-up.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Compute threads [default: torch's].")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the config; repeatable.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the figures as JSON."
)
def command(
    path: Path,
    batch: int | None,
    passes: int,
    threads: int | None,
    settings: tuple[str, ...],
    out: Path | None,
) -> None:
    """Time the model of CONFIG layer by layer, on one worker."""
    import torch

    from scaletrain import config as configuration
    from scaletrain.errors import UserError
    from scaletrain.run.atomic import write_json
    from scaletrain.run.environment import environment
    from scaletrain.training.workload import build

    run = configuration.load(path, dict(configuration.parse_setting(text) for text in settings))
    if run.compute:
        raise UserError(
            "bench model: compute emulates an accelerator; there are no layers to time (remove it, or --set compute=null)"
        )
    if threads:
        torch.set_num_threads(threads)
    device = torch.device(
        "cuda"
        if run.device == "cuda" or (run.device == "auto" and torch.cuda.is_available())
        else "cpu"
    )
    workload = build(run, device)
    batch = batch or run.batch_size
    pairs = [workload.train[i % len(workload.train)] for i in range(batch)]  # type: ignore[arg-type]
    inputs, targets = (
        torch.stack([torch.as_tensor(pair[i]) for pair in pairs]).to(device) for i in (0, 1)
    )
    measured = time_layers(workload.model, workload.loss, inputs, targets, passes)
    _show(measured, batch, passes, str(device))
    if out:
        write_json(
            out,
            {
                "header": environment()
                | {"config": path.read_text("utf-8"), "batch": batch, "passes": passes},
                **measured,
            },
        )


def time_layers(model: Any, loss: Any, inputs: Any, targets: Any, passes: int) -> dict[str, Any]:
    """Mean seconds of forward and backward of every layer of ``model`` (modules without children, or with weights of their own beside
    them), and of whole passes.

    One warm-up pass. Layers are timed by hooks: a module's forward between its own hooks; its
    backward from when the gradient
    of its output is there until the gradient of its input is. On CUDA each hook waits for the
    device, so layers do not overlap.
    A first layer, whose input needs no gradient, has its backward end with its last weight's
    gradient.
    """
    import time

    import torch
    from torch.utils._pytree import tree_leaves

    def now() -> float:
        if inputs.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(module: Any) -> bool:
        """Layers without layers of their own, and those that have weights beside them."""
        return not any(module.children()) or any(
            p.requires_grad for p in module.parameters(recurse=False)
        )

    leaves = {name or "(model)": module for name, module in model.named_modules() if timed(module)}
    forward, backward = dict.fromkeys(leaves, 0.0), dict.fromkeys(leaves, 0.0)
    activations: Counter[str] = Counter()
    sizes: Counter[str] = Counter()  # of activations, in bytes
    began: dict[str, float] = {}
    handles = []

    def watch(name: str, module: Any) -> None:
        def before(*_: Any) -> None:
            began[name] = now()

        def after(module: Any, args: Any, output: Any) -> None:
            forward[name] += now() - began[name]
            outputs = [value for value in tree_leaves(output) if isinstance(value, torch.Tensor)]
            activations[name] += sum(
                value.numel() for value in outputs
            )  # a layer may be used more than once
            sizes[name] += sum(value.numel() * value.element_size() for value in outputs)
            for value in [value for value in outputs if value.requires_grad][:1]:
                value.register_hook(arrived)

        def arrived(gradient: Any) -> None:
            began[f"back {name}"] = now()

        def left(*_: Any) -> None:
            start = began.get(f"back {name}")
            if start is not None:
                latest[name] = now() - start

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))
        handles.append(module.register_full_backward_hook(left))
        handles.extend(
            p.register_post_accumulate_grad_hook(left)
            for p in module.parameters(recurse=False)
            if p.requires_grad
        )

    latest: dict[str, float] = {}
    for name, module in leaves.items():
        watch(name, module)
    whole = {"forward_s": 0.0, "backward_s": 0.0}
    model.train()
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        # The first layer's input needs no gradient; its backward is timed by its weights' hooks
        # instead.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        for handle in handles:
            stack.callback(handle.remove)
        for index in range(passes + 1):
            if index == 1:  # the first pass only warms up
                for totals in (forward, backward):
                    totals.update(dict.fromkeys(totals, 0.0))
                whole = dict.fromkeys(whole, 0.0)
            model.zero_grad(set_to_none=True)
            for of_pass in (latest, activations, sizes):
                of_pass.clear()
            start = now()
            value = loss(model(inputs), targets)
            middle = now()
            value.backward()
            end = now()
            whole["forward_s"] += middle - start
            whole["backward_s"] += end - middle
            for name, seconds in latest.items():
                backward[name] += seconds
    layers = []
    for name, module in leaves.items():
        parameters = sum(p.numel() for p in module.parameters(recurse=False) if p.requires_grad)
        size = sum(
            p.numel() * p.element_size()
            for p in module.parameters(recurse=False)
            if p.requires_grad
        )
        layers.append(
            {
                "name": name, "type": type(module).__name__, "forward_s": forward[name] / passes, "backward_s": backward[name] / passes,
                "parameters": parameters, "gradient_bytes": size, "activations": activations[name],
            }
        )  # fmt: skip
    weights = sum(layer["gradient_bytes"] for layer in layers)
    data = sum(sizes.values())
    return {
        "layers": layers,
        "forward_s": whole["forward_s"] / passes,
        "backward_s": whole["backward_s"] / passes,
        "weight_bytes": weights,
        "activation_bytes": data,
        "data_to_weight_ratio": data / weights if weights else None,
    }


def _show(measured: dict[str, Any], batch: int, passes: int, device: str) -> None:
    from rich.table import Table

    from scaletrain.scaling.show.publish import terminal

    table = Table(title=f"{passes} passes of {batch} samples on {device}, mean")
    for column in (
        "layer",
        "type",
        "forward ms",
        "backward ms",
        "parameters",
        "activations",
        "gradient kB",
    ):
        table.add_column(column, justify="left" if column in ("layer", "type") else "right")
    for layer in measured["layers"]:
        table.add_row(
            layer["name"], layer["type"], f"{1e3 * layer['forward_s']:.3f}", f"{1e3 * layer['backward_s']:.3f}",
            f"{layer['parameters']:,}", f"{layer['activations']:,}", f"{layer['gradient_bytes'] / 1e3:,.1f}",
        )  # fmt: skip
    console = terminal()
    console.print(table)
    weights, data, ratio = (
        measured["weight_bytes"],
        measured["activation_bytes"],
        measured["data_to_weight_ratio"],
    )
    console.print(
        f"whole passes: forward {1e3 * measured['forward_s']:.2f} ms, backward {1e3 * measured['backward_s']:.2f} ms"
        f" (the hooks' own time included)", highlight=False,
    )  # fmt: skip
    if ratio is not None:
        better = "data parallelism moves less" if ratio > 1 else "model parallelism would move less"
        console.print(
            f"activations |D| {data / 1e6:,.2f} MB, weights |W| {weights / 1e6:,.2f} MB, |D|/|W| = {ratio:.2f}: {better}"
            f" (FireCaffe, section 3)", highlight=False,
        )  # fmt: skip
