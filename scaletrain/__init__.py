"""Data-parallel PyTorch training where you choose how gradients are exchanged, and see, explain and predict how well it scales."""

__version__ = "0.1.0"


def _register_backends() -> None:
    """Called by torch when it is imported (entry point ``torch.backends``)."""
