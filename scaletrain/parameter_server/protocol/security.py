"""Access to a job's servers, by the job's key (``run.job_key``).

- ``aes`` (between hosts): both ends prove that they hold the job's key, and agree on keys for
  AES-GCM (``channel``).
- ``curve``: CurveZMQ encrypts and authenticates both ends. Servers admit one client key, the job's.
- ``trusted_network``: both ends prove that they hold the job's key. The data is not encrypted.
- Unix sockets (one host): the socket lies in a directory of mode 0700.
"""

import hmac
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils import z85

from scaletrain.run.job_key import JobKey, job_key

_GATE_USER = "worker"


class CurveKeys(NamedTuple):
    """The CURVE pairs of a job's servers and workers (Z85 text)."""

    server_public: bytes
    server_secret: bytes
    worker_public: bytes
    worker_secret: bytes

    @classmethod
    def of(cls, key: JobKey) -> "CurveKeys":
        """Return the pairs that follow from the job's key: every process finds the same ones."""
        server_secret = z85.encode(key.derive("curve server"))
        worker_secret = z85.encode(key.derive("curve worker"))
        return cls(
            zmq.curve_public(server_secret),
            server_secret,
            zmq.curve_public(worker_secret),
            worker_secret,
        )

    @classmethod
    def of_job(cls, run_dir: Path) -> "CurveKeys":
        """Return the pairs of the job in a run directory. Raises as ``job_key``."""
        return cls.of(job_key(run_dir))


def encrypt_server(socket: zmq.Socket, keys: CurveKeys) -> None:
    """Let a socket, before it is bound, encrypt as one of the job's servers."""
    socket.curve_server = True
    socket.curve_publickey = keys.server_public
    socket.curve_secretkey = keys.server_secret


def encrypt_worker(socket: zmq.Socket, keys: CurveKeys) -> None:
    """Let a socket, before it connects, encrypt as one of the job's workers."""
    socket.curve_serverkey = keys.server_public
    socket.curve_publickey = keys.worker_public
    socket.curve_secretkey = keys.worker_secret


def gate_password(key: JobKey) -> dict[str, str]:
    """Return the user and password that a peer needs before ZeroMQ takes a message from it.

    It keeps out everybody who neither holds the key nor reads the network. The proof of the key
    comes after it, and does not rest on it.
    """
    return {_GATE_USER: key.derive("gate").hex()}


def pass_gate(socket: zmq.Socket, key: JobKey) -> None:
    """Let a worker's socket, before it connects, give the password."""
    socket.plain_username = _GATE_USER.encode()
    socket.plain_password = gate_password(key)[_GATE_USER].encode()


def same(received: object, expected: str) -> bool:
    """Compare a received proof with the expected one, in constant time."""
    if not isinstance(received, str):
        return False
    return hmac.compare_digest(received.encode(), expected.encode())
