"""Runs schedules: moves tensors over a transport, picks the algorithm, and serves torch.distributed as a backend. torch starts here."""

import torch  # noqa: F401  (first: torch loads the backend of this package while it is imported, which needs all modules here)
