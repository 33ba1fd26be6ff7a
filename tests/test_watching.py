"""Tests of docs/watching.md: what it says in YAML is accepted."""

import re
from pathlib import Path

import yaml

from scaletrain import config

ROOT = Path(__file__).parents[1]


def test_the_pages_settings_are_accepted():
    page = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8")
    job = yaml.safe_load((ROOT / "examples" / "digits.yaml").read_text(encoding="utf-8"))
    for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        job |= yaml.safe_load(block)
    checked = config.check(job)
    assert [named.name for named in checked.callbacks] == ["tensorboard", "wandb", "mlflow"]
    assert checked.metrics.keys() == {"f1", "top3", "area"}
    for settings in re.findall(r"--set '(.*?)'", page):
        key, value = settings.split("=", 1)
        config.check(job | {key: yaml.safe_load(value)})
