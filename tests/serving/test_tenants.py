"""Tenants behind the real server: a flood does not delay another's request, and what a client may say of tenants."""

from __future__ import annotations

from helpers.triton import RunningServer

FLOOD = 12


def test_a_quiet_tenant_goes_before_the_rest_of_a_flood(server: RunningServer) -> None:
    server.wait_idle()
    with server.stream() as stream:

        def send(name: str, tenant: str, prompt: int, max_tokens: int) -> None:
            sampling = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "tenant": tenant}
            ids = [100 + (7 * len(stream.generations) + i) % 1000 for i in range(prompt)]
            stream.send(name, input_ids=ids, stream=True, sampling_parameters=sampling)

        def begun() -> int:
            return sum(bool(generation.token_ids) for generation in stream.generations.values())

        # Beside a stream, a step has few tokens of prompts.
        send("stream", "flood", 4, 2000)
        while not begun():
            stream.next()
        for number in range(FLOOD):
            send(f"flood {number}", "flood", 150, 1)
        while begun() < 2:
            stream.next()
        send("quiet", "quiet", 20, 1)
        while not stream.generations["quiet"].token_ids:
            stream.next()
        assert begun() < FLOOD
        stream.close(cancel=True)
    server.wait_idle()


def test_tenants_find_none_of_each_others_prefixes(server: RunningServer) -> None:
    ids = [50 + i for i in range(64)]

    def cached(tenant: str) -> int:
        sampling = {"max_tokens": 1, "tenant": tenant, "cache_salt": "the same"}
        made = server.generate(input_ids=ids, sampling_parameters=sampling, return_num_cached_tokens=True)
        return int(made.outputs["num_cached_tokens"][0])

    assert [cached(tenant) for tenant in ("one", "one", "other", "", "other")] == [0, 48, 0, 0, 48]
