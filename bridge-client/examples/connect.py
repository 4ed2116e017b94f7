"""Bind before connect in Python: python3 connect.py /run/bridge/agent.sock 192.168.31.67 443"""

import http.client
import json
import socket
import sys


def connect(agent, address, port):
    lease = http.client.HTTPConnection("bridge")
    lease.sock = socket.socket(socket.AF_UNIX)  # the lease lasts as long as this is open
    lease.sock.connect(agent)
    lease.request("POST", "/v1/leases", json.dumps({"destination": f"{address}:{port}"}))
    answer = json.load(lease.getresponse())
    if "leases" not in answer:
        raise OSError(answer["error"])
    stream = socket.socket()
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    stream.bind(("", answer["leases"][0]["port"]))
    stream.connect((address, port))
    return stream, lease


stream, lease = connect(sys.argv[1], sys.argv[2], int(sys.argv[3]))
print(stream.getsockname()[1])
