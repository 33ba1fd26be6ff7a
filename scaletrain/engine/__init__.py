"""Runs schedules on tensors, chooses them, and serves torch.distributed as a backend.

Importing torch is allowed from this room upwards.
"""
