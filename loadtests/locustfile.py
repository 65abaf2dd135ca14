"""What locust loads: users, shape and recorder. It also works without `python -m loadtests`:

locust -f loadtests/locustfile.py --host http://127.0.0.1:8080
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # locust adds only this folder

import msgspec
from locust import LoadTestShape, events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import WORKER_REPORT_INTERVAL, MasterRunner, WorkerRunner

from loadtests import options, preflight
from loadtests.options import STOP, VARIABLE, Options
from loadtests.preflight import TargetError
from loadtests.recording import Recorder
from loadtests.shapes import users_at
from loadtests.users.grpc import GrpcUser
from loadtests.users.http import HttpUser
from loadtests.users.websocket import WebSocketUser

GIVEN = options.given()
SPAWN_RATE = 1000.0  # users a second: as many as the shape wants, at once
REPORT_PATIENCE = WORKER_REPORT_INTERVAL + 2.0  # seconds
USERS = {"http": HttpUser, "websocket": WebSocketUser, "grpc": GrpcUser}


def choose_users() -> None:
    """Workers have all kinds: the master says how many of which there are."""
    if "--worker" not in sys.argv:
        for name, user in USERS.items():
            user.weight = GIVEN.protocols.get(name, 0)
            user.abstract = user.weight == 0


choose_users()

if GIVEN.samples:  # started by `python -m loadtests`; else locust's own -u and -r say how many

    class Shape(LoadTestShape):
        """Ends after the duration, or when the file is there that asks for it."""

        _ended_at: float | None = None  # when the last user of the workers had ended

        def tick(self) -> tuple[int, float] | None:
            passed = self.get_run_time()
            users = users_at(GIVEN.shape, passed, GIVEN.duration, GIVEN.users)
            if users and not Path(GIVEN.samples).with_suffix(STOP).exists():
                return users, SPAWN_RATE
            if not isinstance(self.runner, MasterRunner):
                return None  # locust waits for running requests
            # A master that quits does not take what its workers still have to report.
            if self.runner.user_count or self._ended_at is None:
                self._ended_at = passed
            return (0, SPAWN_RATE) if passed < self._ended_at + REPORT_PATIENCE else None


@events.init_command_line_parser.add_listener
def add_arguments(parser: LocustArgumentParser) -> None:
    """The options are an argument so that locust's master sends them to workers on other machines."""
    parser.add_argument(
        "--tidewright", env_var=VARIABLE, default="{}", is_secret=True, help="Options of loadtests, as JSON."
    )


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> Recorder:
    """A worker whose master waits for it may hear that the test starts before locust says that it is initialized."""
    if not hasattr(environment, "tidewright"):
        environment.tidewright = Recorder(environment, GIVEN)  # type: ignore[attr-defined]
    recorder: Recorder = environment.tidewright  # type: ignore[attr-defined]
    return recorder


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    runner: Any = environment.runner
    recorder = prepare(environment)
    if isinstance(runner, WorkerRunner):
        assert environment.parsed_options
        recorder.options = msgspec.json.decode(environment.parsed_options.tidewright, type=Options)
        return
    if isinstance(runner, MasterRunner):
        recorder.processes = max(1, runner.worker_count)
    if not GIVEN.samples:
        url = (environment.host or GIVEN.url).rstrip("/")
        try:
            recorder.options = preflight.check(msgspec.structs.replace(GIVEN, url=url))
        except TargetError as error:
            print(f"Error: {error}", file=sys.stderr)
            environment.process_exit_code = 1
            runner.quit()
