"""The parts of the gateway that report something: to operators and to the metrics."""

from __future__ import annotations

from dataclasses import dataclass

from tidewright_gateway.admission.limits import Limiter
from tidewright_gateway.auth import Authenticator
from tidewright_gateway.cache.responses import ResponseCache
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.models import Models
from tidewright_gateway.openai.responses.store import ResponseStore
from tidewright_gateway.websocket.hub import Hub


@dataclass(frozen=True)
class Parts:
    authenticator: Authenticator
    limiter: Limiter
    models: Models
    cache: ResponseCache
    metrics: Metrics
    responses: ResponseStore
    hub: Hub

    @property
    def stores(self) -> dict[str, str]:
        """The trouble of each store; empty texts if there is none."""
        return {
            "keys": self.authenticator.trouble,
            "limits": self.limiter.trouble,
            "responses": self.responses.trouble,
        }
