"""Tests against a running agent: BRIDGE_SOCKET names its socket, BRIDGE_SERVERS echo servers, BRIDGE_PORTS its pool.

`cargo nextest run -p bridge-tests --test clients` starts them.
"""

from __future__ import annotations

import errno
import gc
import os
import socket
import unittest

import bridge_client

AGENT = os.environ["BRIDGE_SOCKET"]
SERVERS = [(host, int(port)) for host, port in (text.rsplit("/", 1) for text in os.environ["BRIDGE_SERVERS"].split())]
FIRST, LAST = (int(port) for port in os.environ["BRIDGE_PORTS"].split("-"))


class Connecting(unittest.TestCase):
    def test_both_families_connect_from_the_pool(self) -> None:
        self.assertEqual(len(SERVERS), 2)
        for server in SERVERS:
            with bridge_client.connect(server, agent=AGENT, timeout=10) as stream:
                self.assertTrue(FIRST <= stream.getsockname()[1] <= LAST, stream)
                stream.sendall(b"hello")
                self.assertEqual(stream.recv(5), b"hello")

    def test_a_closed_stream_ends_its_lease_and_an_exhausted_pool_refuses(self) -> None:
        streams = []
        with self.assertRaises(bridge_client.Refused) as refused:
            while True:
                streams.append(bridge_client.connect(SERVERS[0], agent=AGENT, timeout=10))
                self.assertLessEqual(len(streams), LAST - FIRST + 1)
        self.assertEqual(refused.exception.code, "exhausted")
        self.assertEqual(refused.exception.errno, errno.EADDRNOTAVAIL)
        self.assertEqual(len({stream.getsockname()[1] for stream in streams}), LAST - FIRST + 1)
        reset = b"\1\0\0\0\0\0\0\0"
        for stream in streams:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            stream.close()
        bridge_client.connect(SERVERS[0], agent=AGENT, wait=30, timeout=10).close()

    def test_a_file_of_a_stream_keeps_its_lease(self) -> None:
        stream = bridge_client.connect(SERVERS[0], agent=AGENT, timeout=10)
        lease = stream.lease
        assert lease is not None
        with stream.makefile("rwb") as file:
            stream.close()
            self.assertIsNotNone(lease._connection.sock)
            file.write(b"hello")
            file.flush()
            self.assertEqual(file.read(5), b"hello")
        self.assertIsNone(lease._connection.sock)

    def test_a_detached_descriptor_keeps_its_lease_until_it_is_closed(self) -> None:
        """As `ssl` detaches a socket that it wraps."""
        stream = bridge_client.connect(SERVERS[0], agent=AGENT, timeout=10)
        lease = stream.lease
        assert lease is not None
        wrapped = socket.socket(fileno=stream.detach())
        wrapped.settimeout(10)
        del stream
        gc.collect()
        bridge_client.connect(SERVERS[0], agent=AGENT, wait=30, timeout=10).close()
        self.assertIsNotNone(lease._connection.sock)
        wrapped.sendall(b"hello")
        self.assertEqual(wrapped.recv(5), b"hello")
        wrapped.close()
        bridge_client.connect(SERVERS[0], agent=AGENT, wait=30, timeout=10).close()
        self.assertIsNone(lease._connection.sock)

    def test_a_port_that_another_program_has_bound_is_passed_over(self) -> None:
        taken = socket.socket()
        # Connections of other tests are in TIME_WAIT on it; a listener excludes further binds all the same.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with bridge_client.Agent(AGENT).acquire(SERVERS[0]) as lease:
            port = lease.port
        taken.bind(("", port))
        taken.listen()
        with taken:
            for _ in range(LAST - FIRST):
                with bridge_client.connect(SERVERS[0], agent=AGENT, wait=30, timeout=10) as stream:
                    self.assertNotEqual(stream.getsockname()[1], port)

    def test_a_lease_serves_udp(self) -> None:
        with bridge_client.Agent(AGENT).acquire(SERVERS[0], "udp") as lease:
            self.assertTrue(FIRST <= lease.port <= LAST)


class Failing(unittest.TestCase):
    def test_an_agent_that_does_not_run_is_named(self) -> None:
        with self.assertRaises(bridge_client.AgentError) as failed:
            bridge_client.connect(SERVERS[0], agent="/nonexistent/agent.sock")
        self.assertIn("/nonexistent/agent.sock", str(failed.exception))
        self.assertEqual(failed.exception.errno, errno.ENOENT)

    def test_a_destination_that_is_no_address_is_refused_here(self) -> None:
        with self.assertRaises(ValueError):
            bridge_client.connect(("not an address", 1), agent=AGENT)

    def test_a_refused_connection_leaves_no_lease(self) -> None:
        with self.assertRaises(ConnectionRefusedError):
            bridge_client.connect((SERVERS[0][0], 9), agent=AGENT, timeout=10)
        gc.collect()
        for _ in range(LAST - FIRST + 1):
            with self.assertRaises(ConnectionRefusedError):
                bridge_client.connect((SERVERS[0][0], 9), agent=AGENT, wait=30, timeout=10)


if __name__ == "__main__":
    unittest.main()
