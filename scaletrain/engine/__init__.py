"""Runs schedules: moves tensors over a transport, picks the algorithm, and serves torch.distributed as a backend. torch starts here."""
