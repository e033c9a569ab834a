"""A port for a server of a test's own."""

import socket


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, as of now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
