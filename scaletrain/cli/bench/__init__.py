"""One file a ``scaletrain bench`` command: a click command called ``command``. Heavy imports stay inside the functions."""
