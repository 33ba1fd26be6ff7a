"""The keys of a recipe's YAML file, and the trainings that it stands for.

The docstring under a key is its description.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from scaletrain import config as configuration
from scaletrain.config import RunConfig, yaml
from scaletrain.config.checks import validate
from scaletrain.config.grammar import set_key
from scaletrain.config.schema import Strict
from scaletrain.errors import unknown

_FOLDER = Path(__file__).parent
# ${teacher} in a setting is the run directory of the variant `teacher` with the same seed.
_REFERENCE = re.compile(r"\$\{([\w-]+)\}")

Scale = Literal["tiny", "small", "full"]


class Claim(Strict):
    """A figure of one variant, alone or beside that of another, and its limits."""

    says: str
    """The claim in a sentence."""

    figure: str = "test_error"
    """A figure of the run's summary, such as test_loss; test_error is 1 - test_accuracy."""

    of: str
    """The variant that the claim is about."""

    to: str | None = None
    """The variant that it is compared with; null: the figure stands by itself."""

    by: Literal["ratio", "difference"] = "ratio"
    """The figure divided by that of `to`, or less it. Seeds are compared in pairs."""

    at_least: float | None = None
    """The claim is met if the whole 95 % interval lies at or above this."""

    at_most: float | None = None
    """The claim is met if the whole 95 % interval lies at or below this."""

    scales: list[Scale] = ["small", "full"]
    """The scales at which the claim is judged."""

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a claim with at_least, at_most or both")
        return self


class Form(Strict):
    """The recipe at another scale than `small`."""

    job: dict[str, Any] = {}
    """Changes of the job by dotted key, as with --set."""

    variants: list[str] | dict[str, dict[str, Any]] | None = None
    """The variants that are trained, by name, or with other changes than at `small`; null: all."""

    seeds: Annotated[int, Field(ge=1)] | None = None
    """Trainings of each variant; null: as many as at `small`."""


class Recipe(Strict):
    """A paper's claim as trainings of variants, and rules for their figures."""

    title: str
    """The paper's subject in a few words."""

    source: str
    """Authors, year, and where the paper is to be found."""

    setting: str
    """What the paper shows, and what stands for it here."""

    job: dict[str, Any]
    """A run, as in its own YAML file."""

    variants: dict[str, dict[str, Any]]
    """Changes of the job by dotted key, by the variant's name, in the order of training."""

    claims: Annotated[list[Claim], Field(min_length=1)]
    """Written down before the recipe is run."""

    seeds: Annotated[int, Field(ge=1)] = 3
    """Trainings of each variant, with the seeds 0, 1, ..."""

    forms: dict[Literal["tiny", "full"], Form] = {}
    """The scales beside `small`: tiny tests the machinery in seconds, full is the paper's own."""

    name: str
    """Of the file."""

    path: Path
    """The file."""

    def form(self, scale: str) -> Form:
        """Return the changes of a scale.

        Raises:
            UserError: the recipe has no such scale.
        """
        if scale == "small":
            return Form()
        for name, form in self.forms.items():
            if name == scale:
                return form
        raise unknown(f"{self.name}: scale", scale, ["small", *self.forms])

    def variant_names(self, scale: str) -> list[str]:
        """Return the names of the variants at a scale, in the order of training."""
        return list(self.form(scale).variants or self.variants)

    def num_seeds(self, scale: str) -> int:
        """Return how often each variant is trained at a scale."""
        return self.form(scale).seeds or self.seeds

    def claims_at(self, scale: str) -> list[Claim]:
        """Return the claims that are judged at a scale."""
        return [claim for claim in self.claims if scale in claim.scales]

    def run_config(
        self,
        variant: str,
        *,
        scale: str = "small",
        settings: Mapping[str, Any] | None = None,
        run_dirs: Mapping[str, Path] | None = None,
    ) -> RunConfig:
        """Return the configuration of a variant's training.

        Args:
            variant: its name.
            scale: of the recipe.
            settings: by dotted key. They are weaker than the variant's own, stronger than the job.
            run_dirs: of the variants before it, for references to them.

        Raises:
            UserError: the job, a variant or a setting has a mistake.
        """
        tree = copy.deepcopy(self.job)
        tree["name"] = f"{self.name}-{variant}"
        tree["source"] = str(self.path)
        form = self.form(scale)
        own = self.variants[variant]
        if isinstance(form.variants, dict):
            own = form.variants[variant]
        changes = {**form.job, **(settings or {}), **own}
        for key, value in changes.items():
            set_key(tree, key, self._with_run_dirs(value, variant, run_dirs))
        return configuration.check(tree, f"{self.path}: {variant}")

    def _with_run_dirs(self, value: Any, variant: str, run_dirs: Mapping[str, Path] | None) -> Any:
        """Return a setting with run directories in place of ``${variant}``."""
        if isinstance(value, dict):
            return {k: self._with_run_dirs(v, variant, run_dirs) for k, v in value.items()}
        if isinstance(value, list):
            return [self._with_run_dirs(part, variant, run_dirs) for part in value]
        if not isinstance(value, str):
            return value

        def directory(match: re.Match[str]) -> str:
            names = list(self.variants)
            earlier = names[: names.index(variant)]
            if match[1] not in earlier:
                raise unknown(f"{self.path}: {variant}: {match[0]}", match[1], earlier)
            return str((run_dirs or {}).get(match[1], match[0]))

        return _REFERENCE.sub(directory, value)


def names() -> list[str]:
    """Return the names of the recipes in alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load(name: str) -> Recipe:
    """Read and check a recipe.

    Args:
        name: of a recipe here, or the path of a person's own file.

    Raises:
        UserError: there is no such recipe, or it has a mistake.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = _FOLDER / f"{name}.yaml"
        if name not in names():
            raise unknown("recipe", name, names())
    tree = yaml.read(path)
    recipe = validate(Recipe, tree | {"name": path.stem, "path": path.resolve()}, str(path))
    _check_names(recipe)
    return recipe


def _check_names(recipe: Recipe) -> None:
    """Raise ``UserError`` if a claim or a form names a variant that does not exist."""

    def check(key: str, variant: str | None, allowed: Sequence[str]) -> None:
        if variant is not None and variant not in allowed:
            raise unknown(f"{recipe.path}: {key}", variant, allowed)

    for key, form in recipe.forms.items():
        for variant in form.variants or ():
            check(f"forms.{key}.variants", variant, list(recipe.variants))
    for index, claim in enumerate(recipe.claims):
        for scale in claim.scales:
            # A claim's default names scales that the recipe may lack.
            if scale == "small" or scale in recipe.forms:
                allowed = recipe.variant_names(scale)
                check(f"claims[{index}].of", claim.of, allowed)
                check(f"claims[{index}].to", claim.to, allowed)
