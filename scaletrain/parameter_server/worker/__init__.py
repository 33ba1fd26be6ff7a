"""The worker's side of the parameter server: from backward's gradients to the new weights.

A step passes through these files, in this order:

- ``exchange`` has the methods that the trainer calls.
- ``gradients`` and ``local_steps`` decide when to push, by the mode.
- ``replica`` writes gradients into blocks (through ``staging`` on an accelerator).
- ``client`` has one method for each request to the servers.
- ``requests`` holds the open requests, between the training thread and the I/O thread.
- ``io_thread`` sends and receives, over a ``link`` to each server.

``beside`` runs a server as a process beside the worker.
"""
