"""A run's configuration: the YAML file that people write, checked and resolved once.

The result is written to RUN_DIR/config.yaml. Workers read that file and their rank variables,
nothing else. Every mistake ends in one line that names the key, the value and the values that
are allowed. Nothing here imports torch.
"""

from scaletrain.config.checks import check, load, plugin_options, plugin_spec
from scaletrain.config.grammar import exchange_label, expand_exchange, parse_setting
from scaletrain.config.schema import Checkpoint, Compilation, Compute, LrSchedule, Named, RunConfig

__all__ = [
    "Checkpoint",
    "Compilation",
    "Compute",
    "LrSchedule",
    "Named",
    "RunConfig",
    "check",
    "exchange_label",
    "expand_exchange",
    "load",
    "parse_setting",
    "plugin_options",
    "plugin_spec",
]
