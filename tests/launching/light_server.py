"""A forkserver that loads nothing: ``test_warm`` starts it in a moment."""

import socket
import sys

from scaletrain.host import forking

if __name__ == "__main__":
    connection = socket.socket(fileno=int(sys.argv[-1]))
    forking.run(forking.serve(connection, lambda name: name.startswith("MAY_DIFFER")))
