"""Launchers turn a job into a plan; supervision carries the plan out.

This room imports no torch.
"""
