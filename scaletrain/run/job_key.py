"""A job's key: one secret in a file that only its owner can read.

All processes of a job share the run directory, and the first one that asks makes the key. It proves
who belongs to the job: it seals the values of the job's key-value store, and the keys of encrypted
links are derived from it. It never appears in an argument, the environment or a log.
"""

import contextlib
import hmac
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import NamedTuple

from scaletrain.errors import UserError
from scaletrain.run.layout import RunDir

_SECRET_BYTES = 32
_SIGNATURE_BYTES = 32


class JobKey(NamedTuple):
    """The secret that the processes of a job share."""

    secret: bytes

    def __repr__(self) -> str:
        """Return a text without the secret, for logs."""
        return "JobKey(...)"

    def derive(self, purpose: str) -> bytes:
        """Return a key for one purpose (32 bytes), which tells nothing about the secret."""
        return hmac.digest(self.secret, f"derive|{purpose}".encode(), "sha256")

    def proof(self, *facts: str) -> str:
        """Return the proof that a holder of the key has said these facts: HMAC-SHA256 in hex.

        Args:
            facts: they hold no ``|``, and begin with the role of the speaker: it keeps one end
                from echoing the other's proof.
        """
        return hmac.digest(self.secret, "|".join(facts).encode(), "sha256").hex()

    def seal(self, name: str, value: bytes) -> bytes:
        """Return a value for a store that others can write to.

        Args:
            name: of the value; it keeps one value from taking the place of another.
            value: any bytes.

        Returns:
            HMAC-SHA256 of name and value, then the value.
        """
        return self._signature(name, value) + value

    def unseal(self, name: str, sealed: bytes) -> bytes:
        """Return the value that a holder of the key has sealed under ``name``.

        Raises:
            UserError: somebody else wrote it.
        """
        signature, value = sealed[:_SIGNATURE_BYTES], sealed[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._signature(name, value)):
            raise UserError(
                f"the job's store: the value of {name} was not written by a process of this job"
                " (do all of them see the same run directory?)"
            )
        return value

    def _signature(self, name: str, value: bytes) -> bytes:
        """Return the HMAC-SHA256 of a value and its name."""
        named = name.encode()
        signature = hmac.new(self.secret, b"store|%d|" % len(named), "sha256")
        signature.update(named)
        signature.update(value)
        return signature.digest()


def job_key(run_dir: Path) -> JobKey:
    """Return the job's key; make it if no process of the job has.

    Raises:
        UserError: the file can be read by others, or is damaged.
    """
    path = RunDir(run_dir).job_key
    try:
        return _read(path)
    except FileNotFoundError:
        _make(path)
    return _read(path)


def forget(run_dir: Path) -> None:
    """Remove what is the job's alone: the next job in this directory makes its own."""
    RunDir(run_dir).job_key.unlink(missing_ok=True)
    shutil.rmtree(RunDir(run_dir).private, ignore_errors=True)


def private_directory(run_dir: Path) -> Path:
    """Return the directory of the run that its owner alone can enter; make it if need be."""
    directory = RunDir(run_dir).private
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    # mkdir leaves the mode of a directory that exists as it is.
    os.chmod(directory, 0o700)
    return directory


def _read(path: Path) -> JobKey:
    """Return the key in a file. Raises ``FileNotFoundError``, ``UserError``."""
    # A link could lead to a file that somebody else chose.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), encoding="ascii") as file:
        # Of the open file: another one may take its place meanwhile.
        status = os.fstat(file.fileno())
        text = file.read(2 * _SECRET_BYTES + 1)
    # Any right of the group or of others is too much.
    others_may_read = stat.S_IMODE(status.st_mode) & 0o077
    # A network file system may show another owner of all that we write, the directory included.
    # Whoever owns the directory has the run's configuration, which is code, in hand anyway.
    owners = (os.getuid(), path.parent.stat().st_uid)
    if status.st_uid not in owners or others_may_read:
        raise UserError(
            f"{path}: can be read by others (allowed: mode 0600, owned by you); "
            "delete it to have a new key made"
        )
    with contextlib.suppress(ValueError):
        secret = bytes.fromhex(text)
        if len(secret) == _SECRET_BYTES:
            return JobKey(secret)
    raise UserError(f"{path}: damaged; delete it to have a new key made")


def _make(path: Path) -> None:
    """Write a new key to ``path``, unless another process has been faster.

    The file is written under another name and then linked: a link, unlike a rename, fails if the
    name exists, so all processes read the key of the first one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_SECRET_BYTES))
        with contextlib.suppress(FileExistsError):  # the key of the faster process is the job's
            os.link(partial, path)
    finally:
        # If the link was made, the key lives on under its true name.
        partial.unlink()
