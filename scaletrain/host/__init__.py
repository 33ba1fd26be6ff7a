"""Facts about this machine: its processes, addresses, shared memory and cores."""
