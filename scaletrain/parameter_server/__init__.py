"""Parameter servers: they own the optimizer; workers push gradients and pull weights."""
