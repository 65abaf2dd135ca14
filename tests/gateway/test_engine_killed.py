"""A request that a replica's engines died over is not sent to the next replica, whose engines would die as well."""

from __future__ import annotations

import pytest

from helpers.scripted_replicas import ScriptedClient, generate, run
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import KILLS_ENGINES
from tidewright_gateway.openai.errors import of_model


@pytest.mark.parametrize("before", [[], [7, 8]])
def test_it_goes_to_no_other_replica(client: type[ScriptedClient], before: list[int]) -> None:
    client.scripts = {"b:1": [[*before, ModelError(f"{KILLS_ENGINES} [engine_failed]")]], "a:1": [[9]]}
    with pytest.raises(ModelError) as caught:
        run(generate)
    assert caught.value.outcome is Outcome.ENGINE_KILLED
    assert len(client.requests) == 1
    assert (of_model(caught.value).status, of_model(caught.value).code) == (503, "engine_failed")
