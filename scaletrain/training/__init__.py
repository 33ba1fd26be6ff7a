"""Training: the trainer, the worker that every launcher starts, checkpoints, exchanges, models and data."""
