"""Tests host/shared_memory.py: memory is shared, and a wrong handle is refused."""

import os

import pytest

from scaletrain.host import shared_memory
from scaletrain.host.shared_memory import Handle


@pytest.fixture
def created():
    handle = shared_memory.create(4096, reserve=True)
    yield handle
    os.close(handle.descriptor)


def test_what_one_process_writes_another_reads(created: Handle):
    first = shared_memory.map_created(created)
    second = shared_memory.map_opened(created, write=True)
    first[:5] = b"hello"
    assert second[:5] == b"hello"
    second[:5] = b"there"
    assert first[:5] == b"there"


def test_memory_opened_for_reading_is_not_written_to(created: Handle):
    with pytest.raises(TypeError):
        shared_memory.map_opened(created, write=False)[0] = 1


def test_it_can_neither_shrink_nor_grow(created: Handle):
    for size in (1, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(created.descriptor, size)


def test_another_size_is_refused(created: Handle):
    with pytest.raises(ValueError, match="this size and user"):
        shared_memory.map_opened(created._replace(num_bytes=8192), write=True)


def test_a_file_that_is_not_shared_memory_is_refused():
    with open("/dev/null", "rb") as file, pytest.raises(ValueError, match="not shared memory"):
        shared_memory.map_opened(Handle(os.getpid(), file.fileno(), 0), write=False)


def test_memory_that_is_not_sealed_is_refused():
    descriptor = os.memfd_create("scaletrain", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4096)
    try:
        with pytest.raises(ValueError, match="not sealed"):
            shared_memory.map_opened(Handle(os.getpid(), descriptor, 4096), write=True)
    finally:
        os.close(descriptor)
