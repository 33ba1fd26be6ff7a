"""Parameter servers: K processes that own the weights and the optimizer; workers push gradients and pull weights.

``sharding`` cuts the model into blocks, ``consistency`` decides which gradient counts when, ``wire`` is the format of every message;
these three know nothing of processes or sockets. ``server`` is one end (with ``endpoint``, ``blocks``, ``shard``, ``sums``, ``snapshots``,
``tally``), ``client`` the other (with ``requests``, ``link``, ``replica``); ``placement`` says which processes a job needs.
"""
