"""A small KV cache behind the real server: who waits for blocks, and who keeps going meanwhile."""

from __future__ import annotations

from pathlib import Path

from helpers.triton import RunningServer

SMALL = [f"small {number}" for number in range(6)]


def test_small_streams_go_on_while_a_large_prompt_waits_for_blocks_of_a_more_urgent_one(model_dir: Path) -> None:
    # 68 blocks of 16 tokens, of which the urgent one takes 13 to 20 and the large one 57.
    with RunningServer(model_dir, kv_cache_memory="24MiB", streaming_share=1) as server:
        server.wait_idle()  # before that, nothing has been measured
        assert server.metric("kv_blocks") == 68
        with server.stream() as stream:

            def send(name: str, prompt: int, priority: int, max_tokens: int) -> None:
                sampling = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "priority": priority}
                ids = [100 + (7 * len(stream.generations) + i) % 1000 for i in range(prompt)]
                stream.send(name, input_ids=ids, stream=True, sampling_parameters=sampling)

            send("urgent", 200, 0, 120)
            for name in SMALL:
                send(name, 16, 2, 24)
            while not all(generation.token_ids for generation in stream.generations.values()):
                stream.next()
            send("large", 900, 1, 1)
            ends: list[str] = []
            while len(ends) < len(stream.generations):
                stream.next()
                ends += [name for name, made in stream.generations.items() if made.ended and name not in ends]
            assert sorted(ends[:6]) == SMALL
            assert ends[6:] == ["urgent", "large"]
            lengths = {name: len(generation.token_ids) for name, generation in stream.generations.items()}
            assert lengths == {"urgent": 120, "large": 1} | dict.fromkeys(SMALL, 24)
        server.wait_idle()
        assert server.metric("preemptions_total") == 0
