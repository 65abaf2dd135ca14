"""What callers of `control` ask of LoRA adapters: load, unload, list. Keeps what was commanded when, for the status.

The work is the engine's (adapters.py). Gateways compare the times to bring replicas to the same state.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from tidewright.bridge.adapters import Adapter, Done, unknown_adapter
from tidewright.errors import InvalidRequestError, RequestError
from tidewright.logs import event
from tidewright.schema import MAX_ADAPTERS_KNOWN, MAX_CLOCK_LEAD, MAX_CONTROL_LENGTH, AdapterOrder, AdapterStatus

log = logging.getLogger(__name__)

Answer = Callable[[RequestError | None], None]


class AdapterStartError(RuntimeError):
    """An adapter of the option `adapters` can't be served; the message says why."""


class AdapterBridge(Protocol):
    @property
    def adapters(self) -> list[Adapter]: ...

    def load_adapter(self, name: str, path: str, done: Done) -> None: ...

    def unload_adapter(self, name: str, done: Done) -> None: ...


class AdapterCommands:
    def __init__(self, bridge: AdapterBridge, folder: str, models: Collection[str] = ()) -> None:
        """`folder`: where adapters lie; empty: this server serves none. `models`: names that no adapter can have."""
        self._bridge, self._folder, self._models = bridge, folder, models
        self._lock = threading.Lock()
        self._commanded: dict[str, AdapterStatus] = {}  # the last command that was obeyed, by name

    @property
    def statuses(self) -> list[AdapterStatus] | None:
        """None: this server serves none."""
        if not self._folder:
            return None
        with self._lock:
            commanded = dict(self._commanded)
        loaded = {adapter.name: adapter.path for adapter in self._bridge.adapters if adapter.state == "loaded"}
        found = []
        for name, path in loaded.items():
            known = commanded.get(name)
            at = known.at if known and known.loaded else 0.0
            found.append(AdapterStatus(name, path, True, at))
        gone = (status for status in commanded.values() if not status.loaded and status.name not in loaded)
        return [*found, *gone]

    def load_at_start(self, paths: Mapping[str, str], timeout: float) -> None:
        """Those of the option `adapters`, by name. Raises AdapterStartError."""
        answers: dict[str, Adapter | RequestError] = {}
        changed = threading.Condition()

        def done(name: str) -> Done:
            def keep(answer: Adapter | RequestError) -> None:
                with changed:
                    answers[name] = answer
                    changed.notify_all()

            return keep

        for name, path in paths.items():
            self._bridge.load_adapter(name, self._absolute(path), done(name))
        with changed:
            if not changed.wait_for(lambda: len(answers) == len(paths), timeout):
                missing = ", ".join(name for name in paths if name not in answers)
                raise AdapterStartError(f"adapters not loaded within {timeout:g} s (start_timeout): {missing}")
        for name, answer in answers.items():
            if isinstance(answer, RequestError):
                raise AdapterStartError(f"adapter {name} can't be loaded from {paths[name]}: {answer}")

    def load(self, text: str, answer: Answer) -> None:
        """`text`: JSON of AdapterOrder. `answer` is called once it is loaded, or is not.

        Raises:
            RequestError: it can't be as asked.
        """
        order = self._read(text)
        if not order.path:
            raise InvalidRequestError('load_lora needs a path, as in {"name": "sql", "path": "sql-v2"}')
        if order.name in self._models:  # requests that name it are for the model
            raise InvalidRequestError(f"{order.name!r} is a model itself; choose another name")
        path = self._absolute(order.path)
        if (loaded := self._loaded(order.name)) and loaded.path == path:
            self._obeyed(order, path, is_loaded=True)  # told by two gateways at once
            return answer(None)

        def done(result: Adapter | RequestError) -> None:
            if isinstance(result, RequestError):
                log.warning("adapter %s: %s", order.name, result, extra=event("adapter_refused"))
                return answer(result)
            self._obeyed(order, path, is_loaded=True)
            log.info("adapter %s from %s", order.name, path, extra=event("adapter_loaded"))
            answer(None)

        self._bridge.load_adapter(order.name, path, done)

    def unload(self, text: str, answer: Answer) -> None:
        """As `load`; answered at once: requests that have the adapter finish, and new ones are refused."""
        order = self._read(text)
        loaded = self._loaded(order.name)
        if loaded is None:
            raise unknown_adapter(order.name, {adapter.name: adapter for adapter in self._bridge.adapters})
        self._bridge.unload_adapter(order.name, lambda _: None)
        self._obeyed(order, loaded.path, is_loaded=False)
        log.info("adapter %s", order.name, extra=event("adapter_unloaded"))
        answer(None)

    def _read(self, text: str) -> AdapterOrder:
        if not self._folder:
            raise InvalidRequestError("this server serves no LoRA adapters; start it with --adapter-folder")
        if len(text) > MAX_CONTROL_LENGTH:
            raise InvalidRequestError(f"control has {len(text)} characters, more than {MAX_CONTROL_LENGTH}")
        try:
            order = msgspec.json.decode(text, type=AdapterOrder)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise InvalidRequestError(
                f'the adapter must be JSON, as in {{"name": "sql", "path": "sql-v2"}}: {error}'
            ) from None
        if (lead := order.at - time.time()) > MAX_CLOCK_LEAD:  # it would win against all commands until then
            raise InvalidRequestError(f"at is {lead:.0f} s ahead of this server's clock, more than {MAX_CLOCK_LEAD:g}")
        return order

    def _absolute(self, path: str) -> str:
        return str(Path(self._folder, path))

    def _loaded(self, name: str) -> Adapter | None:
        return next((one for one in self._bridge.adapters if one.name == name and one.state == "loaded"), None)

    def _obeyed(self, order: AdapterOrder, path: str, *, is_loaded: bool) -> None:
        with self._lock:
            self._commanded.pop(order.name, None)
            self._commanded[order.name] = AdapterStatus(order.name, path, is_loaded, order.at or time.time())
            if len(self._commanded) > MAX_ADAPTERS_KNOWN:
                gone = (name for name, status in self._commanded.items() if not status.loaded)
                del self._commanded[next(gone, next(iter(self._commanded)))]
