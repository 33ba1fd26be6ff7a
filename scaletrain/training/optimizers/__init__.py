"""Optimizers that torch does not have, for large batches.

Every other file here is one optimizer: a function ``optimizer(groups, *, <options>) ->
torch.optim.Optimizer``. ``groups`` are parameter groups as torch takes them. An option that a group
may set for itself is a key of the optimizer's ``defaults``.
"""
