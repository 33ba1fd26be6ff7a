"""How long each layer of a model takes: written by ``bench model``, read by ``simulate``."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from scaletrain.errors import UserError
from scaletrain.run.atomic import write_json


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """One layer. Times are means of a pass, in seconds."""

    name: str  # as in the model's ``named_modules``
    type: str
    forward_s: float
    backward_s: float
    parameters: int  # of its own, without those of layers inside it
    gradient_bytes: int
    activations: int  # elements of its outputs


@dataclasses.dataclass(frozen=True)
class ModelTimes:
    """The layers of a model, in the order of forward, and whole passes.

    Attributes:
        batch: samples of a pass.
        layers: each layer.
        forward_s: of a whole pass, including the measurement's own overhead.
        backward_s: likewise.
        weight_bytes: of all layers' weights, and so of their gradients.
        activation_bytes: of all layers' outputs.
    """

    batch: int
    layers: list[LayerTimes]
    forward_s: float
    backward_s: float
    weight_bytes: int
    activation_bytes: int

    @property
    def pass_s(self) -> float:
        """Seconds of forward and backward."""
        return self.forward_s + self.backward_s

    @property
    def data_to_weight_ratio(self) -> float | None:
        """|D|/|W| of FireCaffe, section 3; None for a model without weights."""
        if not self.weight_bytes:
            return None
        return self.activation_bytes / self.weight_bytes

    def write(self, path: Path, header: Mapping[str, object]) -> None:
        """Write the times as JSON.

        Args:
            path: the file.
            header: the machine and the model, for readers.
        """
        write_json(
            path,
            {
                "header": {**header, "batch": self.batch},
                "layers": [dataclasses.asdict(layer) for layer in self.layers],
                "forward_s": self.forward_s,
                "backward_s": self.backward_s,
                "weight_bytes": self.weight_bytes,
                "activation_bytes": self.activation_bytes,
                # For people: ``read`` does not need it, since it follows from the two above.
                "data_to_weight_ratio": self.data_to_weight_ratio,
            },
        )

    @classmethod
    def read(cls, path: Path) -> "ModelTimes":
        """Read a file that ``write`` has written.

        Raises:
            UserError: it is some other file.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                batch=value["header"]["batch"],
                layers=[LayerTimes(**layer) for layer in value["layers"]],
                forward_s=value["forward_s"],
                backward_s=value["backward_s"],
                weight_bytes=value["weight_bytes"],
                activation_bytes=value["activation_bytes"],
            )
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--layers {path}: no layers (allowed: what `scaletrain bench model --out` wrote)"
            ) from None
