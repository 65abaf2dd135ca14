"""layers/tensor_parallel.py: the parts of 1, 2 and 3 ranks give, together, what one plain layer gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.on_disk import OnDisk
from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.cpu.device import CpuDevice
from tidewright.distributed.group import ALONE, TensorParallelGroup
from tidewright.distributed.sharding import ShardingError, tensor_parallel_sizes
from tidewright.layers.tensor_parallel import (
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from tidewright.layers.weights import Loader, WeightShapeError, replicated_loader

CPU = CpuDevice(ReferenceAttention(16, torch.device("cpu")))
SIZES = pytest.mark.parametrize("size", [1, 2, 3])


class AloneGroup(TensorParallelGroup):
    """A rank whose collectives leave its part as it is; the test joins the parts."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def load(loader: Loader, tensor: torch.Tensor) -> OnDisk:
    source = OnDisk(tensor)
    loader(source)
    return source


def load_part(layer: nn.Module, part: int, weight: torch.Tensor, bias: torch.Tensor | None = None) -> OnDisk:
    """Through the loaders that the model files use; returns what was read of the weight."""
    loaders = layer.loaders("name", part)
    assert set(loaders) == {"name.weight"} | ({"name.bias"} if bias is not None else set())
    if bias is not None:
        load(loaders["name.bias"], bias)
    return load(loaders["name.weight"], weight)


def load_vocabulary(layer: VocabParallelEmbedding | ParallelLMHead, weight: torch.Tensor) -> None:
    (loader,) = layer.loaders("name").values()
    load(loader, weight)


def ranks(size: int, make: Callable[[TensorParallelGroup], nn.Module]) -> list[nn.Module]:
    return [make(AloneGroup(rank, size)) for rank in range(size)]


@SIZES
@pytest.mark.parametrize("bias", [None, random(12)], ids=["", "bias"])
def test_column_parallel_outputs_lie_side_by_side(size: int, bias: torch.Tensor | None) -> None:
    weight, x_TE = random(12, 8), random(5, 8)
    layers = ranks(size, lambda group: MergedColumnParallelLinear(8, (12,), group, CPU, bias is not None))
    for layer in layers:
        assert load_part(layer, 0, weight, bias).values_read == layer.method.weight.numel()
    assert sum(layer.method.weight.numel() for layer in layers) == weight.numel()
    torch.testing.assert_close(torch.cat([layer(x_TE) for layer in layers], -1), F.linear(x_TE, weight, bias))


@SIZES
@pytest.mark.parametrize("biases", [(None, None), (random(12), random(6))], ids=["", "bias"])
def test_merged_columns_keep_each_projection_together(size: int, biases: tuple[torch.Tensor | None, ...]) -> None:
    gate, up, x_TE = random(12, 8), random(6, 8), random(5, 8)
    layers = ranks(size, lambda group: MergedColumnParallelLinear(8, (12, 6), group, CPU, biases[0] is not None))
    for layer in layers:
        load_part(layer, 1, up, biases[1])
        load_part(layer, 0, gate, biases[0])
    parts = [layer(x_TE).split([12 // size, 6 // size], -1) for layer in layers]
    torch.testing.assert_close(torch.cat([part[0] for part in parts], -1), F.linear(x_TE, gate, biases[0]))
    torch.testing.assert_close(torch.cat([part[1] for part in parts], -1), F.linear(x_TE, up, biases[1]))


@SIZES
@pytest.mark.parametrize("bias", [None, random(8)], ids=["", "bias"])
def test_row_parallel_results_add_up(size: int, bias: torch.Tensor | None) -> None:
    """The bias once, however many ranks there are."""
    weight, x_TF = random(8, 12), random(5, 12)
    layers = ranks(size, lambda group: RowParallelLinear(group.cut(12), 8, group, CPU, bias is not None))
    for layer in layers:
        loaders = layer.loaders("name")
        assert load(loaders.pop("name.weight"), weight).values_read == weight.numel() // size
        if bias is not None:
            load(loaders.pop("name.bias"), bias)
        assert not loaders
    parts = x_TF.chunk(size, dim=-1)
    total = sum(layer(part) for layer, part in zip(layers, parts, strict=True))
    torch.testing.assert_close(total, F.linear(x_TF, weight, bias))


@pytest.mark.parametrize(("size", "kv_heads"), [(1, 2), (2, 2), (2, 6), (2, 3), (4, 6), (3, 3), (3, 1), (6, 2), (6, 3)])
def test_every_rank_has_the_kv_head_of_its_query_heads(size: int, kv_heads: int) -> None:
    heads, head_dim, x_TE = 6, 4, random(5, 8)
    q, k, v = random(heads * head_dim, 8), random(kv_heads * head_dim, 8), 2 + random(kv_heads * head_dim, 8)
    biases = (random(heads * head_dim), random(kv_heads * head_dim), 3 + random(kv_heads * head_dim))
    full_q, full_k, full_v = (
        F.linear(x_TE, w, b).view(5, -1, head_dim) for w, b in zip((q, k, v), biases, strict=True)
    )
    layers = ranks(size, lambda group: QKVParallelLinear(8, heads, kv_heads, head_dim, group, CPU, bias=True))
    head = 0
    for layer in layers:
        for part, weight in enumerate((q, k, v)):
            load_part(layer, part, weight, biases[part])
        own_q, own_k, own_v = layer(x_TE).split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
        for own in range(layer.num_heads):
            own_kv, kv = own * layer.num_kv_heads // layer.num_heads, head * kv_heads // heads
            torch.testing.assert_close(own_q[:, own], full_q[:, head])
            torch.testing.assert_close(own_k[:, own_kv], full_k[:, kv])
            torch.testing.assert_close(own_v[:, own_kv], full_v[:, kv])
            head += 1
    assert head == heads


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sizes"), [(9, 3, [1, 2, 3, 9]), (4, 2, [1, 2, 4]), (8, 1, [1, 2, 4, 8])]
)
def test_the_sizes_that_heads_can_be_shared_by(heads: int, kv_heads: int, sizes: list[int]) -> None:
    assert tensor_parallel_sizes(heads, kv_heads) == sizes


@pytest.mark.parametrize(("total", "size"), [(12, 5), (1536, 3), (1536, 9), (100, 3), (64, 64)])
def test_cuts_are_nearly_equal_and_leave_nothing_out(total: int, size: int) -> None:
    cuts = [TensorParallelGroup(rank, size).cut(total) for rank in range(size)]
    assert [cut.first for cut in cuts] == [sum(cut.count for cut in cuts[:rank]) for rank in range(size)]
    assert sum(cut.count for cut in cuts) == total
    assert max(cut.count for cut in cuts) - min(cut.count for cut in cuts) <= (32 if total % 32 == 0 else 1)


@pytest.mark.parametrize("vocab", [12, 11, 7])
@SIZES
def test_embedding_and_head_over_a_vocabulary_that_need_not_divide(size: int, vocab: int) -> None:
    weight, ids_T, x_BE = random(vocab, 8), torch.arange(vocab).flip(0), random(3, 8)
    embeddings = ranks(size, lambda group: VocabParallelEmbedding(vocab, 8, group, CPU))
    heads = ranks(size, lambda group: ParallelLMHead(vocab, 8, group, CPU))
    for embedding, head in zip(embeddings, heads, strict=True):
        embedding.method = head.method
        load_vocabulary(embedding, weight)
    torch.testing.assert_close(sum(embedding(ids_T) for embedding in embeddings), weight[ids_T])
    logits_BV = torch.cat([head(x_BE) for head in heads], -1)[:, :vocab]
    torch.testing.assert_close(logits_BV, F.linear(x_BE, weight))


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ShardingError, match="9 query heads and 3 KV heads can only be shared by 1, 2, 3, 9 ranks"):
        QKVParallelLinear(8, 9, 3, 4, AloneGroup(0, 4), CPU)
    with pytest.raises(ShardingError, match="3 features can't be cut into 4 parts"):
        AloneGroup(0, 4).cut(3)


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(WeightShapeError, match=r"expected shape \(12, 8\), found \(12, 4\)"):
        load_part(MergedColumnParallelLinear(8, (12,), AloneGroup(), CPU), 0, random(12, 4))


@pytest.mark.parametrize("bias", [None, random(96)], ids=["", "bias"])
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_packing_changes_no_result(rows: int, bias: torch.Tensor | None) -> None:
    layer = MergedColumnParallelLinear(64, (96,), AloneGroup(), CPU, bias is not None).bfloat16()
    load_part(layer, 0, random(96, 64).bfloat16(), bias)
    x_TE = random(rows, 64).bfloat16()
    before = layer(x_TE)
    layer.method.finish()
    torch.testing.assert_close(layer(x_TE), before)


def test_a_packed_weight_can_not_be_mistaken_for_a_plain_one() -> None:
    layer = RowParallelLinear(ALONE.cut(64), 96, ALONE, CPU)
    layer.method.finish()
    assert layer.method.packed
    assert layer.method.weight.numel() == 0


def test_a_tied_head_can_be_packed_without_taking_the_embedding_away() -> None:
    embedding, head = VocabParallelEmbedding(50, 64, AloneGroup(), CPU), ParallelLMHead(50, 64, AloneGroup(), CPU)
    embedding.bfloat16()
    head.bfloat16()
    embedding.method = head.method
    weight, x_BE = random(50, 64).bfloat16(), random(3, 64).bfloat16()
    load_vocabulary(embedding, weight)
    head.method.finish()
    torch.testing.assert_close(head(x_BE), F.linear(x_BE, weight))
    torch.testing.assert_close(embedding(torch.tensor([49])), weight[49:])


def test_a_norm_that_adds_one_does_so_in_its_own_type() -> None:
    weight = nn.Parameter(torch.empty(3), requires_grad=False)
    load(replicated_loader(weight, plus=1.0), torch.tensor([0.001, 2.0, -1.0]).bfloat16())
    assert weight.tolist() == [1 + torch.tensor(0.001).bfloat16().float(), 3.0, 0.0]


def _in_two_processes(rank: int, rendezvous: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    group = TensorParallelGroup(rank, 2, store=torch.distributed.FileStore(f"{rendezvous}-store", 2))
    weight, x_BE, ids_T = random(11, 8), random(3, 8), torch.tensor([0, 10, 5])
    head = ParallelLMHead(11, 8, group, CPU)
    embedding = VocabParallelEmbedding(11, 8, group, CPU)
    load_vocabulary(head, weight)
    load_vocabulary(embedding, weight)
    logits_BV = head(x_BE)
    if rank == 0:
        torch.testing.assert_close(logits_BV, F.linear(x_BE, weight))
    else:
        assert logits_BV is None
    torch.testing.assert_close(embedding(ids_T), weight[ids_T])
    assert group.smallest(5 - rank) == 4
    torch.distributed.destroy_process_group()


@pytest.mark.heavy
def test_real_collectives(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_in_two_processes, args=(str(tmp_path / "rendezvous"),), nprocs=2)
