"""Jobs of recipes that need more than a model, data and a loss: one file each.

A recipe names one with ``workload: scaletrain.training.workloads.NAME:Class``.
"""
