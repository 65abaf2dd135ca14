"""Asks a gateway what an operator asks: whether it is one, whether it is ready, how its replicas are. Drains a replica.

Imports little, as control.py does. Not for generating text: that is client.py.
"""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

from tidewright.address import check_url, without_user
from tidewright.launch.control import WHICH_PORT, Answer, Question, TroubleError, UnreachableError
from tidewright.launch.errors import LaunchError

POLL_INTERVAL = 0.2  # seconds between two looks at a replica that drains
SETTLED = 2.0  # seconds; other workers of a gateway notice a change up to a second later
STATUS_TIMEOUT = 60.0  # seconds
NO_KEYS = (
    "the key store of the gateway is empty, so every API key is refused (401): restore it, or create keys with "
    "`tidewright keys create`"
)


class ReplicaState(NamedTuple):
    """A replica, as the gateway sees it."""

    address: str
    trouble: str
    """Why it takes no requests; empty if it does."""
    draining: bool
    in_flight: int
    """Generations of this gateway there."""


class Gateway:
    """One that `find` has found."""

    def __init__(self, url: str, key: str | None, ready: Answer) -> None:
        """`ready`: its answer to GET /health/ready."""
        self._url, self._key, self._ready = url, key, ready

    def check(self, timeout: float) -> list[str]:
        """What is wrong with a gateway that can take requests all the same, a line each.

        Raises:
            TroubleError: it can't take requests.
        """
        if self._ready.status != 200:
            raise TroubleError("; ".join([self.health["not_ready"], *self._troubles(timeout)]))
        told = self.health
        is_empty = bool(told.get("key_store_empty"))
        lost = [name for name in told.get("lost_stores", ()) if not (is_empty and name == "keys")]
        lines = [NO_KEYS] * is_empty + [f"the gateway has lost its store of {name}" for name in lost]
        if names := told.get("models_in_trouble"):
            lines.append(f"models that no replica can serve: {', '.join(names)}")
        if number := told.get("replicas_in_trouble"):
            lines += self._troubles(timeout) or [f"replicas that take no requests: {number}"]
        return lines

    def _troubles(self, timeout: float) -> list[str]:
        """Of each replica that takes no requests; nothing if the gateway does not tell."""
        try:
            states = self.replicas(timeout)
        except LaunchError:
            return []
        return [f"{state.address}: {state.trouble}" for state in states if state.trouble]

    @property
    def health(self) -> dict[str, Any]:
        """What it tells everybody of itself; if it is not ready, why, as `not_ready`."""
        if self._ready.status != 200:
            return {"not_ready": refusal(self._url, self._ready, self._key)}
        told = json.loads(self._ready.content)
        return told if isinstance(told, dict) else {}

    def status(self, timeout: float) -> dict[str, Any]:
        """All that it tells of itself. Needs a key with the role admin, where keys are needed.

        Raises:
            TroubleError: the gateway refuses to tell.
            UnreachableError, NoAnswerError: as `Question`.
        """
        return self._ask("/admin/status", None, timeout, "replicas")

    def replicas(self, timeout: float) -> list[ReplicaState]:
        """As `status`."""
        found = self.status(timeout)["replicas"]
        return [ReplicaState(*(one[name] for name in ReplicaState._fields)) for one in found]

    def drain(self, replica: str | None, timeout: float) -> str:
        """Begins to drain a replica, of which there is only one if it is not named; returns its address.

        Raises:
            TroubleError: there is no such replica, it did not accept, or the gateway refuses.
            UnreachableError, NoAnswerError: as `Question`.
        """
        return str(self._ask("/admin/drain", {"replica": replica} if replica else {}, timeout, "draining")["draining"])

    def command(self, path: str, body: dict[str, Any], timeout: float) -> None:
        """Has an operator's command obeyed whose answer says nothing more. Raises as `drain`."""
        self._answer(path, body, timeout)

    def models(self, timeout: float) -> list[dict[str, Any]]:
        """As GET /v1/models has them. Raises as `status`."""
        return list(self._ask("/v1/models", None, timeout, "data")["data"])

    def wait_ended(self, replica: str) -> None:
        """Returns once the gateway no longer sees the replica drain, or ends itself.

        Raises:
            TroubleError, NoAnswerError: the gateway does not tell.
        """
        quiet_since = None
        while quiet_since is None or time.monotonic() - quiet_since < SETTLED:
            time.sleep(POLL_INTERVAL)
            try:
                states = {state.address: state for state in self.replicas(STATUS_TIMEOUT)}
            except UnreachableError:
                return  # as that of `tidewright serve`, which ends with its replica
            state = states.get(replica)
            if state is None:
                return
            if state.draining or (state.trouble and state.in_flight):
                quiet_since = None
            else:
                quiet_since = quiet_since or time.monotonic()

    def _ask(self, path: str, body: dict[str, Any] | None, timeout: float, field: str) -> dict[str, Any]:
        """The answer, which has this field."""
        answer = self._answer(path, body, timeout)
        try:
            told = json.loads(answer.content)
        except ValueError:
            told = None
        if not isinstance(told, dict) or field not in told:
            raise TroubleError(f"{self._url}{path} did not answer as a gateway does")
        return told

    def _answer(self, path: str, body: dict[str, Any] | None, timeout: float) -> Answer:
        answer = Question(self._url + path, body, timeout, self._key).response(timeout)
        if answer.status != 200:
            raise TroubleError(refusal(self._url, answer, self._key))
        return answer


def base_url(url: str, option: str = "--url") -> str:
    """Of a server. http:// may be left out; /v1, which OpenAI's clients need, and /metrics may be there.

    Raises:
        LaunchError: it is no address; `option` is where it was given.
    """
    given = url.strip()
    made = (given if "://" in given else f"http://{given}").rstrip("/").removesuffix("/v1").removesuffix("/metrics")
    try:
        check_url(made, "http", "https")
    except ValueError as error:
        raise LaunchError(
            f"{option} {without_user(url)!r} is no address of a server, such as http://127.0.0.1:8000: {error}"
        ) from None
    return made


def is_strange(answer: Answer) -> bool:
    """Neither a gateway gives it nor Triton, which has no such path."""
    return answer.status == 200 and not answer.content.lstrip().startswith(b"{")


def strange(url: str) -> str:
    """What to say of a server that answers what it should not have."""
    return f"{url} answers, but is neither Triton's HTTP port nor a gateway: perhaps a port of metrics; {WHICH_PORT}"


def find(url: str, key: str | None, timeout: float) -> Gateway | None:
    """The gateway at a base URL; None if it is something else. The key is sent only later, and only to a gateway.

    Raises:
        UnreachableError, NoAnswerError: as `Question`.
        TroubleError: it is neither a gateway nor a Triton.
    """
    ready = Question(f"{url}/health/ready", None, timeout).response(timeout)
    if _is_gateway(ready):
        return Gateway(url, key, ready)
    if is_strange(ready):
        raise TroubleError(strange(url))
    return None


def _is_gateway(ready: Answer) -> bool:
    try:
        told = json.loads(ready.content)
    except ValueError:
        return False
    return error_of(ready) is not None or (isinstance(told, dict) and told.get("status") == "ready")


def error_of(answer: Answer) -> dict[str, Any] | None:
    """The error of a gateway's answer; None if it has none, or is of another server.

    Triton's errors are texts; those of other servers with OpenAI's API have a number as their code, or none.
    """
    try:
        error = json.loads(answer.content)["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return error if isinstance(error, dict) and isinstance(error.get("code"), str) and "message" in error else None


def refusal(url: str, answer: Answer, key: str | None) -> str:
    """What a gateway's error means to the user of a command. `key`: the one that was sent; it is not shown."""
    error = error_of(answer)
    if error is None:
        return f"{url} answered with status {answer.status}"
    after = answer.retry_after or ""
    return meaning(url, answer.status, error["code"], str(error["message"]), after if after.isdecimal() else "", key)


def meaning(url: str, status: int | None, code: str | None, message: str, retry_after: str, key: str | None) -> str:
    """The same of an error's fields. `retry_after`: seconds, or empty."""
    if code == "no_such_path":
        return f"{url} is no address of a gateway ({message}); give http://HOST:PORT, without a path"
    if status == 401:
        if key is None:
            return f"{url} requires an API key; give one with --key-file, or in TIDEWRIGHT_KEY"
        return f"{url} refuses the API key: {message}"
    if "try again" not in message and retry_after:
        message += f"; try again in {retry_after} s"
    return message
