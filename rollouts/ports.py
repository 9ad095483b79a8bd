"""A port for a server of this machine."""

import socket


def free_port() -> int:
    """One that nothing listens at now; who is slow to take it may find it taken."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
