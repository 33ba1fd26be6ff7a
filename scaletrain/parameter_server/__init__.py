"""Parameter servers: K processes that own the weights and the optimizer.

Workers push gradients to them and pull weights.

- ``protocol/`` is known to both ends: ``settings``, ``sharding`` (cuts the model into blocks),
  ``consistency`` (decides which gradient counts when), ``wire`` (the format of every message).
  ``placement`` says which processes a job needs.
- ``server/`` is one end: ``server``, with ``endpoint`` (connections), ``blocks``, ``initial``,
  ``shard`` (weights and optimizers), ``sums``, ``snapshots`` and ``tally``.
- ``worker/`` is the other end; its docstring follows a step through its files.
"""
