"""An engine in this process, run until it has nothing to do."""

from __future__ import annotations

from collections.abc import Sequence

from tidewright.engine.engine import Engine
from tidewright.engine.messages import SequenceOutput, Submit


def outputs_of_engine(
    engine: Engine, requests: Sequence[Submit], steps_between: int = 0
) -> dict[int, list[SequenceOutput]]:
    """By request; `steps_between` one and the next. No block is lost on the way."""
    outputs: dict[int, list[SequenceOutput]] = {request.request_id: [] for request in requests}

    def step() -> None:
        for output in engine.step():
            outputs[output.request_id].append(output)

    for request in requests:
        assert engine.submit(request) is None
        for _ in range(steps_between):
            step()
    while engine.has_work:
        step()
        engine.scheduler.check_integrity()
    return outputs


def tokens_of_engine(
    engine: Engine, requests: Sequence[Submit], ends: tuple[str, ...] = ("length", "stop")
) -> dict[int, list[int]]:
    """By request; each finish reason is one of `ends`."""
    got: dict[int, list[int]] = {}
    for request_id, outputs in outputs_of_engine(engine, requests).items():
        assert all(output.finish_reason in (None, *ends) for output in outputs)
        got[request_id] = [token for output in outputs for token in output.token_ids]
    return got
