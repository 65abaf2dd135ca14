"""Availability as a caller sees it: one token, asked for once a second, beside all load."""

from __future__ import annotations

import threading
import time

import httpx

EVERY = 1.0  # seconds
PATIENCE = 10.0  # seconds for the token
MAX_CAUSES = 20


class Probe:
    def __init__(self, url: str, model: str, key: str = "") -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=PATIENCE, trust_env=False)
        self._model = model
        self.asked = self.answered = 0
        self.causes: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(2 * PATIENCE)
        self._client.close()

    @property
    def availability(self) -> float | None:
        return self.answered / self.asked if self.asked else None

    def _run(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            body = {"model": self._model, "prompt": f"Probe {self.asked}", "max_tokens": 1}
            cause = ""
            try:
                answer = self._client.post("/v1/completions", json=body)
                if answer.status_code != 200:
                    cause = f"status {answer.status_code}: {answer.text[:200]}"
            except httpx.HTTPError as error:
                cause = repr(error)
            self.asked += 1
            self.answered += not cause
            if cause and len(self.causes) < MAX_CAUSES:
                self.causes.append(cause)
            self._over.wait(max(0.0, EVERY - (time.monotonic() - began)))
