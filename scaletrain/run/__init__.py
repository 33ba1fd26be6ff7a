"""A run's directory: what workers, servers and launchers write there, and who reads it."""
