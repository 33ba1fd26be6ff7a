"""Allreduce algorithms as data, one file an algorithm. Pure: no torch, no processes.

Each file defines ``schedule(size, *, ...) -> Schedule``.
"""
