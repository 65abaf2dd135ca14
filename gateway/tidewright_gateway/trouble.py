"""What is wrong with a part of the gateway, such as a store that is gone: logged when it begins and when it is over."""

from __future__ import annotations

import logging


class Trouble:
    def __init__(self, log: logging.Logger, over: str, effect: str = "") -> None:
        """
        Args:
            over: is logged when there is none any more.
            effect: is logged before it.
        """
        self._log, self._over, self._effect = log, over, effect
        self.text = ""
        """Empty if there is none."""

    def note(self, text: str) -> None:
        """What it is now; empty: none. The same is logged once."""
        if text and text != self.text:
            self._log.error("%s%s", self._effect, text)
        elif self.text and not text:
            self._log.warning("%s", self._over)
        self.text = text
