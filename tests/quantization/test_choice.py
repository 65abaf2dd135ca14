"""Which quantization is served, and what is said about it."""

from __future__ import annotations

import pytest

from tidewright.quantization.affine import QuantizationError, scheme_named
from tidewright.quantization.choice import choose


def test_the_option_decides_for_a_checkpoint_that_is_not_quantized() -> None:
    assert choose("auto", "same").scheme is None
    assert choose("none", "same").scheme is None
    made = choose("int4-g64", "keep")
    assert made.scheme_of(is_head=False) == scheme_named("int4-g64")
    assert made.scheme_of(is_head=True) is None
    assert choose("int4-g64", "int8").scheme_of(is_head=True) == scheme_named("int8")
    assert made.reason.startswith("int4-g64: as the option says")
    assert "as they are" in made.reason


def test_a_quantized_checkpoint_stays_what_it_is() -> None:
    for asked in ("auto", "stored"):
        made = choose(asked, "same", "gptq", has_plain=False)
        assert made.is_stored
        assert made.scheme_of(is_head=False) is None  # nothing is quantized while loading
    assert not choose("none", "same", "gptq", has_plain=False).is_stored  # dequantized
    with pytest.raises(QuantizationError, match=r"is quantized \(gptq\) and can't be made int8"):
        choose("int8", "same", "gptq", has_plain=False)


def test_with_plain_weights_beside_quantized_ones_the_option_decides() -> None:
    assert not choose("auto", "same", "GGUF").is_stored
    assert choose("stored", "same", "GGUF").is_stored
    assert choose("int8", "same", "GGUF").scheme_of(is_head=True) == scheme_named("int8")
    with pytest.raises(QuantizationError, match="is not quantized"):
        choose("stored", "same")


def test_an_unknown_name() -> None:
    with pytest.raises(QuantizationError, match="use one of: int8"):
        choose("int3", "same")
