"""What workers and servers agree on: settings, frames, keys, and where each parameter lies."""
