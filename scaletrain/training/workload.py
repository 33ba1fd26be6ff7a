"""The parts of a training job that do not know about workers, the same on every rank.

``workload: package.module:Class`` in the YAML names a person's own ``Workload``. Without it the
job is ``Supervised``: ``model``, ``data``, ``loss`` and ``optimizer`` of the YAML.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, TensorDataset

from scaletrain.config import RunConfig
from scaletrain.errors import UserError
from scaletrain.training import loss_function, metrics, optimizer, patterns
from scaletrain.training.compiling import compile_in_place
from scaletrain.training.joint_optimizer import JointOptimizer
from scaletrain.training.metrics import Collected
from scaletrain.training.randomness import seed_generators, seed_of
from scaletrain.training.recompute import recompute
from scaletrain.training.stream import is_stream

if TYPE_CHECKING:
    from torchmetrics import Metric

_MANY_CLASSES = 20  # from which on the five likeliest are a figure, too
IGNORED = -100  # torch's default for ``ignore_index``: a target that counts for nothing


@dataclasses.dataclass(frozen=True, slots=True)
class Mean:
    """A mean as a total and a count, so that means over batches and ranks are exact."""

    total: Tensor | float
    count: Tensor | float


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a batch as a total and a count.

    A step follows the gradient of (sum of all totals) / (sum of all counts), over ranks and
    backward passes, however many of the tokens or boxes each of them has.
    """

    total: Tensor  # scalar, with a gradient
    count: Tensor | float  # samples, tokens, boxes, ...
    parts: Mapping[str, Tensor] = dataclasses.field(
        default_factory=dict
    )  # totals over the same count, for records


class Data(NamedTuple):
    """The data of a job, the same on every rank."""

    # Each a data set with [index] and len(), or a stream: any object with __iter__.
    train: Any
    test: Any
    collate: Callable[[list[Any]], Any] | None = None  # samples -> batch; None: torch's default


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """One of the updates that make up a step, where several models train together."""

    model: str  # the workload's attribute that holds it
    optimizer: torch.optim.Optimizer  # over its parameters
    forward: Callable[[Any], Loss]  # the loss of a batch, whose gradient it follows


class Workload:
    """A training job: derive from it, set the attributes in ``__init__``, write ``forward``.

    A batch is any tree of tensors: a tensor, or tuples, lists and dicts of trees. The trainer moves
    it to the device.

    Attributes:
        model: on the CPU at first; the trainer moves it. While it trains, the trainer puts the
            exchange's module here, so that backward exchanges gradients. Call it and nothing else.
        module: the model itself, whatever ``model`` is: for its attributes and methods. The trainer
            sets it.
        data: training and test set.
        optimizer: over all of the model's parameters that are trained. Left out: the YAML's
            ``optimizer``.
        metrics: torchmetrics, or ``metrics.Collected``, by the names of their figures. ``evaluate``
            updates them; the trainer resets them, and joins them over all ranks.
        updates: for several models with an optimizer each, such as a GAN: the updates of a step, in
            their order. ``model``, ``optimizer`` and ``forward`` are then left out; ``model``
            becomes a ``ModuleDict`` of all, for checkpoints. While one is updated, the others are
            frozen, and gradients flow through them.

    Example:
        .. code-block:: python

            class Translate(Workload):
                def __init__(self, *, width: int = 64):
                    self.model = Translator(width)
                    self.data = Data(*sentences(), collate=pad)

                def count(self, batch):
                    return (batch["target"] != PAD).sum()

                def forward(self, batch):
                    output = self.model(batch["source"])
                    losses = cross_entropy(output, batch["target"], reduction="none")
                    total = losses[batch["target"] != PAD].sum()
                    return Loss(total, self.count(batch))
    """

    model: nn.Module
    module: nn.Module
    data: Data
    optimizer: torch.optim.Optimizer
    metrics: "Mapping[str, Metric | Collected]" = types.MappingProxyType({})
    updates: Sequence[Update] = ()

    def forward(self, batch: Any) -> Loss:
        """Return the loss of a batch, in training and in evaluation.

        Its total is a sum, never a mean: the trainer divides by the count of all ranks. With
        ``updates``, it is by default the sum of their losses, and each of them is a part.
        """
        if not self.updates:
            raise NotImplementedError(f"{type(self).__name__} has no forward(batch) -> Loss")
        losses = {update.model: update.forward(batch) for update in self.updates}
        total = torch.stack([loss.total for loss in losses.values()]).sum()
        parts: dict[str, Tensor] = {}
        for name, loss in losses.items():
            parts[name] = loss.total
            parts |= loss.parts
        return Loss(total, loss.count, parts)

    def count(self, batch: Any) -> Tensor | float:
        """Return the count of a batch's loss, if its mean is not over samples.

        It is asked before ``forward``: counts travel to the other ranks while that runs. It must be
        the count that ``forward`` returns for this batch.
        """
        raise NotImplementedError("the mean is over samples")

    @property
    def counts_samples(self) -> bool:
        """Whether the mean is over samples: every rank knows the count of all ranks beforehand."""
        return type(self).count is Workload.count

    def evaluate(self, batch: Any) -> dict[str, Mean]:
        """Return the figures of a test batch by name; the same names for every batch.

        Override it for figures of your own, in place of the loss and its parts. It runs without
        gradients. ``target_accuracy`` looks at the figure ``accuracy``.
        """
        loss = self.forward(batch)
        figures = {"loss": Mean(loss.total, loss.count)}
        for name, total in loss.parts.items():
            figures[name] = Mean(total, loss.count)
        return figures


class Supervised(Workload):
    """The simple job: batches are (input, target), and a function compares output and target.

    A model with auxiliary heads returns a tuple of outputs in training, its own first, and has an
    attribute ``loss_weights`` with as many numbers. Its loss is the sum of their losses, each times
    its weight, and the records hold each of them.

    Args:
        model: a sample's output must not depend on its neighbours, or N workers differ from one.
        loss: (output, target) -> scalar, the mean over the batch.
        data: of (input, target) samples.
        sums: the loss as (output, target) -> sum over the targets that are not ignored, if it is
            one of torch's that ignores targets.
        ignored: a target that counts for nothing.

    Attributes:
        terms: further parts of the training loss, by name, such as those of callbacks: (input,
            output, target) -> sum over what ``count`` counts.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        data: Data,
        sums: Callable[[Tensor, Tensor], Tensor] | None = None,
        ignored: int = IGNORED,
    ):
        self.model = model
        self.loss = loss
        self.data = data
        self._sums = sums
        self._ignored = ignored
        self._loss_weights: Sequence[float] = getattr(model, "loss_weights", ())
        self.terms: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {}
        self._counts_samples = sums is None or _has_one_class_a_sample(data.train, ignored)

    @property
    def counts_samples(self) -> bool:
        """Whether no target is ignored, as far as that is known without reading all data."""
        return self._counts_samples

    def count(self, batch: Any) -> Tensor | float:
        """Return the number of targets that are not ignored."""
        _, targets = _pair(batch)
        return self._count(targets)

    def forward(self, batch: Any) -> Loss:
        """Return the loss of a batch of (input, target)."""
        inputs, targets = _pair(batch)
        output = self.model(inputs)
        loss = self._loss_of(output, targets)
        if not self.terms:
            return loss
        main = output[0] if isinstance(output, tuple) else output
        parts = {"labels": loss.total, **loss.parts}
        for name, term in self.terms.items():
            parts[name] = term(inputs, _in_full_precision(main), targets)
        total = loss.total + torch.stack([parts[name] for name in self.terms]).sum()
        return Loss(total, loss.count, parts)

    def evaluate(self, batch: Any) -> dict[str, Mean]:
        """Return ``loss``, and ``accuracy`` if the targets are classes.

        With many classes also ``top5_accuracy``: the part whose class is among the five likeliest.
        """
        inputs, targets = _pair(batch)
        output = self.model(inputs)
        loss = self._loss_of(output, targets)
        figures = {"loss": Mean(loss.total, loss.count)}
        for metric in self.metrics.values():
            metric.update(_in_full_precision(output), targets)
        are_classes = isinstance(output, Tensor) and not targets.is_floating_point()
        if are_classes and output.ndim == targets.ndim + 1:
            judged = targets != self._ignored
            right = (output.argmax(1) == targets) & judged
            figures["accuracy"] = Mean(right.sum(), judged.sum())
            if output.shape[1] >= _MANY_CLASSES:
                ranked = output.topk(5, dim=1).indices
                near = (ranked == targets.unsqueeze(1)).any(1) & judged
                figures["top5_accuracy"] = Mean(near.sum(), judged.sum())
        return figures

    def _loss_of(self, output: Any, targets: Tensor) -> Loss:
        if not self._loss_weights or not isinstance(output, tuple):
            return self._loss_of_one(output, targets)
        if len(output) != len(self._loss_weights):
            raise UserError(
                f"model: returns {len(output)} outputs in training, and its loss_weights has"
                f" {len(self._loss_weights)} (allowed: a weight for each output)"
            )
        losses = [self._loss_of_one(each, targets) for each in output]
        weighted = [
            weight * loss.total for weight, loss in zip(self._loss_weights, losses, strict=True)
        ]
        parts = {f"output_{index}": loss.total for index, loss in enumerate(losses)}
        return Loss(torch.stack(weighted).sum(), losses[0].count, parts)

    def _loss_of_one(self, output: Any, targets: Tensor) -> Loss:
        output = _in_full_precision(output)
        if self._sums is None or targets.is_floating_point():
            # A mean over elements is one over samples: they have as many elements each.
            mean = self.loss(output, targets).reshape(())
            return Loss(mean * len(targets), len(targets))
        return Loss(self._sums(output, targets), self._count(targets))

    def _count(self, targets: Tensor) -> Tensor | float:
        if self._counts_samples or targets.is_floating_point():  # none is ignored
            return len(targets)
        return (targets != self._ignored).sum()


def build(config: RunConfig, device: torch.device, group: int = 0) -> Workload:
    """Build the job's parts. Seeds come first, so every rank starts from the same weights.

    A data set that is drawn at random is the same on every rank, too.

    Args:
        config: of the run.
        device: where the model will lie.
        group: of this worker. Each group's model begins with weights of its own.

    Raises:
        UserError: a name does not exist, the optimizer has no such option, or a factory returns
            something else than it should.
    """
    # torch takes 64 bits; for a seed that fits, the weights are those of ``torch.manual_seed``.
    seed = config.seed % 2**64
    torch.manual_seed(seed)  # of all devices
    seed_generators(seed)  # also those of ``random`` and numpy
    workload = _users_own(config) if config.workload else _supervised(config)
    if group:
        torch.manual_seed(seed_of(config.seed, "group", group))
        workload.model = _model(config)
    _check_data(workload.data)
    _freeze(workload.model, config.freeze)
    _check_trainable(workload.model)
    model = workload.model.to(device)
    recompute(model, config.recompute)
    called = [getattr(workload, update.model) for update in workload.updates] or [model]
    for each in called:
        if config.channels_last:
            _lay_channels_last(each)
        if config.compile is not None:
            compile_in_place(each, config.compile)
    if config.compute and workload.updates:
        raise UserError("compute: emulates one model (allowed: a workload without updates)")
    if config.compute:
        from scaletrain.training.emulation import emulate

        workload.model = emulate(model, config.compute.step_s, config.compute.sample_s)
    if getattr(workload, "optimizer", None) is None:
        # Of the model itself: an emulated one has other names for the same parameters.
        workload.optimizer = optimizer.build(config, model)
    elif config.optimizer is not None:
        raise UserError(
            "optimizer: the workload sets self.optimizer, so the configuration's would count for"
            " nothing (remove one of them)"
        )
    _check_optimizer(workload)
    return workload


def _users_own(config: RunConfig) -> Workload:
    assert config.workload is not None
    name = config.workload.name
    loaded = config.load("workload")
    if not isinstance(loaded, type) or not issubclass(loaded, Workload):
        kind = "class" if isinstance(loaded, type) else type(loaded).__name__
        raise UserError(
            f"workload: {name} is a {kind} (allowed: a class that derives from scaletrain.Workload)"
        )
    made = loaded(**config.workload.options)
    if made.updates:
        _join_models(made, name)
    if not isinstance(getattr(made, "model", None), nn.Module):
        raise UserError(f"workload: {name} sets no self.model in __init__ (a torch.nn.Module)")
    if not isinstance(getattr(made, "data", None), Data):
        raise UserError(f"workload: {name} sets no self.data in __init__ (a scaletrain.Data)")
    return made


def _join_models(workload: Workload, name: str) -> None:
    """Give a workload with several models the one model and optimizer that checkpoints hold.

    Raises:
        UserError: an update names no model, or two name the same, or share a parameter.
    """
    models = nn.ModuleDict()
    owners: dict[int, str] = {}  # of parameters
    for update in workload.updates:
        model = getattr(workload, update.model, None)
        if not isinstance(model, nn.Module) or update.model in models:
            raise UserError(
                f"workload: {name}: an update of {update.model!r} (allowed: an attribute of the"
                " workload that is a torch.nn.Module, in one update)"
            )
        for parameter in model.parameters():
            other = owners.setdefault(id(parameter), update.model)
            if other != update.model:
                raise UserError(
                    f"workload: {name}: {other} and {update.model} share a parameter, which two"
                    " optimizers would step (allowed: models of their own)"
                )
        models[update.model] = model
    workload.model = models
    workload.optimizer = JointOptimizer({each.model: each.optimizer for each in workload.updates})


def _lay_channels_last(model: nn.Module) -> None:
    """Lay out weights and inputs of 4 dimensions with their channels last."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.register_forward_pre_hook(_channels_last, with_kwargs=True)


def _channels_last(
    module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, Any]:
    def lay(leaf: Any) -> Any:
        is_image = isinstance(leaf, Tensor) and leaf.dim() == 4
        return leaf.contiguous(memory_format=torch.channels_last) if is_image else leaf

    return pytree.tree_map(lay, (arguments, options))


def _model(config: RunConfig) -> nn.Module:
    assert config.model is not None
    model = config.load("model")(**config.model.options)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model: {config.model.name} returned a {type(model).__name__}, not a torch.nn.Module"
        )
    return model


def _supervised(config: RunConfig) -> Supervised:
    assert config.model is not None and config.data is not None
    # The model comes first: no random number that the data draws may change its weights.
    model = _model(config)
    datasets = config.load("data")(**config.data.options)
    if not isinstance(datasets, Data):
        is_pair = isinstance(datasets, tuple) and len(datasets) == 2
        if not is_pair:
            raise UserError(
                f"data: {config.data.name} must return two data sets, (train, test), or a"
                " scaletrain.Data"
            )
        datasets = Data(*datasets)
    loss = loss_function.mean_loss(config)
    sums = loss_function.ignoring_sum(config)
    ignored = config.loss.options.get("ignore_index", IGNORED)
    supervised = Supervised(model, loss, datasets, sums, ignored)
    supervised.metrics = metrics.build(config)
    return supervised


def _check_data(data: Data) -> None:
    for name, dataset in (("training", data.train), ("test", data.test)):
        # torch's base class has [index] and no len(), also where nothing can be indexed.
        has_index = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not has_index and not is_stream(dataset):
            raise UserError(
                f"data: the {name} set is a {type(dataset).__name__} (allowed: a data set with"
                " [index] and len(), or a stream with __iter__)"
            )
    if data.train is data.test and is_stream(data.train):
        raise UserError(
            "data: the training and the test set are one stream, which an evaluation would move"
            " (allowed: an object for each)"
        )


def _freeze(model: nn.Module, frozen: Sequence[str]) -> None:
    """Leave the parameters that a pattern matches as they are."""
    named = dict(model.named_parameters())
    patterns.check(frozen, [*named], "freeze")
    for name, parameter in named.items():
        if any(patterns.matches(pattern, name) for pattern in frozen):
            parameter.requires_grad_(False)


def _check_trainable(model: nn.Module) -> None:
    parameters = [*model.parameters()]
    if not parameters:
        raise UserError("model: has no parameters, so there is nothing to train")
    if any(isinstance(parameter, UninitializedParameter) for parameter in parameters):
        raise UserError(
            "model: a lazy module does not know its shapes yet; let the factory call the model once"
            " with an input before it returns it"
        )
    if not any(parameter.requires_grad for parameter in parameters):
        raise UserError("model: no parameter is trained: none has requires_grad, or freeze has all")


def _check_optimizer(workload: Workload) -> None:
    """Raise ``UserError`` unless the optimizer trains the whole model and nothing else."""
    if not isinstance(workload.optimizer, torch.optim.Optimizer):
        raise UserError(
            f"workload: self.optimizer is a {type(workload.optimizer).__name__} (allowed: a"
            " torch.optim.Optimizer, such as AdamW(groups, lr=0.001))"
        )
    if isinstance(workload.optimizer, torch.optim.LBFGS):
        raise UserError(
            "optimizer: lbfgs calls the model several times a step, which an exchange cannot follow"
            " (allowed: an optimizer whose step() takes no closure)"
        )
    names = {id(parameter): name for name, parameter in workload.model.named_parameters()}
    stepped: set[int] = set()
    for group in workload.optimizer.param_groups:
        stepped.update(map(id, group["params"]))
    if not stepped <= names.keys():
        raise UserError(
            "optimizer: steps parameters that are not self.model's, so the model would not be"
            " trained (build it from self.model.parameters())"
        )
    for parameter in workload.model.parameters():
        if parameter.requires_grad and id(parameter) not in stepped:
            raise UserError(
                f"optimizer: {names[id(parameter)]} is in none of its groups (put it into one, or"
                " freeze it with requires_grad_(False))"
            )
    for name, value in vars(workload).items():
        if not isinstance(value, nn.Module) or value is workload.model:
            continue
        # Frozen ones need neither: a teacher's come from its own run.
        trained = {id(each) for each in value.parameters() if each.requires_grad}
        if not trained <= names.keys():
            raise UserError(
                f"workload: self.{name} has parameters outside self.model: they would be neither"
                " exchanged nor saved (make it a part of self.model, or freeze it with"
                " requires_grad_(False))"
            )


def _in_full_precision(output: Any) -> Any:
    """Return a model's output in float32: half precision is too coarse to add up losses."""
    is_coarse = isinstance(output, Tensor) and output.dtype in (torch.bfloat16, torch.float16)
    return output.float() if is_coarse else output


def _pair(batch: Any) -> tuple[Any, Tensor]:
    """Return the input and the target of a batch."""
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    if is_pair and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise UserError(
        f"data: a batch is a {type(batch).__name__}, not (input, target)"
        " (workload: package.module:Class trains on batches of any form)"
    )


def _has_one_class_a_sample(dataset: Dataset, ignored: int) -> bool:
    """Return True if it is known that each sample has one target, and that none is ignored."""
    if not isinstance(dataset, TensorDataset):
        return False
    targets = dataset.tensors[-1]
    return targets.is_floating_point() or (targets.ndim == 1 and not (targets == ignored).any())
