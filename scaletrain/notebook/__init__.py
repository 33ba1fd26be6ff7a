"""Workers from a notebook: a function of its cells runs on several workers of this host.

``launch`` is the kernel's side: it forks the workers, shows their output and collects their
results. ``worker`` is the other side: it makes a fork of the kernel free of the kernel, and runs
the function there.
"""
