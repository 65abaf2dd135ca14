"""lora/checkpoint.py and config.py: what is no adapter of this model is refused, with the reason."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tidewright.distributed.sharding import Cut
from tidewright.lora import checkpoint
from tidewright.lora.adapter import Adapter, LowRank, Update
from tidewright.lora.checkpoint import AdapterLimits, Shape, read_adapter
from tidewright.lora.config import AdapterError

SIZES = {"self_attn.q_proj": (12, 8), "mlp.down_proj": (8, 20)}
SHAPES = {
    f"model.layers.{layer}.{name}": Shape(Cut.whole(rows), Cut.whole(columns))
    for layer in range(2)
    for name, (rows, columns) in SIZES.items()
}
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "target_modules": ["q_proj", "down_proj"],
}


def tensors(rank: int = 4) -> dict[str, torch.Tensor]:
    generator, made = torch.Generator().manual_seed(1), {}
    for name, shape in SHAPES.items():
        made[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, shape.columns.total, generator=generator)
        made[f"base_model.model.{name}.lora_B.weight"] = torch.randn(shape.rows.total, rank, generator=generator)
    return made


def save(folder: Path, weights: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    safetensors.torch.save_file(tensors() if weights is None else weights, folder / "adapter_model.safetensors")
    return folder


def plain(name: str, update: LowRank) -> Update:
    return Update(update.a_RE, update.b_RF, update.scale, update.rank)


def read(folder: Path, path: str = "adapter", shapes: dict[str, Shape] = SHAPES) -> Adapter:
    return read_adapter(path, shapes, AdapterLimits(folder, max_rank=8, dtype=torch.float32), plain)


def test_each_half_is_cut_as_its_layer_is(tmp_path: Path) -> None:
    save(tmp_path / "adapter")
    cut = {name: Shape(Cut(one.rows.total, 4, 3), Cut(one.columns.total, 2, 5)) for name, one in SHAPES.items()}
    adapter, whole = read(tmp_path, shapes=cut), tensors()
    assert adapter.rank == 4
    for name, update in adapter.updates.items():
        a, b = (whole[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
        assert torch.equal(update.a, a[:, 2:7])
        assert torch.equal(update.b, b[4:7].t())
        assert (update.scale, update.rank) == (2, 4)


def test_names_without_the_head_s_prefix_and_with_the_adapter_s_name(tmp_path: Path) -> None:
    renamed = {
        key.replace(".model.layers", ".layers").replace("_A.w", "_A.default.w"): t for key, t in tensors().items()
    }
    save(tmp_path / "adapter", renamed)
    assert set(read(tmp_path).updates) == set(SHAPES)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    for name in ("one", "same"):
        save(tmp_path / name)
    save(tmp_path / "scaled", lora_alpha=9)
    save(tmp_path / "other", {key: tensor + 1 for key, tensor in tensors().items()})
    digests = [read(tmp_path, name).digest for name in ("one", "same", "scaled", "other")]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"r": 9}, "its rank is 9, but max_lora_rank is 8"),
        ({"rank_pattern": {"q_proj": 10**6}}, "its rank is 1000000, but"),
        ({"rank_pattern": {"q_.*": 2}}, r"rank_pattern has the regular expression 'q_\.\*'"),
        ({"rank_pattern": {"q_proj": 2}}, r"lora_A of model.layers.0.self_attn.q_proj has the shape \(4, 8\)"),
        ({"rank_pattern": {f"a{n}": 1 for n in range(4097)}}, "rank_pattern has 4097 entries, but 4096 is the limit"),
        ({"target_modules": ["q_proj"] * 4097}, "target_modules has 4097 entries"),
        ({"r": 0}, "r has 0"),
        ({"r": True}, "r has True"),
        ({"r": "4"}, "r has '4'"),
        ({"lora_alpha": None}, "lora_alpha has None"),
        ({"lora_alpha": 10**400}, "lora_alpha has 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha has nan"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, "has no weights of the target module 'k_proj'"),
    ],
)
def test_a_configuration_that_is_not_served(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    save(tmp_path / "adapter", **config)
    with pytest.raises(AdapterError, match=message):
        read(tmp_path)


KEY = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
LAST = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({KEY: w[KEY][:, :-1].clone()}), r"shape \(4, 19\).*\(4, 20\).*another base model"),
        (
            lambda w: w.update({KEY: w[KEY].fill_(float("inf"))}),
            "lora_A of model.layers.1.mlp.down_proj has numbers that",
        ),
        (lambda w: w.update({KEY: w[KEY].long()}), "type torch.int64"),
        (lambda w: w.pop(KEY), f"has lora_B of {LAST}, but not the other half"),
        (lambda w: [w.pop(KEY), w.pop(KEY.replace("_A", "_B"))], f"no weights of {LAST}, a target module"),
        (lambda w: w.update({KEY.replace("layers.1", "layers.2"): w[KEY]}), "has weights for model.layers.2.mlp"),
        (lambda w: w.update({"base_model.model.lm_head.lora_A.weight": w[KEY]}), "has weights for lm_head"),
        (lambda w: w.update({KEY.replace("lora_A.weight", "bias"): w[KEY]}), "only lora_A and lora_B of linear"),
        (lambda w: w.update({KEY.replace("_A.", "_A.default."): w[KEY]}), "twice"),
        (lambda w: w.clear(), "is empty"),
        (lambda w: w.update({KEY: torch.zeros(4, 2_000_000)}), "has .* bytes, but rank 4 needs"),
    ],
)
def test_weights_that_are_not_this_model_s(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    weights = tensors()
    change(weights)
    weights = {key: tensor.clone() for key, tensor in weights.items()}
    save(tmp_path / "adapter", weights)
    with pytest.raises(AdapterError, match=message):
        read(tmp_path)


def test_only_folders_below_the_allowed_one(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    save(tmp_path / "outside")
    save(allowed / "inside")
    (allowed / "link").symlink_to(tmp_path / "outside")
    (allowed / "loop").symlink_to(allowed / "loop")
    save(allowed / "linked file")
    (allowed / "linked file" / "adapter_model.safetensors").unlink()
    (allowed / "linked file" / "adapter_model.safetensors").symlink_to(
        tmp_path / "outside" / "adapter_model.safetensors"
    )
    (allowed / "within").symlink_to(allowed / "inside")
    for path in ("inside", "within", str(allowed / "inside")):
        assert read(allowed, path).rank == 4
    for path in ("../outside", str(tmp_path / "outside"), "link", "linked file", ".", "/", str(tmp_path)):
        with pytest.raises(AdapterError, match="is not below the allowed folder"):
            read(allowed, path)
    for path, message in {"nothing": "there is no", "loop": "can't be read", "a\0b": "can't be read"}.items():
        with pytest.raises(AdapterError, match=message):
            read(allowed, path)


def test_files_that_are_missing_or_none(tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"only adapter_model\.bin, which is not read for it may run code"):
        read(tmp_path)
    os.mkfifo(weights)  # opening it would wait for ever
    with pytest.raises(AdapterError, match="is not a file"):
        read(tmp_path)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"the folder has no adapter_config\.json"):
        read(tmp_path)
    with pytest.raises(AdapterError, match="is not a folder"):
        read(tmp_path, "adapter/adapter_model.bin")


def test_no_more_is_read_than_may_be_whatever_the_size_was_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = save(tmp_path / "adapter") / checkpoint.WEIGHTS_FILE
    size = weights.stat().st_size

    def grows(*_: object) -> int:
        with weights.open("ab") as opened:
            opened.write(bytes(9))
        return size

    monkeypatch.setattr(checkpoint, "_largest", grows)
    with pytest.raises(AdapterError, match=rf"adapter_model\.safetensors has more than {size} bytes"):
        read(tmp_path)
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(CONFIG | {"more": "x" * 2**20}))
    with pytest.raises(AdapterError, match=r"adapter_config\.json has more than 1048576 bytes"):
        read(tmp_path)


def test_another_base_model_s_name_is_warned_of_once_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limits = AdapterLimits(tmp_path, max_rank=8, dtype=torch.float32, model="Org--Tide-1B")
    for number, base in enumerate(["org/tide-1b", "/models/Tide-1B/", None, 5, "org/tide-2b", "org/tide-2b"]):
        save(tmp_path / str(number), base_model_name_or_path=base)
        read_adapter(str(number), SHAPES, limits, plain)
        read_adapter(str(number), SHAPES, limits, plain)
    assert [record.message for record in caplog.records] == [
        f"the adapter in {number} was trained on 'org/tide-2b', but the model here is 'Org--Tide-1B': they may not fit"
        for number in (4, 5)
    ]


def test_the_embedded_model_is_known_by_its_name_on_the_hub(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limits = AdapterLimits(tmp_path, max_rank=8, dtype=torch.float32, model="smollm2-135m")
    for name, base in (("own", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("other", "meta-llama/Llama-3-8B")):
        save(tmp_path / name, base_model_name_or_path=base)
        read_adapter(name, SHAPES, limits, plain)
    assert ["the adapter in other was trained on" in record.message for record in caplog.records] == [True]


def test_damage_is_refused_and_never_anything_else(tmp_path: Path) -> None:
    """Files cut short, with bytes changed, or of rubbish: an AdapterError, or an adapter of finite numbers."""
    folder, chance = save(tmp_path / "adapter"), random.Random(1)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (folder / name).read_bytes()
        for number in range(150):
            damaged = bytearray(whole)
            if number % 3 == 0:
                del damaged[chance.randrange(len(damaged)) :]
            elif number % 3 == 1:
                for _ in range(chance.randrange(1, 9)):
                    damaged[chance.randrange(min(len(damaged), 900))] = chance.randrange(256)
            else:
                damaged = bytearray(chance.randbytes(chance.randrange(200)))
            (folder / name).write_bytes(damaged)
            try:
                adapter = read(tmp_path)
            except AdapterError:
                continue
            assert all(bool(update.a.isfinite().all()) for update in adapter.updates.values())
        (folder / name).write_bytes(whole)
    assert set(read(tmp_path).updates) == set(SHAPES)
