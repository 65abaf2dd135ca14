"""Several worker processes on one port: limits and metrics are those of all, and one that dies is replaced."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway

LIMIT = 4


def workers(gateway: RunningGateway) -> list[psutil.Process]:
    children = psutil.Process(gateway.process.pid).children()
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if "spawn_main" in " ".join(child.cmdline())]


def wait(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask(gateway: RunningGateway, number: int) -> int:
    """The status, on a connection of its own; 0 if it breaks."""
    body = {"model": MODEL, "prompt": f"Hi {number}", "max_tokens": 3, "temperature": 0}
    try:
        return httpx.post(f"{gateway.url}/v1/completions", json=body, timeout=60, trust_env=False).status_code
    except httpx.TransportError:
        return 0


def test_limits_hold_over_all_workers_and_a_killed_one_gives_back_its_places(model_dir: Path) -> None:
    # Closed: while the limits can't be reached, requests are refused, so that one too many would be seen.
    options = {"workers": 2, "limit_concurrent": LIMIT, "limits_when_lost": "closed"}
    options |= {"generation_probe_interval": 0, "first_token_timeout": 300}  # the replica is to say nothing for a while
    with EchoReplica() as replica, RunningGateway(model_dir, replica, **options) as gateway:
        wait(lambda: len(workers(gateway)) == 2 and gateway.metric("replica_up") == 1)
        replica.go_on.clear()
        with ThreadPoolExecutor(32) as pool:
            jobs: list[Future[int]] = []
            refused = 0
            while refused < 4:
                jobs.append(pool.submit(ask, gateway, len(jobs)))
                wait(lambda: gateway.metric("requests_active") - 1 + sum(job.done() for job in jobs) >= len(jobs))
                refused = sum(job.done() for job in jobs)
            assert [job.result() for job in jobs if job.done()] == [429] * 4
            assert replica.wait_running(LIMIT, 10)
            victim, other = workers(gateway)
            victim.kill()
            wait(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE)
            wait(lambda: len(workers(gateway)) == 2)
            assert other in workers(gateway)
            broken = sum(job.done() and job.result() == 0 for job in jobs)
            assert replica.wait_running(LIMIT - broken, 10)
            again = [pool.submit(ask, gateway, 100 + number) for number in range(broken)]
            assert replica.wait_running(LIMIT, 30)
            replica.go_on.set()
            kept = [job.result() for job in [*jobs, *again] if job.result() not in (0, 429)]
            assert kept == [200] * LIMIT
        assert gateway.metric("requests_total", path="/v1/completions", status="429") >= 4
        left = workers(gateway)
        gateway.process.kill()
        wait(lambda: not any(worker.is_running() for worker in left))
        gateway.process.wait()


def test_a_worker_that_is_held_up_for_a_while_is_kept(model_dir: Path) -> None:
    with EchoReplica() as replica, RunningGateway(model_dir, replica, workers=2) as gateway:
        wait(lambda: len(workers(gateway)) == 2 and gateway.metric("replica_up") == 1)
        held, other = workers(gateway)
        held.suspend()
        time.sleep(7)  # uvicorn's own patience is 5 s; the parent looks every half second
        held.resume()
        wait(lambda: ask(gateway, 0) == 200)
        assert workers(gateway) == [held, other]


def test_a_setting_that_no_worker_can_use_is_one_clear_line(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("keys: [")
    gateway = RunningGateway(model_dir, workers=2, keys=tmp_path / "keys.yaml", replicas="127.0.0.1:1")
    done = gateway.run_to_its_end()
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "keys.yaml" in done.stderr
    assert "Traceback" not in done.stderr
