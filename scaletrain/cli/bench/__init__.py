"""Benchmarks: one file a verb below ``scaletrain bench``, a click command called ``command``.

Heavy imports stay inside the functions.
"""
