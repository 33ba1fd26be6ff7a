"""What a run is: the keys of its YAML file, with their types, ranges and defaults."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from scaletrain import plugins


class Named(BaseModel):
    """A plugin's name and its options. The options are checked against the plugin's signature (``plugins.options``)."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


NameOrOptions = Annotated[Named, BeforeValidator(_named)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LrSchedule(Strict):
    """The learning rate of optimizer step i of n, Caffe's policies plus cosine, after a linear warm-up.

    ``fixed``; ``step`` lr gamma^floor(i/step_size); ``multistep`` gamma at each milestone (fractions of the run); ``exp`` lr gamma^i;
    ``inv`` lr (1 + gamma i)^-power; ``poly`` lr (1 - i/n)^power; ``sigmoid`` lr / (1 + exp(-gamma (i - step_size))); ``cosine``.
    """

    name: Literal["fixed", "step", "multistep", "exp", "inv", "poly", "sigmoid", "cosine"] = "fixed"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    gamma: float = 0.1
    power: float = 1.0
    step_size: Annotated[int, Field(ge=1)] = 1000
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = []


class Checkpoint(Strict):
    every_steps: Annotated[int, Field(ge=1)] | None = None  # None: only the last step
    keep: Annotated[int, Field(ge=1)] = 2


class Compute(Strict):
    """An emulated accelerator: the step waits this long instead of computing, gradients of the true sizes really move."""

    step_s: Annotated[float, Field(ge=0)] = 0.0  # seconds a step, whatever the batch
    sample_s: Annotated[float, Field(ge=0)] = 0.0  # seconds a sample of the worker's batch


class RunConfig(Strict):
    """One training job. See docs/configuration.md for each key."""

    name: str = "run"
    model: NameOrOptions
    data: NameOrOptions
    loss: str = "cross_entropy"
    batch_size: Annotated[int, Field(ge=1)]
    batch_mode: Literal["strong", "weak"] = (
        "strong"  # strong: batch_size is global and fixed; weak: it is each worker's
    )
    accumulate: Annotated[int, Field(ge=1)] = (
        1  # backward passes a step; the batch is split over them, not multiplied
    )
    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None  # exactly one of epochs and steps
    optimizer: NameOrOptions = Named(name="sgd", lr=0.1)  # type: ignore[call-arg]
    lr_schedule: Annotated[LrSchedule, BeforeValidator(_named)] = LrSchedule()
    exchange: NameOrOptions = Named(name="native")
    launcher: NameOrOptions = Named(name="local")
    workers: Annotated[int, Field(ge=1)] = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = (
        "auto"  # a worker's; auto: its share of the cores
    )
    loader_workers: Annotated[int, Field(ge=0)] = 0
    seed: int = 0
    evaluate_every: Annotated[int, Field(ge=1)] | None = None  # steps; None: only after the last
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = (
        None  # the run notes when it is first reached
    )
    checkpoint: Checkpoint = Checkpoint()
    log_every: Annotated[int, Field(ge=1)] = 10
    timeout_s: Annotated[float, Field(gt=0)] = (
        60.0  # a rank without progress for this long is taken as hung
    )
    compute: Compute | None = None
    trace: bool = (
        False  # record buckets, rounds and waits, and each rank's clock, for a Chrome trace
    )
    source: str | None = None  # file this came from; user modules are looked for beside it

    @property
    def search_path(self) -> Path | None:
        """Where ``package.module:factory`` names are looked for first."""
        return Path(self.source).parent if self.source else None

    def load(self, kind: Literal["model", "data", "exchange", "launcher"]) -> Any:
        """Import the plugin that this config names for a kind; returns its factory."""
        return plugins.load(kind, getattr(self, kind).name, self.search_path)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
