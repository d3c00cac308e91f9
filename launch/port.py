"""The rendezvous port: `python -m launch.port PORT…` exits 2 with a sentence where one is taken."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Sequence


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def obstacle(port: int) -> str:
    """Why rank 0 could not listen on a port of this machine; "" when it could."""
    if not 0 < port < 2**16:
        return "is no port: 1 to 65535"
    with socket.socket() as listener:
        # As the rendezvous does: what an ended run leaves behind for a minute is no obstacle.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen()
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            return IN_USE if taken else f"cannot be listened on: {error.strerror}"
    return ""


IN_USE = "is in use on this machine, by another run perhaps"


def main(arguments: Sequence[str]) -> int:
    """Check ports in order."""
    for text in arguments:
        if why := obstacle(int(text) if text.isdecimal() else 0):
            hint = f"MASTER_PORT={free_port()} is free"
            print(f"MASTER_PORT={arguments[0]}: port {text} {why} ({hint})", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
