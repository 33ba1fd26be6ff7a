"""``python -m scaletrain.cli``: the same as the command ``scaletrain``."""

from scaletrain.cli import main

main()
