"""Runs schedules on tensors: transports, the choice of an algorithm, torch.distributed's backend.

Importing torch is allowed from this room upwards.
"""
