"""The explorer's port; a module of its own, because the server's imports take seconds."""

from __future__ import annotations

import os
import socket as sockets

from cartilha.errors import UserError

HOST = "127.0.0.1"


def listen(port: int) -> sockets.socket:
    """A socket of this machine alone, bound and not yet listening, or a UserError: the port is taken or not allowed."""
    if not 0 <= port <= 65535:
        raise UserError(f"A port is a number from 0 to 65535, not {port}.")
    socket = sockets.socket(sockets.AF_INET, sockets.SOCK_STREAM)
    if os.name != "nt":  # there it would let two programs share the port
        socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
    try:
        socket.bind((HOST, port))
    except OSError as error:
        socket.close()
        raise UserError(
            f"The port {port} cannot be used ({error.strerror}); choose another with --port, or --port 0 for any."
        ) from error
    return socket
