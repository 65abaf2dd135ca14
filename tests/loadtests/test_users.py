"""loadtests/users, in a process of their own: to import locust changes a process for good (gevent)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from loadtests.samples import NO_CONNECTION, SILENT

CALLS = """
import json, random, socket
from loadtests.lengths import Lengths
from loadtests.options import Options
from loadtests.users.base import RequestError, Tokens, Wanted
from loadtests.users.http import HttpCaller
from loadtests.users.websocket import WebSocketCaller

for kind in (HttpCaller, WebSocketCaller):
    for accepts in (False, True):
        listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        waiting = [] if accepts else [socket.socket() for _ in range(4)]
        for one in waiting:  # with a queue that is full the kernel answers nobody
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        caller = kind(Options(url=f"http://127.0.0.1:{listener.getsockname()[1]}", silence=1.0))
        try:
            caller.call(Wanted(random.Random(0), Lengths("", 4, 4), "", 0), Tokens())
        except RequestError as error:
            print(json.dumps([kind.__name__, accepts, str(error)]))
"""


def test_a_connection_that_does_not_come_is_no_stream_without_an_end() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, cwd=root)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        ["HttpCaller", False, NO_CONNECTION],
        ["HttpCaller", True, f"{SILENT}1 s"],
        ["WebSocketCaller", False, NO_CONNECTION],
        ["WebSocketCaller", True, NO_CONNECTION],  # nobody has taken its `open`
    ], done.stderr
