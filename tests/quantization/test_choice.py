"""Which quantization is served, and what is said about it."""

from __future__ import annotations

import pytest

from tidewright.quantization.affine import QuantizationError, Scheme, scheme_named
from tidewright.quantization.choice import Stored, choose
from tidewright.quantization.hardware import of_card, of_processor

VNNI = of_processor({"avx512f", "avx512_vnni"}, has_kernels=True)
GPTQ = Stored("gptq", Scheme("gptq int4-g128", 4, 128))
GGUF = Stored("GGUF", Scheme("gguf Q4_1", 4, 32), has_plain=True)
FLOAT8 = Stored("fp8", scheme_named("fp8"))


def test_the_option_decides_for_a_checkpoint_that_is_not_quantized() -> None:
    assert choose("auto", "same", VNNI).scheme is None
    assert choose("none", "same", VNNI).scheme is None
    made = choose("int4-g64", "keep", VNNI)
    assert made.scheme_of(is_head=False) == scheme_named("int4-g64")
    assert made.scheme_of(is_head=True) is None
    assert choose("int4-g64", "int8", VNNI).scheme_of(is_head=True) == scheme_named("int8")
    assert made.reason.startswith("int4-g64: as the option says")
    assert "as they are; multiplied as they are by this processor (AVX-512 VNNI)" in made.reason


def test_a_quantized_checkpoint_stays_what_it_is() -> None:
    for asked in ("auto", "stored"):
        made = choose(asked, "same", VNNI, GPTQ)
        assert (made.is_stored, made.scheme) == (True, GPTQ.scheme)
        assert made.scheme_of(is_head=False) is None  # nothing is quantized while loading
    assert not choose("none", "same", VNNI, GPTQ).is_stored  # dequantized
    with pytest.raises(QuantizationError, match=r"is quantized \(gptq\) and can't be made int8"):
        choose("int8", "same", VNNI, GPTQ)


def test_with_plain_weights_beside_quantized_ones_the_option_decides() -> None:
    assert not choose("auto", "same", VNNI, GGUF).is_stored
    assert choose("stored", "same", VNNI, GGUF).is_stored
    assert choose("int8", "same", VNNI, GGUF).scheme_of(is_head=True) == scheme_named("int8")
    with pytest.raises(QuantizationError, match="is not quantized"):
        choose("stored", "same", VNNI)


def test_auto_loses_nothing_anywhere_and_says_what_would_gain() -> None:
    """The device changes what is said, never the weights."""
    for hardware, said in (
        (VNNI, "none: auto keeps plain weights; --quantization int8 would take half the memory, about"),
        (of_card("A10", has_float8=False), "none: auto keeps plain weights; --quantization int8 would take half"),
        (of_processor((), has_kernels=False), "none: auto keeps plain weights; this processor without kernels"),
    ):
        made = choose("auto", "int8", hardware)
        assert (made.scheme, made.head, made.is_stored) == (None, None, False)
        assert made.reason.startswith(said)
    assert "--quantization stored would take a third of the memory" in choose("auto", "int8", VNNI, GGUF).reason


def test_formats_that_the_device_does_not_multiply_are_named() -> None:
    card = of_card("L4", has_float8=True)
    assert (
        choose("auto", "int8", card, FLOAT8).reason
        == "fp8: the checkpoint is quantized so; multiplied as they are by L4"
    )
    for made in (choose("auto", "int8", VNNI, FLOAT8), choose("fp8", "int8", VNNI)):
        assert "this processor (AVX-512 VNNI) does not multiply fp8, so they take 16 bits" in made.reason
        assert "int8 would take half the memory" in made.reason
    plain_gguf = Stored("GGUF")
    assert choose("auto", "int8", VNNI, plain_gguf).reason == "GGUF: the checkpoint is quantized so"


def test_an_unknown_name() -> None:
    with pytest.raises(QuantizationError, match="use one of: int8"):
        choose("int3", "same", VNNI)
