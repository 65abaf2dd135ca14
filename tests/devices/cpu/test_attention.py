"""devices/cpu/attention.py against dense attention in float64, and against attention/reference.py on the same steps."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.rotation import no_rotation
from helpers.step_batches import Tokens, batch_of, in_order
from tidewright.attention.base import AttentionLayer
from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.base import DeviceError
from tidewright.devices.cpu.attention import NativeCpuAttention
from tidewright.devices.registry import make_device
from tidewright.kv_cache.storage import LayerCache

pytestmark = pytest.mark.usefixtures("all_cores")


class Step:
    """Sequences given as (start, count), their cache, and the new tokens."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        block_size: int,
        kv_heads: int,
        group: int,
        size: int,
        dtype: torch.dtype,
        shared: Sequence[tuple[int, int]] = (),
    ) -> None:
        generator = torch.Generator().manual_seed(len(lengths))
        num_blocks = sum((start + count) // block_size + 1 for start, count in lengths)
        free = list(range(num_blocks))
        random.Random(block_size).shuffle(free)
        # One block more than needed: a table may be longer than the context.
        spans = [Tokens(s, n, tuple(free.pop() for _ in range((s + n) // block_size + 1))) for s, n in lengths]
        for begin, end in shared:  # sequences whose contexts begin like the first one's
            for i in range(begin + 1, end):
                common = min(lengths[begin][0], lengths[i][0]) // block_size
                table = spans[begin].block_table[:common] + spans[i].block_table[common:]
                spans[i] = Tokens(spans[i].start, spans[i].count, table)
        self.spans, self.block_size = in_order(spans, block_size), block_size

        def new(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.qkv_TXD = new(sum(span.count for span in spans), kv_heads * (group + 2), size)
        self.q_THD, self.k_TKD, self.v_TKD = self.qkv_TXD.split([kv_heads * group, kv_heads, kv_heads], dim=1)
        self.k_cache_NSKD, self.v_cache_NSKD = (new(num_blocks, block_size, kv_heads, size) for _ in range(2))

    def run(self, name: str, layer: AttentionLayer) -> torch.Tensor:
        attention = make_device("cpu", name, self.block_size, self.qkv_TXD.dtype, 64).attention
        caches = self.k_cache_NSKD.clone(), self.v_cache_NSKD.clone()
        batch = batch_of(self.spans, self.block_size)
        attention.prepare(batch)
        out_THD = attention.forward(self.qkv_TXD, no_rotation(self.qkv_TXD), LayerCache(*caches), batch, layer)
        k_cache_NSKD, v_cache_NSKD = self.stored()
        assert torch.equal(caches[0], k_cache_NSKD)
        assert torch.equal(caches[1], v_cache_NSKD)
        return out_THD

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The caches with the new tokens."""
        k_cache_NSKD, v_cache_NSKD = self.k_cache_NSKD.clone(), self.v_cache_NSKD.clone()
        row = 0
        for span in self.spans:
            for position in range(span.start, span.start + span.count):
                place = (span.block_table[position // self.block_size], position % self.block_size)
                k_cache_NSKD[place], v_cache_NSKD[place] = self.k_TKD[row], self.v_TKD[row]
                row += 1
        return k_cache_NSKD, v_cache_NSKD

    def dense(self, layer: AttentionLayer) -> torch.Tensor:
        """Sequence by sequence, all scores at once, in float64."""
        k_cache_NSKD, v_cache_NSKD = (cache.double() for cache in self.stored())
        outputs, row = [], 0
        for span in self.spans:
            q_THD = self.q_THD[row : row + span.count].double()
            row += span.count
            blocks = torch.tensor(span.block_table)
            k_CKD, v_CKD = (cache[blocks].flatten(0, 1) for cache in (k_cache_NSKD, v_cache_NSKD))
            group = q_THD.shape[1] // k_CKD.shape[1]
            k_CHD, v_CHD = (x.repeat_interleave(group, dim=1) for x in (k_CKD, v_CKD))
            scores_HTC = torch.einsum("thd,chd->htc", q_THD, k_CHD) * layer.scale
            if layer.softcap:
                scores_HTC = layer.softcap * (scores_HTC / layer.softcap).tanh()
            distance_TC = torch.arange(span.start, span.start + span.count)[:, None] - torch.arange(len(k_CKD))
            hidden_TC = (distance_TC < 0) | (distance_TC >= (layer.window or 2**31))
            weights_HTC = scores_HTC.masked_fill(hidden_TC, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("htc,chd->thd", weights_HTC, v_CHD))
        return torch.cat(outputs)


def check(step: Step, layer: AttentionLayer) -> None:
    out_THD, exact_THD = step.run("native", layer), step.dense(layer)
    error = (out_THD.double() - exact_THD).abs()
    rounding = exact_THD.abs() * torch.finfo(out_THD.dtype).eps / 2
    assert (error <= rounding * 1.01 + 3e-5).all()


lengths = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 1, 15, 16, 63, 64, 200, 255, 256, 300, 700]), st.sampled_from([1, 1, 2, 5, 17, 70])
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(
    lengths,
    st.sampled_from([1, 3, 16]),
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 7]),
    st.sampled_from([8, 20, 64, 80, 128, 256]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([None, 1, 5, 64, 257]),
    st.sampled_from([None, 1.5]),
)
@pytest.mark.heavy
def test_any_step(
    lengths: list[tuple[int, int]],
    block_size: int,
    kv_heads: int,
    group: int,
    size: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
) -> None:
    check(Step(lengths, block_size, kv_heads, group, size, dtype), AttentionLayer(size**-0.5, window, softcap))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_same_as_the_reference(seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    lengths = [(rng.choice([0, 3, 40, 500]), rng.choice([1, 1, 1, 2, 7, 90])) for _ in range(8)]
    step, layer = Step(lengths, 16, 3, 3, 64, dtype), AttentionLayer(scale=64**-0.5)
    expected_THD = step.run("reference", layer)
    # In bfloat16 torch rounds the weights, too.
    error = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(step.run("native", layer), expected_THD, atol=error, rtol=0.016)


shared_lengths = st.lists(
    st.tuples(st.sampled_from([10, 255, 256, 257, 300, 520, 700]), st.sampled_from([1, 1, 1, 1, 3])),
    min_size=2,
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(
    shared_lengths,
    st.data(),
    st.sampled_from([1, 16, 48]),
    st.sampled_from([1, 3, 7, 50]),
    st.sampled_from([20, 64]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([None, 300]),
)
@pytest.mark.heavy
def test_sequences_that_begin_alike(
    lengths: list[tuple[int, int]],
    data: st.DataObject,
    block_size: int,
    group: int,
    size: int,
    dtype: torch.dtype,
    window: int | None,
) -> None:
    """Some share their first blocks with each other, some with nobody; whoever does, as far as its context goes."""
    cut = data.draw(st.integers(0, len(lengths)))
    step = Step(lengths, block_size, 2, group, size, dtype, shared=[(0, cut), (cut, len(lengths))])
    check(step, AttentionLayer(size**-0.5, window))


def test_scores_of_any_size() -> None:
    """Softmax must not overflow, and a first tile of very low scores must leave no trace."""
    step = Step([(300, 1), (300, 20)], 16, 1, 2, 64, torch.float32)
    step.q_THD.mul_(100)
    check(step, AttentionLayer(scale=1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_gets_the_same_result_in_any_company_and_with_any_number_of_threads(dtype: torch.dtype) -> None:
    layer = AttentionLayer(scale=0.125)
    lengths = [(700, 1), (5, 1), (600, 3), (0, 90), *[(530 + i, 1) for i in range(20)]]
    step = Step(lengths, 16, 3, 3, 64, dtype, shared=[(4, 24)])
    together_THD = step.run("native", layer)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert torch.equal(step.run("native", layer), together_THD)
    finally:
        torch.set_num_threads(threads)
    attention, first = NativeCpuAttention(), 0
    for span in step.spans:
        rows = slice(first, first + span.count)
        first += span.count
        alone_THD = attention.forward(
            step.qkv_TXD[rows],
            no_rotation(step.qkv_TXD[rows]),
            LayerCache(step.k_cache_NSKD, step.v_cache_NSKD),
            batch_of([span], 16),
            layer,
        )
        # In bfloat16 many rows may be summed by the matrix unit, in its own order: a rounding may fall otherwise.
        error = {torch.float32: 0.0, torch.bfloat16: 2**-7}[dtype]
        torch.testing.assert_close(alone_THD, together_THD[rows], rtol=error, atol=error / 1000)


def test_the_registry_offers_it_where_it_works() -> None:
    def attention(name: str, dtype: torch.dtype) -> object:
        return make_device("cpu", name, 16, dtype, 64).attention

    assert isinstance(attention("auto", torch.bfloat16), NativeCpuAttention)
    assert isinstance(attention("native", torch.float32), NativeCpuAttention)
    assert isinstance(attention("reference", torch.float32), ReferenceAttention)
    assert isinstance(attention("auto", torch.float16), ReferenceAttention)
    with pytest.raises(DeviceError, match=r"needs float32 or bfloat16.*choose 'auto'"):
        attention("native", torch.float16)
