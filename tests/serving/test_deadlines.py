"""Requests with a timeout: an answer with what there is, or an error if there is nothing; and the blocks come back."""

from __future__ import annotations

import time

from helpers.triton import Generation, RunningServer

LONG = {"temperature": 0, "max_tokens": 3000, "ignore_eos": True}


def ended_after(server: RunningServer, timeout: float) -> dict[str, Generation]:
    with server.stream() as stream:
        for name, streams in (("streamed", True), ("whole", False)):
            options = {**LONG, "timeout": timeout}
            stream.send(name, text_input="Once", stream=streams, return_finish_reason=True, sampling_parameters=options)
        return stream.finish()


def test_tokens_that_are_there_are_the_answer(bf16_server: RunningServer) -> None:
    for timeout in (1.5, 6.0, 24.0):  # on a busy machine the first token may take longer than the first of them
        generations = ended_after(bf16_server, timeout)
        if not any(generation.error for generation in generations.values()):
            break
    for generation in generations.values():
        assert generation.error is None
        assert generation.ended == 1
        assert generation.outputs["finish_reason"].tolist() == [b"timeout"]
        assert 0 < len(generation.token_ids) < 3000
        assert generation.text
    bf16_server.wait_idle()


def test_a_request_that_waits_too_long_is_an_error(bf16_server: RunningServer) -> None:
    before = bf16_server.metrics()
    with bf16_server.stream() as stream:
        for number in range(64):  # all places of the batch
            stream.send(str(number), text_input="Once", stream=True, sampling_parameters={**LONG, "timeout": 600})
        while bf16_server.metric("requests_running") < 64:
            stream.next()
        with bf16_server.stream() as late:
            late.send("late", text_input="Once", sampling_parameters={**LONG, "timeout": 0.5})
            generation = late.finish()["late"]
        assert generation.ended == 1
        assert "timed out" in str(generation.error)
        assert str(generation.error).endswith(" [timeout]")
        assert not generation.chunks
    bf16_server.wait_idle()
    timeouts = "requests_finished_total", "timeout"
    assert bf16_server.metrics()[timeouts] == before[timeouts] + 1


def test_no_time_at_all_is_refused_at_once(bf16_server: RunningServer) -> None:
    before = bf16_server.metric("prompt_tokens_total")
    generation = bf16_server.generate(text_input="Once", sampling_parameters={**LONG, "timeout": 0})
    assert "timed out at once: timeout is 0 s" in str(generation.error)
    time.sleep(0.6)  # the figures lag
    assert bf16_server.metric("prompt_tokens_total") == before


def test_a_request_in_time_is_untouched(bf16_server: RunningServer) -> None:
    options = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}
    without = bf16_server.generate(text_input="Once", sampling_parameters=options)
    timed = bf16_server.generate(
        text_input="Once", return_finish_reason=True, sampling_parameters={**options, "timeout": 60}
    )
    assert timed.token_ids == without.token_ids
    assert timed.outputs["finish_reason"].tolist() == [b"length"]
