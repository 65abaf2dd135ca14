"""What is known of one endpoint: what changed in its metrics, or why it gave none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tidewright.metrics import HEARTBEAT, PREFIX
from tidewright.observe.scrape import Change, Scrape, host_of

ENGINE, GATEWAY = PREFIX, f"{PREFIX}gateway_"
_OTHERS = (GATEWAY, f"{PREFIX}failsafe_", f"{PREFIX}fallback_")  # whose label `model`, if any, means something else
STALE = 5.0  # seconds without a heartbeat after which a model's process counts as dead


@dataclass(frozen=True)
class Look:
    url: str
    change: Change | None
    """None: it gave no metrics."""
    trouble: str = ""
    """Why it gave none."""
    status: dict[str, Any] = field(default_factory=dict)
    """Of a gateway: /admin/status, if it told."""

    @property
    def where(self) -> str:
        """Host and port."""
        return host_of(self.url)

    @property
    def is_gateway(self) -> bool:
        return self.change is not None and self.change.now.has(f"{GATEWAY}requests_active")

    @property
    def is_triton(self) -> bool:
        return self.change is not None and self.change.now.has("nv_inference_count")

    @property
    def is_foreign(self) -> bool:
        """It has metrics of something else."""
        return self.change is not None and not (self.is_gateway or self.is_triton)


def looks(urls: Sequence[str], before: Sequence[Scrape | str], now: Sequence[Scrape | str]) -> list[Look]:
    """Of two rounds of `fetch_all`."""
    found = []
    for url, old, new in zip(urls, before, now, strict=True):
        if isinstance(new, str):
            found.append(Look(url, None, new))
        else:  # of one that has just come, nothing has changed
            found.append(Look(url, Change(new if isinstance(old, str) else old, new)))
    return found


def by_model(change: Change) -> dict[str, Change]:
    """Of a Triton that may serve several models: by name what the engine of each reports, with all else; "" is the
    first."""
    names = ["", *sorted(change.now.by(ENGINE + HEARTBEAT.name, "model"))]
    return {name: Change(_narrowed(change.before, name), _narrowed(change.now, name)) for name in names}


def _narrowed(scrape: Scrape, model: str) -> Scrape:
    samples = {
        metric: {labels: value for labels, value in series.items() if dict(labels).get("model", "") == model}
        if metric.startswith(ENGINE) and not metric.startswith(_OTHERS)
        else series
        for metric, series in scrape.samples.items()
    }
    return replace(scrape, samples=samples)


def last_heartbeat(scrape: Scrape, prefix: str = ENGINE) -> float:
    """Unix time; 0 if there was none."""
    return scrape.total(prefix + HEARTBEAT.name)
