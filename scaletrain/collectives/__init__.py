"""Allreduce algorithms as data: one file an algorithm, each with ``schedule(size, *, ...)``.

Pure: no torch, no processes.
"""
