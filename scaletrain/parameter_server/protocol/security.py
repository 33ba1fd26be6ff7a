"""Who may talk to a job's servers: keys made once a job, in files that only their owner can read.

- ``curve`` (between hosts): CurveZMQ encrypts and authenticates both ends; servers admit one client key, the job's.
- ``trusted_network``: both ends prove that they hold the job's key (HMAC-SHA256 over both nonces); the data is not encrypted.
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

_FILE = ".parameter_server.keys"


class Keys(NamedTuple):
    """A job's keys: two CURVE pairs (Z85 text) and a shared secret (hex)."""

    server_public: str
    server_secret: str
    worker_public: str
    worker_secret: str
    shared: str

    def proof(self, role: str, worker_nonce: str, server_nonce: str) -> str:
        """What only a holder of the key can say to this pair of nonces; ``role`` keeps one end from echoing the other's."""
        text = f"{role}|{worker_nonce}|{server_nonce}".encode()
        return hmac.new(bytes.fromhex(self.shared), text, "sha256").hexdigest()


def job_keys(run_dir: Path) -> Keys:
    """The job's keys, made by whichever of its processes asks first (the directory is shared by all of them).

    Raises:
        UserError: the file can be read by others, or is damaged.
    """
    path = run_dir / _FILE
    if not path.exists():
        _make(path)
    mode = path.stat()
    if mode.st_uid != os.getuid() or stat.S_IMODE(mode.st_mode) & 0o077:
        raise UserError(
            f"{path}: can be read by others (allowed: mode 0600, owned by you); delete it to have new keys made"
        )
    try:
        return Keys(**json.loads(path.read_text(encoding="ascii")))
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; delete it to have new keys made") from None


def forget(run_dir: Path) -> None:
    """Remove the job's keys: the next job in this directory makes its own."""
    (run_dir / _FILE).unlink(missing_ok=True)


def _make(path: Path) -> None:
    server, worker = zmq.curve_keypair(), zmq.curve_keypair()
    pairs = [key.decode() for key in (*server, *worker)]
    text = json.dumps(Keys(*pairs, shared=secrets.token_hex(32))._asdict())
    partial = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
        with contextlib.suppress(
            FileExistsError
        ):  # another process was first: its keys are the job's
            os.link(partial, path)
    finally:
        partial.unlink()


def nonce() -> str:
    return secrets.token_hex(16)


def same(a: object, b: str) -> bool:
    """Compare in constant time."""
    return isinstance(a, str) and hmac.compare_digest(a.encode(), b.encode())
