"""Training: the trainer, checkpoints, exchanges, models and data."""
