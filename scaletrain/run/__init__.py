"""A run's directory: the files that workers, servers and launchers exchange there."""
