"""Watches one model of a running Triton, and loads it again when its stub is dead or stuck.

Nothing here blocks: a task is a generator that yields while it waits, and the watchdog steps all tasks in turn.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Callable

import msgspec
import psutil

from tidewright.launch.control import (
    DeadStubError,
    NoAnswerError,
    TroubleError,
    UnreachableError,
    Waiting,
    ask,
    text_of,
)
from tidewright.launch.errors import LaunchError
from tidewright.launch.repository import INDEX, is_away, is_loading, why_away
from tidewright.launch.server import TritonServer
from tidewright.schema import DRAINING, EMBED, STUCK, DecoderStatus
from tidewright.served_models import chain_of

PROBE_INTERVAL = 1.0  # seconds
PROBE_PATIENCE = 10.0  # seconds without an answer; then a closer look
LOOK_PATIENCE = 5.0  # seconds of the closer look; without an answer the stub is stuck, unless it computes
COMPUTES = 0.3  # of a core
HUNG_AFTER = 60.0  # seconds after which even a stub that computes is stuck
# A token is asked for when nobody got an answer in the last interval, so after one to two of them. In seconds.
GENERATION_INTERVALS = {"failsafe": 15.0, "decoder": 15.0, "fallback": 60.0}
SUSPECT_PATIENCE = 10.0  # seconds for a token, of a model that may be stuck
HOPELESS_WITHIN = 30.0  # seconds after a reload in which it must not be stuck again
SILENT = 2.0  # seconds without a sign of life of an engine, which its bridge deals with
RELOAD_INTERVAL = 5.0  # seconds between attempts to load a model that would not load
RELOAD_PATIENCE = 60.0  # seconds of such attempts
DOWN_INTERVAL = 10.0  # seconds until a further model that stays down is tried again; twice as many each time
DOWN_INTERVAL_LIMIT = 600.0  # seconds

DIED = "died"
# Answers that a model gave, in Triton's metrics: a counter, and its labels.
_ANSWERS = {
    "failsafe": ("tidewright_failsafe_requests_served_total", r'by="\w+"'),
    "decoder": ("tidewright_requests_finished_total", r'reason="(?:stop|length)"'),
    "fallback": ("tidewright_fallback_requests_finished_total", r'reason="(?:stop|length)"'),
}
_FIRST = {"priority": -(2**31)}  # ahead of all that waits
_ONE_TOKEN = {**_FIRST, "max_tokens": 1, "temperature": 0, "ignore_eos": True}


# How many of a model's checks run while another is loaded: one of Triton's HTTP threads is busy with that, and answers
# nothing else meanwhile. Health bears it, as its question is asked again and the repository says who is loaded.
ALL_CHECKS, HEALTH_ALONE, NO_CHECKS = 2, 1, 0


class HopelessError(LaunchError):
    """Loading the model again does not help; a restart of Triton may, if it is worth that to the first model."""


class DrainingError(LaunchError):
    """Someone asked the server to end."""


class ModelWatch:
    """`step` it several times a second.

    The first model's do all that may help, up to a restart of Triton. One beside it costs the others nothing: if it
    does not come back it stays unloaded, and is tried again later.
    """

    def __init__(
        self,
        server: TritonServer,
        model: str,
        say: Callable[[str], None],
        say_well: Callable[[str], None],
        lost: Callable[[], None],
    ) -> None:
        """`say` and `say_well`: as a watchdog's. `lost` is called when its process is gone, with all that it was at."""
        self._server, self._model, self._say, self._say_well, self._lost = server, model, say, say_well, lost
        # A model beside the first has a decoder_NAME, whose metrics have its name as a label.
        self._kind, _, self._name = model.partition("_")
        if answers := _ANSWERS.get(self._kind):
            counter, labels = answers
            of_model = f'model="{re.escape(self._name)}",' if self._name else ""
            self._answered = re.compile(rf"^{counter}\{{{of_model}{labels}\}} (\S+)", re.MULTILINE)
        self._url = f"{server.http_url}/v2/models/{model}"
        self._patience = server.settings.heartbeat_timeout  # for a token: a step may take as long
        # When to look next at what it generates, and when it was loaded again, if ever: time.monotonic().
        self._due = time.monotonic() + GENERATION_INTERVALS.get(self._kind, 0.0)
        self._loaded_at = -math.inf
        self._suspected = False
        self._answers: float | None = None
        self.leaves = ALL_CHECKS
        """What the others may have of their checks meanwhile."""
        self.is_wanted = True
        """Nobody has unloaded it since it was loaded."""
        self._mends = False  # is loading the model, or about to
        self._stays_down = False  # about to, in a while
        self._down_interval = DOWN_INTERVAL
        self._stub = server.stub(model)
        generates = self._kind in GENERATION_INTERVALS
        self._checks = (self._check, self._check_generation) if generates else (self._check,)
        self._tasks: list[Waiting[str]] = []
        self.allow(ALL_CHECKS)

    def step(self) -> None:
        """Raises DrainingError, and HopelessError of a model that is not beside the first."""
        for task in self._tasks:
            try:
                following = self._following(task)
            except HopelessError as error:
                if not self._name:
                    raise
                following = [self._stay_down(str(error))]
            if following is None:
                continue
            self._replace_tasks(following)
            if not following:
                self.allow(ALL_CHECKS)
            return

    def _following(self, task: Waiting[str]) -> list[Waiting[str]] | None:
        """Take a task one step further: None if it goes on, else what mends what it has found, or nothing."""
        try:
            next(task)
            return None
        except StopIteration as end:
            why = end.value
        except (HopelessError, DrainingError):
            raise
        except Exception as error:  # of ours, or of a system without memory or files: try again
            self._say(f"watching {self._model} failed, and goes on: {error!r}")
            why = "may be gone" if self._mends else ""
        return [self._mend(why)] if why else []

    def suspect(self) -> None:
        """A model that called this one is gone: the thread that sends its responses may wait for it for ever."""
        self._due, self._suspected, self._loaded_at = time.monotonic(), True, -math.inf

    def load(self) -> None:
        """Of a model beside the first, with its chain: Triton was started again, with the first alone."""
        self._replace_tasks([self._come_up()])

    @property
    def is_down(self) -> bool:
        """It takes no requests, and will not without somebody's doing, or not soon."""
        return not self.is_wanted or self._stays_down

    def give_up(self) -> None:
        """Somebody has unloaded the rest of its chain: do not try to load it again."""
        if self._stays_down:
            self._say(f"{self._model} was unloaded by request, and is not tried again")
            self._replace_tasks([])
            self._mends = self._stays_down = self.is_wanted = False
            self.allow(ALL_CHECKS)

    def allow(self, checks: int) -> None:
        """Run so many of the checks: while another model is loaded, not all."""
        if not self._mends:
            stopped, self._tasks = self._tasks[checks:], self._tasks[:checks]
            for task in stopped:
                task.close()
            self._tasks += [check() for check in self._checks[len(self._tasks) : checks]]

    def _mend(self, why: str) -> Waiting[str]:
        """Raises HopelessError."""
        # One of the first that has died is always loaded again: a restart of Triton would do no more.
        if (self._name or why != DIED) and time.monotonic() - self._loaded_at < HOPELESS_WITHIN:
            raise HopelessError(f"the stub of {self._model} {why} after it was loaded again")
        return self._reload(why)

    def _replace_tasks(self, tasks: list[Waiting[str]]) -> None:
        for task in self._tasks:
            task.close()
        self._tasks = tasks

    def _check(self) -> Waiting[str]:
        """Asks how the model is; returns what is wrong.

        A model that someone has unloaded stays so: it is theirs to load it again. That is only said.
        """
        was_away, told = False, ""
        while True:
            try:
                yield from self._ask_how_it_is(PROBE_PATIENCE)
                self.is_wanted = True
                if was_away:
                    self._stub, was_away = self._server.stub(self._model), False
                if told:
                    self._say_well(f"{self._model} is loaded again")
                    told = ""
            except DeadStubError:
                return DIED
            except NoAnswerError:
                if (yield from self._is_stuck()):
                    return "does not answer"
            except TroubleError as error:
                # An engine that is down comes up again by itself.
                if str(error) == DRAINING and self._kind == "decoder":
                    raise DrainingError(DRAINING) from None
                if str(error).startswith(STUCK):
                    return f"is {error}"
                was_away = True
                if is_away(error) and (why := (yield from self._why_away())) and why != told:
                    self._say(f"{why}; until then it takes no requests")
                    self.is_wanted, told = False, why
            except UnreachableError:  # Triton is about to end
                pass
            yield from pause(PROBE_INTERVAL)

    def _why_away(self) -> Waiting[str]:
        try:
            index = yield from ask(f"{self._server.http_url}{INDEX}", {}, LOOK_PATIENCE)
        except LaunchError:
            return ""
        return why_away(index, self._server.http_url, self._model)

    def _ask_how_it_is(self, patience: float) -> Waiting[bytes]:
        if self._kind == "tokenizer":
            text = {"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}
            return ask(f"{self._url}/infer", {"inputs": [text]}, patience)
        return ask(f"{self._url}/generate", {"control": "health"}, patience)

    def _is_stuck(self) -> Waiting[bool]:
        """After a question without an answer."""
        began = time.monotonic()
        while True:
            used = self._cpu_seconds()
            try:
                yield from self._ask_how_it_is(LOOK_PATIENCE)
                return False
            except NoAnswerError:
                computes = self._cpu_seconds() - used > COMPUTES * LOOK_PATIENCE
                if not computes or time.monotonic() - began > HUNG_AFTER:
                    return (yield from self._triton_answers()) and not (yield from self._loads_another())
            except LaunchError:
                return False  # the next question shows what is wrong

    def _cpu_seconds(self) -> float:
        """That the stub has used."""
        if self._stub is not None:
            with contextlib.suppress(psutil.Error):
                times = self._stub.process.cpu_times()
                return times.user + times.system
        return 0.0

    def _triton_answers(self) -> Waiting[bool]:
        """If it does not, the model is not to blame."""
        try:
            yield from ask(f"{self._server.http_url}/v2/health/live", None, LOOK_PATIENCE)
        except LaunchError:
            return False
        return True

    def _loads_another(self) -> Waiting[bool]:
        """One of Triton's HTTP threads loads a model, as somebody asked it to, and this question may have met it."""
        try:
            index = yield from ask(f"{self._server.http_url}{INDEX}", {}, LOOK_PATIENCE)
        except LaunchError:
            return True
        return is_loading(index)

    def _check_generation(self) -> Waiting[str]:
        """Asks for a token if nobody got an answer lately; returns what is wrong."""
        while True:
            while time.monotonic() < self._due:
                yield
            if self._suspected:
                why = yield from self._generate(SUSPECT_PATIENCE)
            elif (yield from self._somebody_got_an_answer()):
                why = ""
            else:
                why = yield from self._generate(self._patience)
            # Only now: what a reload of another model cuts short is asked again after it.
            self._due, self._suspected = time.monotonic() + GENERATION_INTERVALS[self._kind], False
            if why:
                return why

    def _somebody_got_an_answer(self) -> Waiting[bool]:
        """Since the last look."""
        try:
            text = yield from ask(self._server.metrics_url, None, LOOK_PATIENCE)
        except LaunchError:
            return False
        before, self._answers = self._answers, sum(map(float, self._answered.findall(text.decode())))
        return before is not None and self._answers > before

    def _generate(self, patience: float) -> Waiting[str]:
        """What is wrong if no answer comes. That the server is full, or the time over, is one."""
        embeds = self._kind == "decoder" and self._server.embeds(self._model)
        sampling = {**(_FIRST if embeds else _ONE_TOKEN), "timeout": patience / 2}
        body = {"input_ids": [0], "sampling_parameters": json.dumps(sampling), **({EMBED.name: True} if embeds else {})}
        try:
            yield from ask(f"{self._url}/generate", body, patience)
        except DeadStubError:
            return DIED
        except NoAnswerError:
            if (yield from self._should_generate()):
                return f"generated nothing for {patience:g} s"
        except LaunchError:
            pass
        return ""

    def _should_generate(self) -> Waiting[bool]:
        """It says of itself that it can. If not, its bridge knows, and does what can be done."""
        if self._model == "failsafe":
            return (yield from self._triton_answers())
        try:
            answer = yield from ask(f"{self._url}/generate", {"control": "status"}, LOOK_PATIENCE)
            status = msgspec.json.decode(text_of(answer), type=DecoderStatus)
        except (LaunchError, ValueError):
            return False
        return not status.trouble and status.silence < SILENT

    def _reload(self, why: str) -> Waiting[str]:
        self._say(f"the stub of {self._model} {why}; requests in it are lost; loading the model again")
        self._mends, self.leaves = True, NO_CHECKS
        began = time.monotonic()
        yield from self._take_away()
        while True:
            try:
                yield from self._load(self._model)
                break
            except LaunchError as error:
                if time.monotonic() - began > RELOAD_PATIENCE:
                    raise HopelessError(f"could not load {self._model} again: {error}") from None
                self._say(f"{self._model} could not be loaded again: {error}; trying again in {RELOAD_INTERVAL:g} s")
            yield from pause(RELOAD_INTERVAL)
        return self._is_back(began)

    def _stay_down(self, why: str) -> Waiting[str]:
        """Leave a model beside the first unloaded for a while, and try it again from time to time."""
        began, self._mends, self.leaves = time.monotonic(), True, NO_CHECKS
        if began - self._loaded_at > HOPELESS_WITHIN:
            self._down_interval = DOWN_INTERVAL
        while True:
            yield from self._take_away()
            wait, self._down_interval = self._down_interval, min(2 * self._down_interval, DOWN_INTERVAL_LIMIT)
            self._say(f"{why}; it stays unloaded, and the other models go on; trying again in {wait:g} s")
            self.leaves = ALL_CHECKS
            self._stays_down = True
            yield from pause(wait)
            self._stays_down = False
            try:
                yield from self._load(*self._chain)
                return self._is_back(began)
            except LaunchError as error:
                why = f"could not load {self._model}: {error}"

    def _come_up(self) -> Waiting[str]:
        began, self._mends = time.monotonic(), True
        try:
            yield from self._load(*self._chain)
        except LaunchError as error:
            raise HopelessError(f"could not load {self._model}: {error}") from None
        return self._is_back(began)

    @property
    def _chain(self) -> tuple[str, ...]:
        """What is loaded with it: its tokenizer may be away as well, and so is what calls both."""
        return chain_of(self._name) if self._kind == "decoder" else (self._model,)

    def _take_away(self) -> Waiting[None]:
        """Kill its stub, in whatever state it is, and unload it."""
        self._stub = self._server.stub(self._model) or self._stub
        if self._stub:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._stub.process.kill()
        self._lost()
        try:
            yield from ask(f"{self._in_repository(self._model)}/unload", {}, PROBE_PATIENCE)
        except LaunchError as error:
            self._say(f"{self._model} could not be unloaded: {error}")

    def _load(self, *models: str) -> Waiting[None]:
        """Raises LaunchError."""
        self.leaves = HEALTH_ALONE if self._name else NO_CHECKS
        for model in models:
            yield from ask(f"{self._in_repository(model)}/load", {}, self._server.settings.start_timeout + 10)

    def _in_repository(self, model: str) -> str:
        return f"{self._server.http_url}/v2/repository/models/{model}"

    def _is_back(self, began: float) -> str:
        if self._stub:
            self._server.remove_region(self._stub.region)
        self._mends, self.leaves, self._stub = False, ALL_CHECKS, self._server.stub(self._model)
        self._due, self._suspected, self._loaded_at = time.monotonic(), True, time.monotonic()
        self._say(f"{self._model} is back after {time.monotonic() - began:.1f} s")
        return ""


def pause(seconds: float) -> Waiting[None]:
    until = time.monotonic() + seconds
    yield
    while time.monotonic() < until:
        yield
