"""Report facts of this host: ``python -m scaletrain.programs.host_facts FILE CONTENT``.

``launching.reach`` starts it on every host. It answers each line of its standard input with a line
of JSON on its standard output, and ends with its input:

- ``"facts"``: the host's facts (``HostFacts``), and the port at which it listens.
- ``"clock"``: unix seconds.
- ``{HOST: [PORT, ADDRESS, ...]}``: by host, the addresses at which this program answers there.
"""

import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scaletrain.host.facts import gather

_ANSWER_S = 3.0  # an address that does not answer within this time is not reached


def main(file: Path, content: str) -> None:
    """Answer questions until there are no more."""
    # All interfaces: the question is at which of them other hosts get through.
    listening = socket.create_server(("0.0.0.0", 0), backlog=1024)
    greeting = f"{content}\n".encode()
    threading.Thread(target=_greet, args=(listening, greeting), daemon=True).start()
    for line in sys.stdin:
        question = json.loads(line)
        answer: Any
        if question == "facts":
            answer = [gather(file, content).to_json(), listening.getsockname()[1]]
        elif question == "clock":
            answer = time.time()
        else:
            answer = _reached(question, greeting)
        print(json.dumps(answer), flush=True)


def _greet(listening: socket.socket, greeting: bytes) -> None:
    """Answer every connection with proof that this is the program of this search."""
    while True:
        connection, _ = listening.accept()
        with connection:
            connection.sendall(greeting)


def _reached(peers: dict[str, list[Any]], greeting: bytes) -> dict[str, list[str]]:
    """Return, by host, the addresses at which the right program answers."""

    def answers(address: str, port: int) -> bool:
        try:
            with socket.create_connection((address, port), timeout=_ANSWER_S) as connection:
                return connection.recv(len(greeting), socket.MSG_WAITALL) == greeting
        except OSError:
            return False

    reached: dict[str, list[str]] = {}
    # All at once: an address without an answer takes the whole time limit.
    with ThreadPoolExecutor(32) as pool:
        for host, (port, *addresses) in peers.items():
            answered = pool.map(answers, addresses, [port] * len(addresses))
            pairs = zip(addresses, answered, strict=True)
            reached[host] = [address for address, has_answered in pairs if has_answered]
    return reached


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
