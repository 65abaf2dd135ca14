"""engine/targets.py: which target holds for which request, and what it changes."""

from __future__ import annotations

import pytest

from helpers.scheduling import sequence
from tidewright.config import Settings
from tidewright.engine.latency import WINDOW, LatencyController
from tidewright.engine.pace import UNPACED
from tidewright.engine.step_cost import StepLoad
from tidewright.engine.targets import MAX_CLASSES, Targets
from tidewright.schema import SamplingParams

TEXT = "0:ttft=2:tpot=0.1, 100:tpot=1,-5:ttft=0.5"


def test_a_class_holds_up_to_the_next_one_and_the_servers_targets_elsewhere() -> None:
    targets = Targets(9.0, 8.0, TEXT)
    requests = [SamplingParams(priority=priority) for priority in (-6, -5, -1, 0, 99, 100, 5000)]
    assert [*map(targets.ttft, requests)] == [9, 0.5, 0.5, 2, 2, 9, 9]
    assert [*map(targets.tpot, requests)] == [8, 8, 8, 0.1, 0.1, 1, 1]
    own = SamplingParams(priority=0, ttft_target=5.0, tpot_target=0.01)
    assert (targets.ttft(own), targets.tpot(own), targets.class_tpot(0)) == (5.0, 0.01, 0.1)
    assert (Targets().ttft(requests[0]), Targets().tpot(requests[0])) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("urgent:ttft=1", "does not begin with a priority"),
        ("ttft=1", "does not begin with a priority"),
        ("0", "has no target"),
        ("0:ttft", "is no target"),
        ("0:ttft=soon", "is no target"),
        ("0:ttft=nan", "is no target"),
        ("0:ttft=-1", "is no target"),
        ("0:tpot=3601", "is no target"),
        ("0:e2e=1", "is no target"),
        ("0:ttft=1:ttft=2", "is no target"),
        ("0:ttft=1,0:tpot=1", "priority 0 stands twice"),
        (f"{2**31}:ttft=1", "is not within"),
        (",".join(f"{number}:ttft=1" for number in range(MAX_CLASSES + 1)), "more than the limit of 16"),
    ],
)
def test_what_is_no_class_is_refused_with_what_to_write(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(class_targets=text)


def test_steps_are_paced_for_the_strictest_class_that_runs() -> None:
    controller = LatencyController(0.25, Targets(tpot=0.5, classes="0:tpot=0.1,100:tpot=2,200:tpot=0"), 2048, 64)
    strict, batch, any_time, server = (sequence(n, 3, priority=p) for n, p in enumerate((0, 100, 200, -1)))
    for running, seconds in [
        ([strict, batch], 0.1),
        ([batch], 2.0),
        ([any_time], 0.25),  # as without a target: prefill_step_time
        ([any_time, batch], 0.25),
        ([server, batch], 0.5),
        ([], 0.5),
    ]:
        assert controller.pace(running).seconds == seconds
    # A caller may loosen its own class's target, and tighten none.
    loose, hasty = sequence(5, 3, priority=0, tpot_target=0.3), sequence(6, 3, priority=100, tpot_target=0.001)
    for one in (loose, hasty):
        controller.submitted(one.sampling)
    assert controller.pace([loose]).seconds == 0.3
    assert controller.pace([hasty]).seconds == 2.0
    assert LatencyController(0.0, Targets(classes="0:tpot=0"), 2048, 64).pace([strict]) == UNPACED


def test_fewer_run_where_the_class_is_strict_and_all_where_it_has_no_target() -> None:
    controller = LatencyController(0.25, Targets(classes="0:tpot=0.1,100:tpot=0"), 2048, 64)
    strict, batch = sequence(0, 3), sequence(1, 3, priority=100)

    def places(running: list[object], seconds: float) -> int:
        for _ in range(WINDOW):
            controller.pace(running)  # type: ignore[arg-type]
            controller.computed(StepLoad(64, 0, 0.0), seconds)
        return controller.pace(running).running  # type: ignore[arg-type]

    # As admission predicts, and as the metrics say.
    assert (places([batch], 0.2), controller.running) == (UNPACED.running, 64)
    assert (places([strict, batch], 0.2), controller.running) == (48, 48)
    assert (places([batch], 0.2), controller.running) == (UNPACED.running, 64)
