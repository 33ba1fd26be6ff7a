"""Handshakes of TCP connections, and their encryption by AES-GCM.

1. Each end makes an X25519 pair for this connection and sends its public half, in HELLO and
   CHALLENGE.
2. Each end proves by the job's key that it has said and heard the same (``Handshake.proof``): both
   halves, the server, the worker's rank and process, and the number of the connection.
3. Both derive two keys from X25519's secret and the job's key, one for each direction (HKDF,
   RFC 5869). Whoever records the traffic and gets hold of the job's key later cannot read it.

The frames of the n-th message of a direction have nonces of n and the frame's number. Nonces do not
travel: both ends count. So a message that is repeated, left out, overtaken, sent back to where it
came from or moved to another connection does not open, and no nonce is used twice under a key.
"""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from scaletrain.parameter_server.protocol.wire import Refused
from scaletrain.run.job_key import JobKey

_KEY_BYTES = 32  # AES-256
_TAG_BYTES = 16
_NONCE = struct.Struct(">QI")  # number of the message, number of the frame
_MOST_MESSAGES = (1 << 64) - 1


class Subject(NamedTuple):
    """The connection that a handshake is about."""

    server: int
    rank: int
    connection: int  # its number among those of the worker
    incarnation: int  # of the worker's process

    def __str__(self) -> str:
        return "|".join(map(str, self))


class Handshake:
    """One end of a handshake.

    Attributes:
        public: this end's half, in hexadecimal; random, and used once.
    """

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw().hex()

    def proof(self, role: str, key: JobKey, subject: Subject, theirs: str) -> str:
        """Return the proof that ``role`` gives, in hexadecimal.

        Args:
            role: ``worker`` or ``server``: the end that proves.
            key: the job's.
            subject: the connection.
            theirs: the public half of the other end.
        """
        halves = sorted([self.public, theirs])
        return key.proof(role, str(subject), *halves)

    def channel(self, role: str, key: JobKey, subject: Subject, theirs: str) -> "Channel":
        """Return this end's channel, after the other end has proved ``theirs``.

        Args:
            role: of this end.
            key, subject, theirs: as for ``proof``.

        Raises:
            Refused: ``theirs`` is no public half.
        """
        try:
            secret = self._private.exchange(
                X25519PublicKey.from_public_bytes(bytes.fromhex(theirs))
            )
        except ValueError:
            raise Refused("malformed HELLO") from None
        halves = "|".join(sorted([self.public, theirs]))
        derivation = HKDF(
            algorithm=SHA256(),
            length=2 * _KEY_BYTES,
            salt=key.derive("channel"),
            info=f"{subject}|{halves}".encode(),
        )
        derived = derivation.derive(secret)
        by_worker, by_server = derived[:_KEY_BYTES], derived[_KEY_BYTES:]
        if role == "worker":
            return Channel(by_worker, by_server)
        return Channel(by_server, by_worker)


class Channel:
    """One end of an encrypted connection. One thread at a time uses it.

    Args:
        sending: AES key of the messages from this end.
        receiving: AES key of the messages from the other end.
    """

    def __init__(self, sending: bytes, receiving: bytes):
        self._sending = AESGCM(sending)
        self._receiving = AESGCM(receiving)
        self._sent = 0  # messages sealed so far
        self._received = 0  # messages opened so far

    def seal(self, frames: Sequence[Any]) -> list[memoryview]:
        """Return the frames of the next message, encrypted.

        The message has to leave, or none after it: the other end counts, too.

        Args:
            frames: bytes or arrays.
        """
        if self._sent >= _MOST_MESSAGES:
            raise OverflowError("this connection has sent all messages that its key is good for")
        number = self._sent
        self._sent += 1  # before anything can fail: the nonce counts as used
        sealed = []
        for index, frame in enumerate(frames):
            plain = memoryview(frame).cast("B")
            target = _memory(plain.nbytes + _TAG_BYTES)
            self._sending.encrypt_into(_NONCE.pack(number, index), plain, None, target)
            sealed.append(target)
        return sealed

    def open(self, frames: Sequence[memoryview]) -> list[memoryview]:
        """Return the frames of the next message, decrypted.

        Raises:
            Refused: it is not the next message that the other end has sealed.
        """
        opened = []
        for index, frame in enumerate(frames):
            if frame.nbytes < _TAG_BYTES:
                raise Refused("message is not authentic")
            target = _memory(frame.nbytes - _TAG_BYTES)
            nonce = _NONCE.pack(self._received, index)
            try:
                self._receiving.decrypt_into(nonce, frame, None, target)
            except InvalidTag:
                raise Refused("message is not authentic") from None
            opened.append(target)
        self._received += 1
        return opened


def _memory(num_bytes: int) -> memoryview:
    """Return new memory that is not filled with zeros first."""
    return np.empty(num_bytes, np.uint8).data
