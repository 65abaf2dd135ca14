"""Watches a server from outside, for what nobody inside can see: a dead or stuck stub, or Triton itself gone."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable

from tidewright.launch.control import NoAnswerError, Waiting, ask
from tidewright.launch.errors import LaunchError
from tidewright.launch.gateway_process import GatewayProcess
from tidewright.launch.memory_balance import MemoryBalance
from tidewright.launch.model_watch import DrainingError, HopelessError, ModelWatch, pause
from tidewright.launch.server import ANSWER_TIME, TritonServer
from tidewright.served_models import chain_of, decoder_of, further_name

ROUND = 0.2  # seconds between two looks
LIVE_INTERVAL = 2.0  # seconds between two questions to Triton itself
LIVE_PATIENCE = 3.0  # seconds for an answer
HANG_AFTER = 20.0  # seconds in which Triton answered none of several
MAX_RESTARTS = 3  # of Triton, within RESTART_WINDOW; whoever started us may know better than to try once more
RESTART_WINDOW = 600.0  # seconds
CALLED_BY_FAILSAFE = ("decoder", "fallback")


class Watchdog:
    def __init__(
        self,
        server: TritonServer,
        gateway: GatewayProcess | None,
        say: Callable[[str], None],
        say_well: Callable[[str], None] | None = None,
    ) -> None:
        """`say` gets what is wrong and what is done about it, `say_well` that all is well again; else `say` does."""
        self._server, self._gateway, self._tell, self._tell_well = server, gateway, say, say_well or say
        self._restarts: deque[float] = deque(maxlen=MAX_RESTARTS)  # when (time.monotonic())
        self._further = {decoder_of(one.name): one.load for one in server.settings.models}
        self._begin(self._further)

    def run(self) -> bool:
        """Until Triton ends and stays so (False), or someone has asked for a drain (True)."""
        while True:
            try:
                if not self._server.running and not self._start_again(f"ended with code {self._server.exit_code}"):
                    return False
                self._look()
            except DrainingError:
                return True
            except HopelessError as error:
                if not self._start_again(f"does not serve: {error}"):
                    return False
            except Exception as error:  # of ours, or of a system without memory or files; nobody else would watch
                self._say(f"the watchdog failed, and goes on: {error!r}")
                self._live = self._listen()
            time.sleep(ROUND)

    def _begin(self, wanted: dict[str, bool]) -> None:
        """With a server that is up. `wanted`: the decoders beside the first, and whether they are to be loaded."""
        self._live = self._listen()
        engines = sorted(self._server.models_with_engine)
        self._models = {
            model: ModelWatch(self._server, model, self._say, self._say_well, functools.partial(self._lost, model))
            for model in ("tokenizer", "failsafe", *_tokenizers(engines), *engines)
        }
        for model, is_wanted in wanted.items():
            self._models[model].is_wanted = is_wanted
        self._memory = MemoryBalance(self._server, lambda decoder: self._models[decoder].is_down)

    def _look(self) -> None:
        """Raises HopelessError and DrainingError."""
        next(self._live)
        for watch in self._models.values():
            watch.step()
        for decoder in self._further:
            self._give_up_if_unloaded(decoder)
        self._memory.step()
        checks = min(watch.leaves for watch in self._models.values())
        for watch in self._models.values():
            watch.allow(checks)
        if self._gateway and not self._gateway.running:
            self._say(f"the gateway ended with code {self._gateway.exit_code}; starting it again")
            self._gateway.start()

    def _listen(self) -> Waiting[None]:
        """Is there anybody? Raises HopelessError."""
        patience, answered_at = HANG_AFTER, time.monotonic()
        while True:
            try:
                yield from ask(f"{self._server.http_url}/v2/health/live", None, LIVE_PATIENCE)
                patience, answered_at = HANG_AFTER, time.monotonic()
            except NoAnswerError:  # the next comes on a new connection: one of Triton's threads may be loading a model
                pass
            except LaunchError:  # it takes no connections while it ends
                patience = HANG_AFTER + self._server.settings.shutdown_grace + ANSWER_TIME
            if time.monotonic() - answered_at > patience:
                raise HopelessError(f"no answer for {patience:g} s")
            yield from pause(LIVE_INTERVAL)

    def _give_up_if_unloaded(self, decoder: str) -> None:
        """Its tokenizer is unloaded, too: where the decoder is away already, nothing else shows what somebody wants."""
        tokenizer = chain_of(further_name(decoder))[0]
        for one, other in ((decoder, tokenizer), (tokenizer, decoder)):
            if not self._models[other].is_wanted:
                self._models[one].give_up()

    def _lost(self, model: str) -> None:
        for other in CALLED_BY_FAILSAFE if model == "failsafe" else ():
            if other in self._models:
                self._models[other].suspect()

    def _start_again(self, why: str) -> bool:
        """Triton aborts by itself when, for one, a stub is killed while it holds a lock of their shared memory."""
        if self._server.asked_to_end:
            return False
        self._say(f"tritonserver {why}; its requests are lost")
        while True:
            began = time.monotonic()
            if len(self._restarts) == MAX_RESTARTS and began - self._restarts[0] < RESTART_WINDOW:
                self._say(f"tritonserver was started {MAX_RESTARTS} times within {RESTART_WINDOW:g} s; giving up")
                return False
            self._restarts.append(began)
            self._say("starting tritonserver again")
            try:
                self._server.start_again()
                break
            except LaunchError as error:
                self._say(f"tritonserver could not be started again: {error}")
        wanted = {model: self._models[model].is_wanted for model in self._further}
        self._begin(wanted)
        for model in filter(wanted.get, wanted):
            self._models[model].load()
        self._say_well(f"tritonserver is back after {time.monotonic() - began:.1f} s")
        return True

    def _say(self, text: str) -> None:
        with contextlib.suppress(Exception, SystemExit):  # rich exits if nobody reads its output any more
            self._tell(text)

    def _say_well(self, text: str) -> None:
        with contextlib.suppress(Exception, SystemExit):
            self._tell_well(text)


def _tokenizers(engines: Iterable[str]) -> list[str]:
    """Of the models beside the first."""
    return [chain_of(name)[0] for name in map(further_name, engines) if name]
