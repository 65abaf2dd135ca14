"""An engine in this process, run until it has nothing to do."""

from __future__ import annotations

from tidewright.engine.engine import Engine
from tidewright.engine.messages import Submit


def tokens_of_engine(engine: Engine, requests: list[Submit]) -> dict[int, list[int]]:
    """By request; no block is lost on the way."""
    got: dict[int, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        assert engine.submit(request) is None
    while engine.has_work:
        for output in engine.step():
            got[output.request_id] += output.token_ids
            assert output.finish_reason in (None, "length", "stop")
        engine.scheduler.check_integrity()
    return got
