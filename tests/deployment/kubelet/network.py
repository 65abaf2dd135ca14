"""A node's network: a bridge in a namespace of its own, and a namespace for each pod. Nothing else is reachable."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import signal
import subprocess
import threading

from helpers.hosts import CABLE, Host, NoNamespacesError, ip, namespaces
from helpers.needs import needs

_PREFIX = "tidewright-node"
_BRIDGE = "bridge"


@needs("hosts")
class Network:
    """Raises NoNamespacesError: this machine does not allow to make them."""

    def __init__(self) -> None:
        remove_those_of_the_dead()
        self._tag = f"{_PREFIX}-{os.getpid()}-{secrets.token_hex(2)}"
        self.node = Host(f"{self._tag}-0", "10.77.0.1")
        self._numbers = itertools.count(2)  # an address is never given twice
        self._lock = threading.Lock()
        try:
            ip("netns", "add", self.node.name)
            self._on_node("link", "set", "lo", "up")
            self._on_node("link", "add", _BRIDGE, "type", "bridge", "forward_delay", "0")
            self._on_node("address", "add", f"{self.node.address}/16", "dev", _BRIDGE)
            self._on_node("link", "set", _BRIDGE, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.remove()
            raise NoNamespacesError(str(getattr(error, "stderr", "") or error).strip()) from None

    def add(self) -> Host:
        """A new host on the bridge."""
        with self._lock:
            number = next(self._numbers)
            host = Host(f"{self._tag}-{number}", f"10.77.{number // 256}.{number % 256}")
            ip("netns", "add", host.name)
            port = f"port{number}"
            self._on_node("link", "add", "name", port, "type", "veth", "peer", "name", CABLE, "netns", host.name)
            self._on_node("link", "set", port, "master", _BRIDGE, "up")
            ip("-n", host.name, "address", "add", f"{host.address}/16", "dev", CABLE)
            ip("-n", host.name, "link", "set", "lo", "up")
            host.plug(is_in=True)
            return host

    def _on_node(self, *arguments: str) -> None:
        ip("-n", self.node.name, *arguments)

    def remove(self) -> None:
        for name in namespaces():
            if name.startswith(f"{self._tag}-"):
                delete(name)


def delete(name: str) -> None:
    """A namespace, and all processes in it."""
    with contextlib.suppress(subprocess.CalledProcessError):
        for number in ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)
        ip("netns", "delete", name)


def remove_those_of_the_dead() -> None:
    """Of runs that were killed."""
    for name in namespaces():
        found = re.match(rf"{_PREFIX}-(\d+)-", name)
        if found and not os.path.exists(f"/proc/{found[1]}"):
            delete(name)
