"""The place where the workers of a job meet: one key-value store. No port is ever guessed.

Workers join it by the facts that their launcher sets:

- Our launchers bind a socket and hand it to the process that serves the store
  (``SCALETRAIN_STORE_FD``). All workers learn MASTER_ADDR and MASTER_PORT.
- Under torchrun, the agent serves a store. Its address is in MASTER_ADDR and MASTER_PORT.
- Under mpirun, srun and horovodrun, nobody serves one: rank 0 binds a free port and publishes all
  of its addresses in RUN_DIR (``publish``). The others try them, and take one where rank 0 proves
  to be there.

On one host the store listens on loopback alone. Other users of the host reach it there, so its
values are sealed by the job's key (``sealed``).

>>> store = rendezvous.join(world, run_dir, timeout)  # doctest: +SKIP
>>> world = rendezvous.place(world, store)  # doctest: +SKIP
"""

from scaletrain.engine.rendezvous.sealed import for_nccl, sealed
from scaletrain.engine.rendezvous.serve import STORE_FD, address_of, serve
from scaletrain.engine.rendezvous.store import connect, join, place

__all__ = ["STORE_FD", "address_of", "connect", "for_nccl", "join", "place", "sealed", "serve"]
