"""A long prompt beside a stream, through the real server: each step is short, and gives the stream a token."""

from __future__ import annotations

from pathlib import Path

from helpers.triton import RunningServer

LENGTH = 1900  # tokens of the prompt: one step's work without a pace


def test_a_stream_goes_on_beside_a_long_prompt(model_dir: Path) -> None:
    # A step takes longer than that on any machine: each computes the least that it may.
    with RunningServer(model_dir, prefill_step_time=0.001, streaming_share=1) as server, server.stream() as stream:
        sampling = {"max_tokens": 3000, "ignore_eos": True, "temperature": 0}
        stream.send("stream", text_input="Once upon a time", stream=True, sampling_parameters=sampling)
        while len(stream.generations["stream"].token_ids) < 3:
            stream.next()
        before = len(stream.generations["stream"].token_ids)
        ids = [100 + 7 * i % 5000 for i in range(LENGTH)]
        stream.send("long", input_ids=ids, sampling_parameters={"max_tokens": 1, "temperature": 0})
        while not stream.generations["long"].ended:
            stream.next()
        long = stream.generations["long"]
        assert (long.error, len(long.token_ids)) == (None, 1)
        # In one step without a pace. A part has the time of a quarter of a stream's step, or LEAST tokens.
        assert len(stream.generations["stream"].token_ids) - before > 5
