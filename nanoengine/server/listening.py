"""The listening socket, which the supervisor binds and the HTTP processes inherit."""

from __future__ import annotations

import errno
import socket

from nanoengine.api.errors import ConfigError

_BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises `ConfigError` if the name is unknown, or the address cannot be bound."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"server.host: {host!r} is no address of this machine: {error.strerror}") from error
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server may linger
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited by connections
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot bind {host}:{port}: {_why(error, port)}") from error
    return sock


def _why(error: OSError, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"another program uses port {port}; give another one (server.port=8001, or server.port=0 for any)"
    if error.errno == errno.EADDRNOTAVAIL:
        return "it is no address of this machine (server.host)"
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges; take one from 1024 on (server.port)"
    return error.strerror or str(error)


def url(sock: socket.socket) -> str:
    """The address that the socket is bound to, as a URL without a path."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
