"""Access to a job's servers: keys made once a job, in a file that only its owner can read.

- ``curve`` (between hosts): CurveZMQ encrypts and authenticates both ends. Servers admit one client
  key, the job's.
- ``trusted_network``: both ends prove that they hold the job's key (HMAC-SHA256 over both nonces).
  The data is not encrypted.
- Unix sockets (one host): the socket lies in a directory of mode 0700.
"""

import contextlib
import hmac
import json
import os
import secrets
import stat
from pathlib import Path
from typing import NamedTuple

import zmq

from scaletrain.errors import UserError
from scaletrain.run.layout import RunDir

_SIGNATURE_BYTES = 32


class Keys(NamedTuple):
    """A job's keys: two CURVE pairs (Z85 text) and a shared secret (hex)."""

    server_public: str
    server_secret: str
    worker_public: str
    worker_secret: str
    shared: str

    def proof(self, role: str, worker_nonce: str, server_nonce: str) -> str:
        """Return the proof, for one pair of nonces, that its sender holds the shared secret.

        Args:
            role: ``server``, or ``worker`` with its rank. It keeps one end from echoing the other's
                proof.
            worker_nonce: chosen by the worker for this connection.
            server_nonce: chosen by the server for this connection.

        Returns:
            HMAC-SHA256 in hex.
        """
        text = f"{role}|{worker_nonce}|{server_nonce}".encode()
        return hmac.new(bytes.fromhex(self.shared), text, "sha256").hexdigest()

    def seal(self, name: str, value: bytes) -> bytes:
        """Return a value of the job's key-value store, which anybody on the host may write to.

        Args:
            name: of the value; it keeps one value from taking the place of another.
            value: any bytes.

        Returns:
            HMAC-SHA256 of name and value, then the value.
        """
        return self._signature(name, value) + value

    def unseal(self, name: str, sealed: bytes) -> bytes:
        """Return the value that a holder of the shared secret has sealed under ``name``.

        Raises:
            UserError: somebody else wrote it.
        """
        signature, value = sealed[:_SIGNATURE_BYTES], sealed[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._signature(name, value)):
            raise UserError(
                f"the job's store: the value of {name} was not written by a worker of this job"
            )
        return value

    def _signature(self, name: str, value: bytes) -> bytes:
        """Return the HMAC-SHA256 of a value and its name."""
        signature = hmac.new(bytes.fromhex(self.shared), f"store|{name}|".encode(), "sha256")
        signature.update(value)
        return signature.digest()


def job_keys(run_dir: Path) -> Keys:
    """Return the job's keys.

    All processes of a job share the run directory. The first one that asks makes the keys.

    Raises:
        UserError: the file can be read by others, or is damaged.
    """
    path = RunDir(run_dir).server_keys
    if not path.exists():
        _make(path)
    status = path.stat()
    # Any right of the group or of others is too much.
    others_may_read = stat.S_IMODE(status.st_mode) & 0o077
    if status.st_uid != os.getuid() or others_may_read:
        raise UserError(
            f"{path}: can be read by others (allowed: mode 0600, owned by you); "
            "delete it to have new keys made"
        )
    try:
        return Keys(**json.loads(path.read_text(encoding="ascii")))
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; delete it to have new keys made") from None


def encrypt_server(socket: zmq.Socket, keys: Keys) -> None:
    """Let a socket, before it is bound, encrypt as one of the job's servers."""
    socket.curve_server = True
    socket.curve_publickey = keys.server_public.encode()
    socket.curve_secretkey = keys.server_secret.encode()


def encrypt_worker(socket: zmq.Socket, keys: Keys) -> None:
    """Let a socket, before it connects, encrypt as one of the job's workers."""
    socket.curve_serverkey = keys.server_public.encode()
    socket.curve_publickey = keys.worker_public.encode()
    socket.curve_secretkey = keys.worker_secret.encode()


def forget(run_dir: Path) -> None:
    """Remove the job's keys: the next job in this directory makes its own."""
    RunDir(run_dir).server_keys.unlink(missing_ok=True)


def _make(path: Path) -> None:
    """Write new keys to ``path``, unless another process has been faster.

    The file is written under another name and then linked: a link, unlike a rename, fails if the
    name exists, so all processes read the keys of the first one.
    """
    server_public, server_secret = zmq.curve_keypair()
    worker_public, worker_secret = zmq.curve_keypair()
    keys = Keys(
        server_public=server_public.decode(),
        server_secret=server_secret.decode(),
        worker_public=worker_public.decode(),
        worker_secret=worker_secret.decode(),
        shared=secrets.token_hex(32),
    )
    partial = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            json.dump(keys._asdict(), file)
        with contextlib.suppress(FileExistsError):  # the keys of the faster process are the job's
            os.link(partial, path)
    finally:
        # If the link was made, the keys live on under their true name.
        partial.unlink()


def nonce() -> str:
    """Return a random text of 32 characters that is used once."""
    return secrets.token_hex(16)


def same(received: object, expected: str) -> bool:
    """Compare a received proof with the expected one, in constant time."""
    if not isinstance(received, str):
        return False
    return hmac.compare_digest(received.encode(), expected.encode())
