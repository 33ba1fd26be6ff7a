"""Tests ``protocol/memory.py`` and the send buffers of ``protocol/settings.py``."""

import subprocess
import sys

import pytest

from scaletrain.parameter_server.protocol.settings import Settings

pytestmark = pytest.mark.timeout(60)
# Eight messages of 4 MiB come and go, ten times.
# Prints how many pages had to be made anew in the last nine rounds.
ROUNDS = """
import ctypes, resource, sys
from scaletrain.parameter_server.protocol import memory
if sys.argv[1] == "kept":
    memory.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for number in range(10):
    if number == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    messages = [libc.malloc(4 << 20) for _ in range(8)]
    for message in messages:
        ctypes.memset(message, 1, 4 << 20)
    for message in messages:
        libc.free(message)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux (glibc's malloc)")
def test_freed_memory_is_used_again():
    def faults(what: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", ROUNDS, what], capture_output=True, text=True, timeout=50
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert faults("kept") < 1000 < faults("given back")  # 8192 pages a round


def test_send_buffers_share_a_servers_link():
    for workers in (4, 8, 16):
        settings = Settings(workers, hosts=2, security="trusted_network")
        assert settings.send_buffer_bytes * workers == 1 << 20
    # No smaller: a packet has up to 64 KiB.
    assert Settings(64, hosts=2, security="trusted_network").send_buffer_bytes == 1 << 16
    # Four connections under CURVE, one under AES.
    assert Settings(8, hosts=2, security="curve").send_buffer_bytes == 1 << 16
    assert Settings(8, hosts=2, security="aes").send_buffer_bytes == 1 << 17
    assert (
        Settings(2, hosts=2, security="trusted_network").send_buffer_bytes == -1
    )  # as the system lets it grow
