"""What is wrong with a part of the gateway, such as a store that is gone: logged when it begins and when it is over."""

from __future__ import annotations

import logging
from typing import Any

from tidewright import logs

KEYS, STORE = ("keys_stale", "keys_reloaded"), ("store_lost", "store_recovered")
NO_KEYS = ("keys_missing", "keys_found")
"""Events."""


class Trouble:
    def __init__(
        self,
        log: logging.Logger,
        over: str,
        effect: str = "",
        events: tuple[str, str] = ("note", "note"),
        **fields: Any,
    ) -> None:
        """
        Args:
            over: is logged when there is none any more.
            effect: is logged before it.
            events: names of the events, for its begin and its end.
            fields: of the log lines.
        """
        self._log, self._over, self._effect = log, over, effect
        self._began, self._ended = (logs.event(name, **fields) for name in events)
        self.text = ""
        """Empty if there is none."""

    def note(self, text: str) -> None:
        """What it is now; empty: none. The same is logged once."""
        if text and text != self.text:
            self._log.error("%s%s", self._effect, text, extra=self._began)
        elif self.text and not text:
            self._log.info("%s", self._over, extra=self._ended)
        self.text = text
