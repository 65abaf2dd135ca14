"""A real Prometheus and Alertmanager watch a real gateway, Tritons and Redis: faults get to the webhook, and end there.

How long it takes is measured by `python -m benchmarks.alerting`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.alerting import CASES, LASTING, Case
from benchmarks.alerting_watchers import Notice, Watchers
from benchmarks.root_cause_faults import Stack

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "monitoring"))

from dashboard_panels import DASHBOARDS

pytestmark = [pytest.mark.server, pytest.mark.gateway, pytest.mark.redis, pytest.mark.chaos]
TIMEOUT = 120.0  # seconds
TESTED = ("engine killed", "stub killed", "Redis killed", "queue full")  # the benchmark has more
SAMPLES = 20  # of each target
NOTHING_TO_SHOW = {
    ("service", "Error budget left, 3 days"),  # computed every two minutes
    ("engine", "Drafted tokens that were right"),  # no speculation
    ("tenants", "Requests by adapter"),  # no adapters
    ("engine", "To the fallback, by cause"),  # the gateway asks the decoder directly
    ("replicas", "Failed attempts"),  # nobody asks while a replica is down
    ("replicas", "Probe tokens that failed"),
    ("replicas", "Expires in"),  # no TLS, and no key that expires
}


@pytest.fixture
def stack(model_dir: Path, tmp_path: Path) -> Iterator[Stack]:
    with Stack(model_dir, tmp_path) as running:
        yield running


@pytest.fixture
def watchers(stack: Stack, tmp_path: Path) -> Iterator[Watchers]:
    gateway, *tritons = stack.addresses
    with Watchers(gateway, tritons, stack.keys["ops"], tmp_path) as running:
        running.wait_up()
        yield running


@pytest.mark.timeout(900)
def test_faults_get_to_the_webhook_and_end_there(stack: Stack, watchers: Watchers) -> None:
    """All in one stack: it takes longer to start than most faults to be noticed."""
    assert_nothing_fires(watchers)
    for case in (case for case in CASES if case.fault in TESTED):
        assert_it_is_heard(case, stack, watchers)
    assert_dashboards_show_it(watchers)


def assert_nothing_fires(watchers: Watchers) -> None:
    deadline = time.monotonic() + TIMEOUT
    while len(watchers.query(f"count_over_time(up[1h]) >= {SAMPLES}")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert watchers.firing() == set()
    assert watchers.webhook.notices == []


def assert_it_is_heard(case: Case, stack: Stack, watchers: Watchers) -> None:
    def is_it(notice: Notice) -> bool:
        return (notice.status, notice.receiver) == ("firing", case.severity) and notice.name in case.alerts

    since = time.time()
    with case.inject(stack):
        heard = watchers.webhook.wait(is_it, since, TIMEOUT)
    assert heard, (case.fault, watchers.firing())
    if heard.name not in LASTING:
        ended = watchers.webhook.wait(lambda one: (one.name, one.status) == (heard.name, "resolved"), since, TIMEOUT)
        assert ended, case.fault
    watchers.wait_up()


def assert_dashboards_show_it(watchers: Watchers) -> None:
    """Prometheus can answer each query; those of what such a run has not are empty, and no other."""
    empty = set()
    for dashboard in DASHBOARDS:
        for panel in (panel for row in dashboard.rows for panel in row.panels):
            exprs = [query.expr.replace("$instance", ".*") for query in panel.queries]
            found = [watchers.query(f"last_over_time(({expr})[10m:5s])") for expr in exprs]
            if not any(found):
                empty.add((dashboard.name, panel.title))
    assert {one for one in empty if one[0] != "gpu"} <= NOTHING_TO_SHOW, empty
