"""Bind before connect: lease a source port from bridge-agent, bind it, connect.

    with connect(("192.168.31.67", 443), wait=2.0) as stream:
        stream.sendall(b"hello")

A lease reserves a port towards one destination. It ends when its connection to the agent closes: with the socket, and with the
process.
"""

from __future__ import annotations

import errno
import http.client
import ipaddress
import json
import os
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Optional, Union

__all__ = ["SOCKET", "Agent", "AgentError", "Lease", "Refused", "Stream", "connect"]

SOCKET = "/run/bridge/agent.sock"
"""Default socket of the agent."""

_BIND_TRIES = 8
_IN_USE = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
_NO_PORT = ("exhausted", "quota")

Address = tuple[str, int]
Transport = Literal["tcp", "udp"]


class AgentError(OSError):
    """The agent cannot be reached, or its answer is not understood."""


class Refused(OSError):
    """The agent refused the lease; `code` names the reason, the text has the remedy."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(errno.EADDRNOTAVAIL if code in _NO_PORT else errno.EACCES, text)
        self.code = code


@dataclass
class Lease:
    """A port that no other client uses towards one destination, until `close`. Bind it with SO_REUSEADDR."""

    id: int
    port: int
    _connection: http.client.HTTPConnection

    def close(self) -> None:
        """Ends the lease."""
        self._connection.close()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()


class Agent:
    """The agent, reached through its unix socket."""

    def __init__(self, path: Union[str, os.PathLike[str]] = SOCKET) -> None:
        self.path = os.fspath(path)

    def acquire(self, destination: Address, transport: Transport = "tcp", wait: float = 0.0) -> Lease:
        """Leases a port towards `destination`, an IP address and a port; waits up to `wait` seconds, at most 60.

        Raises `Refused` or `AgentError`.
        """
        _end_detached()
        host, port = destination
        address = ipaddress.ip_address(host)
        body = {
            "destination": f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}",
            "protocol": transport,
            "count": 1,
            "waitMs": round(wait * 1000),
        }
        connection = http.client.HTTPConnection("bridge")
        try:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(self.path)
            connection.request("POST", "/v1/leases", json.dumps(body), {"Content-Type": "application/json"})
            return _lease(connection)
        except (Refused, AgentError):
            connection.close()
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            code = error.errno if isinstance(error, OSError) else None
            text = f"cannot talk to the agent at {self.path}: {error}; is bridge-agent running, and may this user open the socket?"
            raise AgentError(code or errno.EPROTO, text) from error


def _lease(connection: http.client.HTTPConnection) -> Lease:
    """Reads the agent's answer."""
    response = connection.getresponse()
    answer: Any = json.loads(response.read())
    if response.status != 201:
        raise Refused(str(answer.get("code", response.status)), str(answer.get("error", answer)))
    try:
        (leased,) = answer["leases"]
        return Lease(int(leased["id"]), int(leased["port"]), connection)
    except (KeyError, TypeError, ValueError) as error:
        raise AgentError(errno.EPROTO, f"the agent answered {answer}; it may be of another version") from error


class Stream(socket.socket):
    """A connected TCP socket that ends its lease when it is closed."""

    lease: Optional[Lease] = None

    def close(self) -> None:
        """Closes the socket, then ends the lease. A file of `makefile` that is still open keeps both."""
        super().close()
        if self.lease is not None and self.fileno() == -1:
            self.lease.close()

    def detach(self) -> int:
        """Gives the descriptor away, as `ssl.SSLContext.wrap_socket` does. The next `acquire` after it is closed ends the lease."""
        descriptor = super().detach()
        if self.lease is not None and descriptor != -1:
            _detached.append((descriptor, os.fstat(descriptor).st_ino, self.lease))
            self.lease = None
        return descriptor


# Leases of detached streams, each with the descriptor and its inode.
_detached: list[tuple[int, int, Lease]] = []


def _end_detached() -> None:
    """Ends the leases of detached streams whose descriptors are closed."""
    for entry in _detached.copy():
        descriptor, inode, lease = entry
        try:
            is_open = os.fstat(descriptor).st_ino == inode
        except OSError:
            is_open = False
        if not is_open:
            lease.close()
            _detached.remove(entry)


def connect(
    destination: Address,
    *,
    agent: Union[Agent, str, os.PathLike[str], None] = None,
    wait: float = 0.0,
    timeout: Optional[float] = None,
) -> Stream:
    """Connects to an IP address and a port from a leased source port.

    Takes another port if a program outside the pool has bound the leased one. Raises `Refused`, `AgentError`, or the error of the
    connection.
    """
    source = agent if isinstance(agent, Agent) else Agent(SOCKET if agent is None else agent)
    # Held until there is a connection: otherwise the agent may lease the same port again.
    unusable: list[Lease] = []
    try:
        while True:
            lease = source.acquire(destination, "tcp", wait)
            try:
                stream = _connect_from(lease.port, destination, timeout)
            except OSError as error:
                if error.errno in _IN_USE and len(unusable) < _BIND_TRIES:
                    unusable.append(lease)
                    continue
                lease.close()
                raise
            stream.lease = lease
            return stream
    finally:
        for lease in unusable:
            lease.close()


def _connect_from(port: int, destination: Address, timeout: Optional[float]) -> Stream:
    v6 = ipaddress.ip_address(destination[0]).version == 6
    stream = Stream(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # A leased port serves other destinations at the same time.
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stream.settimeout(timeout)
        stream.bind(("", port))
        stream.connect(destination)
    except BaseException:
        stream.close()
        raise
    return stream
