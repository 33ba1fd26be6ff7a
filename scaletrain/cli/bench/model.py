"""Time each layer of a model, as `caffe time` does, and compare data with weights."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.utils.hooks import RemovableHandle

    from scaletrain.config import RunConfig
    from scaletrain.scaling.predict.layers import ModelTimes


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
    """Time the model of CONFIG layer by layer, on one worker.

    \b
    Example:
      scaletrain bench model examples/digits.yaml --batch 96 --out layers.json
    """
    import torch

    from scaletrain import config as configuration
    from scaletrain.errors import UserError
    from scaletrain.run.environment import environment
    from scaletrain.training.batches import to_device
    from scaletrain.training.feed import first_batch
    from scaletrain.training.workload import build

    run = configuration.load(path, dict(configuration.parse_setting(text) for text in settings))
    if run.compute:
        raise UserError(
            "bench model: compute emulates an accelerator; there are no layers to time"
            " (remove it, or --set compute=null)"
        )
    if threads:
        torch.set_num_threads(threads)
    device = _device(run)
    workload = build(run, device)
    batch = batch or run.batch_size
    inputs = to_device(first_batch(workload.data, batch, run.seed), device)

    def mean_loss() -> "Tensor":
        loss = workload.forward(inputs)
        return loss.total / loss.count

    times = time_layers(workload.model, mean_loss, batch, passes)
    _show(times, passes, str(device))
    if out:
        measured = {"config": path.read_text("utf-8"), "batch": batch, "passes": passes}
        times.write(out, environment() | measured)


def _device(run: "RunConfig") -> Any:
    import torch

    if run.device == "cuda":
        return torch.device("cuda")
    if run.device == "auto" and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


@dataclasses.dataclass
class _Layer:
    """One layer while passes run. Its hooks write here."""

    module: "Module"
    forward_s: float = 0.0  # sum over timed passes
    backward_s: float = 0.0
    # Of the present pass:
    forward_began: float = 0.0
    backward_began: float | None = None  # None: no gradient has arrived
    latest_backward_s: float = 0.0
    activations: int = 0  # numbers in all outputs; a layer may be used more than once
    activation_bytes: int = 0

    def begin_pass(self) -> None:
        """Forget the last pass. A gradient's arrival is kept, as it is always overwritten."""
        self.latest_backward_s = 0.0
        self.activations = 0
        self.activation_bytes = 0


class _Watch:
    """Hooks that time the layers of a model.

    On CUDA each hook waits for the device, so layers do not overlap.
    """

    def __init__(self, model: "Module", is_cuda: bool):
        self._is_cuda = is_cuda
        self._handles: list[RemovableHandle] = []
        self.layers: dict[str, _Layer] = {}
        for name, module in model.named_modules():
            if _is_layer(module):
                self.layers[name or "(model)"] = _Layer(module)

    def now(self) -> float:
        """Return the time, when the device has done its work."""
        import torch

        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Install the hooks, and remove them in the end."""
        try:
            for layer in self.layers.values():
                self._install(layer)
            yield
        finally:
            for handle in self._handles:
                handle.remove()

    def _install(self, layer: _Layer) -> None:
        import torch
        from torch.utils._pytree import tree_leaves

        def before_forward(*_: Any) -> None:
            layer.forward_began = self.now()

        def after_forward(module: Any, inputs: Any, output: Any) -> None:
            layer.forward_s += self.now() - layer.forward_began
            outputs = [value for value in tree_leaves(output) if isinstance(value, torch.Tensor)]
            for value in outputs:
                layer.activations += value.numel()
                layer.activation_bytes += value.numel() * value.element_size()
            with_gradient = [value for value in outputs if value.requires_grad]
            if with_gradient:
                with_gradient[0].register_hook(gradient_arrived)

        def gradient_arrived(gradient: Any) -> None:
            layer.backward_began = self.now()

        def gradient_left(*_: Any) -> None:
            if layer.backward_began is not None:
                layer.latest_backward_s = self.now() - layer.backward_began

        module = layer.module
        self._handles.append(module.register_forward_pre_hook(before_forward))
        self._handles.append(module.register_forward_hook(after_forward))
        self._handles.append(module.register_full_backward_hook(gradient_left))
        for parameter in _weights(module):
            self._handles.append(parameter.register_post_accumulate_grad_hook(gradient_left))


def _is_layer(module: "Module") -> bool:
    """Return True for a module without modules inside, or with weights beside them."""
    return not any(module.children()) or bool(_weights(module))


def _weights(module: "Module") -> list[Any]:
    """Return a module's own trained parameters, without its inner modules."""
    return [p for p in module.parameters(recurse=False) if p.requires_grad]


def time_layers(
    model: "Module", loss: Callable[[], "Tensor"], batch: int, passes: int
) -> "ModelTimes":
    """Return the mean seconds of forward and backward, of every layer and of whole passes.

    One pass warms up. A layer's forward lasts from one hook of its module to the next. Its backward
    begins when its output's gradient arrives, and ends when its input's gradient does. The input of
    a first layer needs no gradient: its backward ends with the gradient of its last weight.

    Args:
        model: layers are its modules without children, or with weights of their own beside them.
        loss: calls the model with the same batch each time, and returns the mean loss.
        batch: samples of one pass.
        passes: how many are timed.
    """
    from scaletrain.scaling.predict.layers import ModelTimes

    watch = _Watch(model, next(model.parameters()).is_cuda)
    forward_s = 0.0
    backward_s = 0.0
    model.train()
    with warnings.catch_warnings(), watch.hooked():
        # The first layer's input needs no gradient; its weights' hooks time its backward instead.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        for index in range(passes + 1):
            model.zero_grad(set_to_none=True)
            for layer in watch.layers.values():
                layer.begin_pass()
            began = watch.now()
            value = loss()
            middle = watch.now()
            value.backward()
            ended = watch.now()
            if index == 0:  # the first pass only warms up
                for layer in watch.layers.values():
                    layer.forward_s = 0.0
                continue
            forward_s += middle - began
            backward_s += ended - middle
            for layer in watch.layers.values():
                layer.backward_s += layer.latest_backward_s
    layers = [_times(name, layer, passes) for name, layer in watch.layers.items()]
    return ModelTimes(
        batch=batch,
        layers=layers,
        forward_s=forward_s / passes,
        backward_s=backward_s / passes,
        weight_bytes=sum(layer.gradient_bytes for layer in layers),
        activation_bytes=sum(layer.activation_bytes for layer in watch.layers.values()),
    )


def _times(name: str, layer: _Layer, passes: int) -> Any:
    from scaletrain.scaling.predict.layers import LayerTimes

    weights = _weights(layer.module)
    return LayerTimes(
        name=name,
        type=type(layer.module).__name__,
        forward_s=layer.forward_s / passes,
        backward_s=layer.backward_s / passes,
        parameters=sum(weight.numel() for weight in weights),
        gradient_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        activations=layer.activations,
    )


def _show(times: "ModelTimes", passes: int, device: str) -> None:
    """Print a table of the layers, and data beside weights."""
    from rich.table import Table

    from scaletrain.scaling.show.publish import terminal

    table = Table(title=f"{passes} passes of {times.batch} samples on {device}, mean")
    table.add_column("layer")
    table.add_column("type")
    figures = (
        "forward ms", "backward ms", "parameters", "activations", "gradient kB",
    )  # fmt: skip
    for column in figures:
        table.add_column(column, justify="right")
    for layer in times.layers:
        table.add_row(
            layer.name,
            layer.type,
            f"{1e3 * layer.forward_s:.3f}",
            f"{1e3 * layer.backward_s:.3f}",
            f"{layer.parameters:,}",
            f"{layer.activations:,}",
            f"{layer.gradient_bytes / 1e3:,.1f}",
        )
    console = terminal()
    console.print(table)
    console.print(
        f"whole passes: forward {1e3 * times.forward_s:.2f} ms,"
        f" backward {1e3 * times.backward_s:.2f} ms (the hooks' own time included)",
        highlight=False,
    )
    ratio = times.data_to_weight_ratio
    if ratio is not None:
        better = "data parallelism moves less" if ratio > 1 else "model parallelism would move less"
        console.print(
            f"activations |D| {times.activation_bytes / 1e6:,.2f} MB,"
            f" weights |W| {times.weight_bytes / 1e6:,.2f} MB, |D|/|W| = {ratio:.2f}: {better}"
            " (FireCaffe, section 3)",
            highlight=False,
        )
