"""Reads /metrics, and what changed between two readings: rates, and quantiles of histograms."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

MAX_BYTES = 64 * 2**20  # of an answer
Labels = frozenset[tuple[str, str]]


class ScrapeError(Exception):
    """An endpoint gave no metrics; the message says why, and what to do."""


@dataclass(frozen=True)
class Scrape:
    at: float
    """time.monotonic()."""
    samples: Mapping[str, Mapping[Labels, float]]
    """By name, then by labels."""
    unix: float
    """Unix time of the same moment: another endpoint may keep everybody waiting since."""

    def has(self, name: str) -> bool:
        return name in self.samples

    def total(self, name: str, **labels: str) -> float:
        """The sum of the series that have these labels."""
        wanted = labels.items()
        return sum(value for of, value in self.samples.get(name, {}).items() if wanted <= dict(of).items())

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Sums by the value of a label, of the series that have these labels."""
        found: defaultdict[str, float] = defaultdict(float)
        for of, value in self.samples.get(name, {}).items():
            if labels.items() <= (own := dict(of)).items() and label in own:
                found[own[label]] += value
        return dict(found)


@dataclass(frozen=True)
class Change:
    """From one scrape to a later one of the same endpoint."""

    before: Scrape
    now: Scrape

    def rate(self, name: str, **labels: str) -> float:
        """Growth per second of counters. A counter that fell has started again from zero."""
        return self._growth(self.before.total(name, **labels), self.now.total(name, **labels)) / self._seconds

    def rates(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Growth per second by the value of a label."""
        before, now = self.before.by(name, label, **labels), self.now.by(name, label, **labels)
        return {key: self._growth(before.get(key, 0.0), value) / self._seconds for key, value in now.items()}

    def share(self, part: float, whole: float) -> float | None:
        """None: there is no whole."""
        return part / whole if whole > 0 else None

    def quantile(self, name: str, q: float) -> float | None:
        """Of what the histogram got between the two scrapes, as Prometheus' histogram_quantile computes it; None if it
        got nothing."""
        before, now = self.before.by(f"{name}_bucket", "le"), self.now.by(f"{name}_bucket", "le")
        counts = sorted((float(le), self._growth(before.get(le, 0.0), count)) for le, count in now.items())
        if not counts or counts[-1][1] <= 0:
            return None
        rank, low, below = q * counts[-1][1], 0.0, 0.0
        for bound, count in counts:
            if count >= rank and count > below:
                return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (count - below)
            low, below = bound, count
        return low

    @property
    def _seconds(self) -> float:
        return max(self.now.at - self.before.at, 1e-9)

    @staticmethod
    def _growth(before: float, now: float) -> float:
        return now - before if now >= before else now


def parse(text: str, at: float, unix: float | None = None) -> Scrape:
    """`at`, `unix`: when it was read, on time.monotonic() and in Unix time (now by default).

    Raises:
        ScrapeError: it is no text of metrics.
    """
    samples: defaultdict[str, dict[Labels, float]] = defaultdict(dict)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name
                # Triton declares histograms as counters, and to those without _total the parser adds it.
                if name.endswith(("_bucket_total", "_sum_total", "_count_total")) or name.startswith("nv_"):
                    name = name.removesuffix("_total")
                samples[name][frozenset(sample.labels.items())] = sample.value
    except (ValueError, KeyError, IndexError) as error:
        raise ScrapeError(f"is no Prometheus endpoint: {error}") from None
    return Scrape(at, dict(samples), time.time() if unix is None else unix)


def host_of(url: str) -> str:
    """Host and port for people, without what a URL may have for a password."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2] or url
    except ValueError:  # it is no address
        return url


def fetch(url: str, key: str | None, timeout: float) -> Scrape:
    """Reads the metrics at `url`, which ends with /metrics.

    Raises:
        ScrapeError: there are none.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(url, headers=headers, timeout=timeout, trust_env=False)
    except (httpx.InvalidURL, ValueError) as error:
        raise ScrapeError(f"is no address: {error}") from None
    except httpx.TimeoutException:
        raise ScrapeError(f"did not answer within {timeout:g} s") from None
    except httpx.HTTPError as error:
        raise ScrapeError(f"can't be reached: {error}") from None
    if answer.status_code == 401 and key:
        raise ScrapeError("refuses the API key; give one of an admin with --key-file, or in TIDEWRIGHT_KEY")
    if answer.status_code == 401:
        raise ScrapeError("requires an API key; give one of an admin with --key-file, or in TIDEWRIGHT_KEY")
    if answer.status_code == 403:
        raise ScrapeError("gives metrics only to keys with the role admin")
    if answer.status_code != 200:
        raise ScrapeError(
            f"answered with status {answer.status_code}: it has no metrics; give a gateway, or a Triton's metrics port "
            "(--metrics-port, 8002)"
        )
    if len(answer.content) > MAX_BYTES:
        raise ScrapeError(f"answered with more than {MAX_BYTES} bytes")
    return parse(answer.text, time.monotonic())


def fetch_all(urls: Sequence[str], key: str | None, timeout: float) -> list[Scrape | str]:
    """Of each address, at the same time, what it has, or why it has nothing."""

    def one(url: str) -> Scrape | str:
        try:
            return fetch(url, key, timeout)
        except ScrapeError as error:
            return str(error)

    with ThreadPoolExecutor(len(urls)) as pool:
        return list(pool.map(one, urls))
