"""Tests protocol/channel.py: messages open once, in order, at the other end, and nowhere else.

And a server takes or refuses whatever is in them.
"""

import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import aead
from hypothesis import given
from hypothesis import strategies as st

from scaletrain.parameter_server.protocol import channel
from scaletrain.parameter_server.protocol.channel import Channel, Handshake, Subject
from scaletrain.parameter_server.protocol.wire import Refused
from scaletrain.run.job_key import JobKey
from tests.parameter_server.fuzz import MODES, fuzz

KEY = JobKey(bytes(range(32)))
SUBJECT = Subject(server=0, rank=1, connection=2, incarnation=3)


def pair(
    key_of_server: JobKey = KEY, subject_of_server: Subject = SUBJECT
) -> tuple[Channel, Channel]:
    """Return the worker's and the server's end of a new connection."""
    worker, server = Handshake(), Handshake()
    return (
        worker.channel("worker", KEY, SUBJECT, server.public),
        server.channel("server", key_of_server, subject_of_server, worker.public),
    )


def text(frames) -> list[bytes]:
    return [bytes(frame) for frame in frames]


def refuses(end: Channel, frames) -> None:
    with pytest.raises(Refused, match="not authentic"):
        end.open(frames)


@given(st.lists(st.lists(st.binary(max_size=100), min_size=1, max_size=3), max_size=5))
def test_messages_arrive_in_both_directions(messages):
    worker, server = pair()
    for message in messages:
        assert text(server.open(worker.seal(message))) == message
        assert text(worker.open(server.seal(message))) == message


def test_arrays_arrive_as_their_bytes():
    worker, server = pair()
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    [frame] = server.open(worker.seal([values]))
    assert np.array_equal(np.frombuffer(frame, np.float32), values.ravel())


def test_a_message_is_not_taken_twice():
    worker, server = pair()
    sealed = worker.seal([b"gradient"])
    server.open(sealed)
    refuses(server, sealed)


def test_a_message_is_not_taken_by_its_sender():
    worker, _ = pair()
    refuses(worker, worker.seal([b"gradient"]))


def test_messages_are_not_taken_out_of_order_or_with_a_gap():
    worker, server = pair()
    first, second, third = (worker.seal([number]) for number in (b"1", b"2", b"3"))
    refuses(server, second)
    assert text(server.open(first)) == [b"1"]
    refuses(server, third)
    assert text(server.open(second)) == [b"2"]  # a refusal leaves the count as it was


def test_frames_do_not_change_places_or_messages():
    worker, server = pair()
    first = worker.seal([b"head", b"body"])
    second = worker.seal([b"head", b"body"])
    refuses(server, first[::-1])
    refuses(server, [first[0], second[1]])
    refuses(server, [first[0], first[1][:-1]])
    refuses(server, [first[0][:3]])


@pytest.mark.parametrize("place", range(8 + 16))
def test_every_byte_counts(place):
    worker, server = pair()
    [frame] = worker.seal([b"gradient"])
    frame[place] ^= 1
    refuses(server, [frame])


def test_a_message_of_another_connection_is_not_taken():
    """Of the same worker and server, with the same key: each connection has keys of its own."""
    (worker, _), (_, server) = pair(), pair()
    refuses(server, worker.seal([b"gradient"]))


@pytest.mark.parametrize("field", Subject._fields)
def test_both_ends_must_mean_the_same_connection(field):
    other = SUBJECT._replace(**{field: 7})
    worker, server = pair(subject_of_server=other)
    refuses(server, worker.seal([b"gradient"]))
    mine, theirs = Handshake(), Handshake()
    expected = mine.proof("server", KEY, SUBJECT, theirs.public)
    assert theirs.proof("server", KEY, SUBJECT, mine.public) == expected
    assert theirs.proof("server", KEY, other, mine.public) != expected
    assert theirs.proof("worker", KEY, SUBJECT, mine.public) != expected


def test_the_jobs_key_alone_opens_nothing():
    """It takes part in the keys, and so does the secret of X25519, which never travels."""
    other_key = JobKey(bytes(32))
    worker, server = pair(key_of_server=other_key)
    refuses(server, worker.seal([b"gradient"]))
    sealed = pair()[0].seal([b"gradient"])
    for end in pair():  # whoever holds the job's key, with handshakes of their own
        refuses(end, sealed)


@pytest.mark.parametrize("public", ["", "00" * 31, "zz" * 32, "00" * 32, "01" + "00" * 31])
def test_halves_that_give_no_secret_are_refused(public):
    with pytest.raises(Refused):
        Handshake().channel("server", KEY, SUBJECT, public)


@pytest.mark.parametrize("mode", MODES)
def test_ten_thousand_mutated_messages_are_taken_or_refused(tmp_path, mode):
    """None ends the server, admits a stranger or lets one change weights: ``fuzz`` checks it."""
    fuzzer = fuzz(seed=24, run_dir=tmp_path, frames=10_000, mode=mode)
    # It reaches deep: most reasons to refuse a message have come up, and many were taken.
    assert len(fuzzer.refused) > 15 and fuzzer.taken > 500


def test_no_nonce_is_used_twice_under_a_key(monkeypatch):
    """Over many messages of both ends, also those that cannot be sealed to their end."""
    used = []

    class Recording:
        def __init__(self, key: bytes):
            self._key = key
            self._cipher = aead.AESGCM(key)

        def encrypt_into(self, nonce, data, associated, target):
            used.append((self._key, bytes(nonce)))
            if bytes(data) == b"too much":
                raise MemoryError
            return self._cipher.encrypt_into(nonce, data, associated, target)

        def decrypt_into(self, *arguments):
            return self._cipher.decrypt_into(*arguments)

    monkeypatch.setattr(channel, "AESGCM", Recording)
    for _ in range(3):
        for end, number in itertools.product(pair(), range(100)):
            if number % 10 == 0:
                with pytest.raises(MemoryError):
                    end.seal([b"head", b"too much"])
            end.seal([b"head", b"body", b""][: 1 + number % 3])
    assert len(used) > 1000
    assert len(set(used)) == len(used)
    assert len({key for key, _ in used}) == 6  # three connections, two directions
