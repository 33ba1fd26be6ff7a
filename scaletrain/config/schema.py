"""The keys of a run's YAML file, with their types, ranges and defaults.

The docstring under a key is its description, in the JSON schema for editors as well
(``scaletrain schema``).
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from scaletrain import plugins
from scaletrain.timeouts import LONGEST_S


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Named(BaseModel):
    """A plugin's name and its options, checked against its signature (``plugins.options``)."""

    # Which options there are depends on the plugin: `checks.plugin_options` looks at them later.
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    name: str
    """A name from `scaletrain list`, or `package.module:factory`."""

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set."""
        return dict(self.model_extra or {})


class ParameterGroup(BaseModel):
    """Parameters that are stepped with options of their own, by the patterns of their names."""

    # As for `Named`: which options there are depends on the optimizer.
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    match: Annotated[list[str], Field(min_length=1), BeforeValidator(_as_list)]
    """Patterns of shells (`*`, `?`) for a parameter's name, or for a part of it between dots."""

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from the optimizer's own."""
        return dict(self.model_extra or {})


class Optimizer(Named):
    """An optimizer and its arguments, some of which may differ between parameters."""

    groups: list[ParameterGroup] = []
    """A parameter belongs to the first group that matches. The others have the options above."""


def _as_mapping(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _as_rule(value: Any) -> Any:
    return {"rule": value} if isinstance(value, str) else value


def _as_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _as_skip(value: Any) -> Any:
    if value == "stop":
        return {"skip": 0}
    if isinstance(value, dict | BadSamples):
        return value
    raise ValueError("stop, or the most that are left out, such as {skip: 10}")


def _as_compilation(value: Any) -> Any:
    if value is True:
        return {}
    return None if value is False else value


class Strict(BaseModel):
    """A mapping in which an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class LrScaling(Strict):
    """The optimizer's rate was tuned for another batch: scale it to the batch of this run.

    Sources: linear, Goyal et al. 2017 (arXiv 1706.02677), section 2.1; square root, Krizhevsky 2014
    (arXiv 1404.5997), section 5.
    """

    rule: Literal["linear", "sqrt"] = "linear"
    """linear: times batch / base_batch; sqrt: times the square root of that."""

    base_batch: Annotated[int, Field(ge=1)] = 256
    """Samples a step, of all workers together, for which the rate was tuned."""


class LrSchedule(Strict):
    """The learning rate of optimizer step i of n: Caffe's policies plus cosine, after a warm-up.

    - fixed: lr
    - step: lr gamma^floor(i / step_size)
    - multistep: lr, times gamma at each of the milestones
    - exp: lr gamma^i
    - inv: lr (1 + gamma i)^-power
    - poly: lr (1 - i/n)^power
    - sigmoid: lr / (1 + exp(-gamma (i - step_size)))
    - cosine: lr (1 + cos(pi i/n)) / 2
    """

    name: Literal["fixed", "step", "multistep", "exp", "inv", "poly", "sigmoid", "cosine"] = "fixed"
    """The policy."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises linearly to its value."""

    gamma: float = 0.1
    """The factor of step, multistep, exp, inv and sigmoid."""

    power: float = 1.0
    """The exponent of inv and poly."""

    step_size: Annotated[int, Field(ge=1)] = 1000
    """Steps between two changes (step), or the step in the middle (sigmoid)."""

    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """cosine and poly end at this rate, the other policies fall no lower. It holds for the
    optimizer's first group; the floors of other groups are in proportion to their rates."""

    # Fractions and not steps, so that they stay right when the length of the run changes.
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = []
    """Fractions of the run at which multistep changes."""

    scaling: (
        Annotated[LrScaling, BeforeValidator(_as_rule, json_schema_input_type=str | LrScaling)]
        | None
    ) = None
    """Scale the optimizer's rate to the batch; null: take it as it is."""


def _as_figure(value: Any) -> Any:
    return {"figure": value} if isinstance(value, str) else value


class Figure(Strict):
    """A figure of the evaluations, and whether lower or higher values are better."""

    figure: str
    """As in the summary, such as test_accuracy."""

    mode: Literal["auto", "min", "max"] = "auto"
    """auto: a lower value is better if the figure's name has loss in it, else a higher one."""


class Checkpoint(Strict):
    """When checkpoints are written. There is always one of the last step."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints; null: only the last step."""

    keep: Annotated[int, Field(ge=1)] = 2
    """How many of the newest checkpoints are kept."""

    keep_every: Annotated[int, Field(ge=1)] | None = None
    """Steps: the first checkpoint at or after each multiple of these stays for good."""

    best: (
        Annotated[Figure, BeforeValidator(_as_figure, json_schema_input_type=str | Figure)] | None
    ) = None
    """Also keep the checkpoint with the best value of this figure in an evaluation."""


class InitFrom(Strict):
    """Weights to begin with. A resumed run begins with its checkpoint's weights instead."""

    path: str
    """A safetensors file, a .pt file with a state dict, a checkpoint, or the directory of a run
    (for its newest checkpoint)."""

    ema: bool = False
    """The averages that the callback ema has left in a checkpoint, not the weights."""

    prefix: dict[str, str] = {}
    """Beginnings of names in the file, and their replacements: {"backbone.": "encoder."}."""

    allow_missing: Annotated[list[str], BeforeValidator(_as_list)] = []
    """Patterns for weights that the file may lack, or have in another shape."""

    allow_unexpected: Annotated[list[str], BeforeValidator(_as_list)] = []
    """Patterns for weights that the file may have although the model lacks them."""


class BadSamples(Strict):
    """The policy for samples that cannot be read."""

    skip: Annotated[int, Field(ge=0)]
    """Leave out and count up to so many in a run; 0: the first one ends it."""


class Compute(Strict):
    """An emulated accelerator: a step waits instead of computing; gradients really move."""

    step_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds a step, whatever the batch."""

    sample_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds a sample of the worker's batch."""


class Compilation(Strict):
    """Options of torch.compile."""

    backend: str = "inductor"
    """A backend of torch.compile; `aot_eager` needs no C++ compiler and makes nothing faster."""

    mode: (
        Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None
    ) = None
    """The goal that inductor optimises for."""

    dynamic: bool | None = None
    """true: compile once for all shapes; false: for each; null: torch decides."""


# A name alone is short for a mapping without options.
NameOrOptions = Annotated[Named, BeforeValidator(_as_mapping, json_schema_input_type=str | Named)]
OptimizerOrName = Annotated[
    Optimizer, BeforeValidator(_as_mapping, json_schema_input_type=str | Optimizer)
]
ScheduleOrName = Annotated[
    LrSchedule, BeforeValidator(_as_mapping, json_schema_input_type=str | LrSchedule)
]


SkipOrStop = Annotated[
    BadSamples,
    BeforeValidator(_as_skip, json_schema_input_type=Literal["stop"] | BadSamples),
]


class RunConfig(Strict):
    """One training job."""

    name: str = "run"
    """Names the run directory; default: the file's name."""

    model: NameOrOptions | None = None
    """The model and its options."""

    data: NameOrOptions | None = None
    """The data set and its options."""

    workload: NameOrOptions | None = None
    """`package.module:Class`, in place of model, data and loss: a `scaletrain.Workload`."""

    init_from: (
        Annotated[InitFrom, BeforeValidator(_as_path, json_schema_input_type=str | InitFrom)] | None
    ) = None
    """Weights to begin with: a file or the directory of a run; or a mapping with `path`."""

    freeze: Annotated[list[str], BeforeValidator(_as_list)] = []
    """Patterns of shells for parameters that are not trained, as in the groups of optimizers."""

    loss: NameOrOptions = Named(name="cross_entropy")
    """A loss of `torch.nn.functional` that has a `reduction`, or `package.module:function`; with
    its options, such as `{name: cross_entropy, label_smoothing: 0.1}`."""

    batch_size: Annotated[int, Field(ge=1)]
    """Samples a step, of all workers together (strong) or of each worker (weak)."""

    batch_mode: Literal["strong", "weak"] = "strong"
    """strong: the global batch is fixed, and N workers share it; weak: it grows with N."""

    accumulate: Annotated[int, Field(ge=1)] = 1
    """Backward passes a step. The batch is split over them, not multiplied."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length of the run in passes over the data. Give exactly one of epochs and steps."""

    steps: Annotated[int, Field(ge=1)] | None = None
    """Length of the run in optimizer steps."""

    optimizer: OptimizerOrName | None = None
    """A class of `torch.optim`, in any case, a name from `scaletrain list`, or
    `package.module:Class`, and its arguments; default: sgd with lr 0.1."""

    lr_schedule: ScheduleOrName = LrSchedule()
    """How the learning rate changes in the course of the run."""

    exchange: NameOrOptions = Named(name="native")
    """How gradients travel. `ring` is short for `{name: scheduled, collective: ring}`."""

    launcher: NameOrOptions = Named(name="local")
    """The launcher that starts the workers, and its options."""

    workers: Annotated[int, Field(ge=1)] = 1
    """Number of workers."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if it is available."""

    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """bf16, fp16: forward computes in it where that is safe (autocast); weights stay float32. fp16
    scales the loss, and leaves out steps whose gradient overflows."""

    compile: Annotated[
        Compilation | None,
        BeforeValidator(_as_compilation, json_schema_input_type=bool | Compilation | None),
    ] = None
    """Compile the model with torch.compile: true, or its options."""

    channels_last: bool = False
    """Lay images out with their channels last, which convolutions may compute faster."""

    recompute: Annotated[list[str], BeforeValidator(_as_list)] = []
    """Patterns of modules whose activations are computed again in backward, to save memory."""

    sync_batchnorm: bool = False
    """Normalise batches over the samples of all workers. Under `none` it has no effect."""

    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Compute threads of a worker; auto: its share of the host's cores."""

    loader_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read samples ahead, for each worker."""

    seed: int = 0
    """Of the weights, the order of samples, dropout and augmentation; of any size."""

    evaluate_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations; null: only after the last step."""

    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """The summary says when this accuracy was first reached."""

    metrics: dict[str, NameOrOptions] = {}
    """Figures of the test set by torchmetrics: `{f1: {name: F1Score, task: multiclass,
    num_classes: 10}}` becomes `test_f1`; names, or `package.module:Class`, and their options."""

    callbacks: list[NameOrOptions] = []
    """Callbacks between the parts of each step, in this order: names and their options."""

    nonfinite: Literal["stop", "skip", "roll_back"] = "stop"
    """A loss or gradient that is not finite: stop and say where, leave the step out, or also bring
    the weights back to the newest checkpoint."""

    bad_samples: SkipOrStop = BadSamples(skip=0)
    """A training sample that cannot be read: `stop` and name it, or `{skip: 10}`: leave it out."""

    checkpoint: Checkpoint = Checkpoint()
    """When checkpoints are written."""

    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between progress lines, and between looks for a signal: one a second at least."""

    timeout_s: Annotated[float, Field(gt=0, le=LONGEST_S)] = 60.0
    """A rank without progress for this many seconds is taken as hung. All other limits follow."""

    compute: Compute | None = None
    """Emulate an accelerator. Reports then say "emulated"."""

    trace: bool = False
    """Record buckets, rounds and waits, and each rank's clock, for a Chrome trace."""

    source: str | None = None
    """The file this came from. A person's modules are looked for beside it."""

    @property
    def groups(self) -> int:
        """The number of groups of workers that train a model of their own each."""
        return int(self.exchange.options.get("groups", 1))

    @property
    def leaves_out_samples(self) -> bool:
        """Whether samples that cannot be read are left out."""
        return self.bad_samples.skip > 0

    @property
    def search_path(self) -> Path | None:
        """Where the modules of ``package.module:factory`` are looked for first."""
        # None is a configuration that was made in code: modules come from the working directory.
        return Path(self.source).parent if self.source else None

    def load(self, kind: Literal["model", "data", "workload", "exchange", "launcher"]) -> Any:
        """Import the plugin that this configuration names for a kind; return its factory."""
        return plugins.load(kind, getattr(self, kind).name, self.search_path)

    def to_yaml(self) -> str:
        """Return the configuration as YAML, every default filled in."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
