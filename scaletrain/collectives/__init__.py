"""Allreduce algorithms as data: one file an algorithm, each a function ``schedule(size, *, ...) -> Schedule``. Pure: no torch, no processes."""
