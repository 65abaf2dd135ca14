"""What a soak runs against: a gateway in front of two replicas, each a `tidewright serve` of its own."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import psutil

from loadtests.servers import Command, Server, ServerError
from tidewright.bench.machine import family, free_ports, process_name

NUM_REPLICAS = 2
_USABLE = re.compile(r"^tidewright_gateway_replicas_usable ([\d.]+)", re.MULTILINE)
_FLAGS = ("--shutdown-grace=2",)


class Cluster:
    def __init__(self, replicas: Sequence[Server], gateway: Command, port: int) -> None:
        self.replicas, self._gateway = replicas, gateway
        self.url = f"http://127.0.0.1:{port}"

    def roots(self) -> list[tuple[str, int]]:
        """Name and process, of each part."""
        replicas = [(f"replica {number}", replica.pid) for number, replica in enumerate(self.replicas, 1)]
        return [*replicas, ("gateway", self._gateway.process.pid)]

    def usable(self) -> int:
        """Replicas that the gateway sends requests to."""
        try:
            answer = httpx.get(f"{self.url}/metrics", timeout=5, trust_env=False)
        except httpx.TransportError:
            return 0
        found = _USABLE.search(answer.text)
        return int(float(found[1])) if found else 0

    def wait_whole(self, seconds: float) -> bool:
        """Until all replicas are usable; False if that takes longer."""
        deadline = time.monotonic() + seconds
        while self.usable() < NUM_REPLICAS:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)
        return True

    def find(self, replica: int, what: str) -> psutil.Process | None:
        """The oldest process of a replica with this name: another engine stands by beside the one that works."""
        found = []
        with contextlib.suppress(psutil.Error):
            for process in family(self.replicas[replica].pid):
                with contextlib.suppress(psutil.Error):
                    if process.status() != psutil.STATUS_ZOMBIE and process_name(process) == what:
                        found.append(process)
        return min(found, key=psutil.Process.create_time, default=None)


@contextlib.contextmanager
def running(folder: Path, more: Sequence[str] = ()) -> Iterator[Cluster]:
    """`folder`: for their logs. `more`: flags of `tidewright serve`.

    Raises:
        ServerError: a part did not start.
    """
    with contextlib.ExitStack() as stack:  # all of it is stopped, also if a stop is interrupted
        replicas = []
        for number in range(1, NUM_REPLICAS + 1):
            log = folder / f"replica-{number}.log"
            replicas.append(Server(with_gateway=False, more=[*_FLAGS, *more], log=log))
            stack.callback(replicas[-1].command.stop)
        for replica in replicas:
            replica.wait_ready()
        (port,) = free_ports(1)
        addresses = ",".join(replica.grpc_url for replica in replicas)
        gateway = Command(
            ["gateway", f"--port={port}", f"--replicas={addresses}", "--fallback=false"], folder / "gateway.log"
        )
        stack.callback(gateway.stop)
        gateway.wait_for(f"http://127.0.0.1:{port}/health/ready")
        cluster = Cluster(replicas, gateway, port)
        if not cluster.wait_whole(60):
            raise ServerError("the gateway does not find both replicas healthy")
        yield cluster
