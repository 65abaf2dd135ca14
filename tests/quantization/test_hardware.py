"""quantization/hardware.py: what is said of made-up processors and cards."""

from __future__ import annotations

import pytest

from tidewright.quantization.hardware import (
    FP8,
    INT4,
    INT8,
    Hardware,
    advice,
    multiplies_float8,
    of_card,
    of_processor,
    on,
    summary,
)

V3 = {"avx", "avx2", "fma"}
V4 = V3 | {"avx512f", "avx512bw"}
VNNI = of_processor(V4 | {"avx512_vnni", "avx_vnni"}, has_kernels=True)
L4, A10 = of_card("L4", has_float8=True), of_card("A10", has_float8=False)


@pytest.mark.parametrize(
    ("features", "name"),
    [
        (V4 | {"avx512_vnni", "avx_vnni"}, "AVX-512 VNNI"),
        (V3 | {"avx_vnni"}, "AVX-VNNI"),
        (V3 | {"avx512_vnni"}, "AVX2"),  # as a hypervisor may leave it
        (V4, "AVX-512"),
        (V3, "AVX2"),
        ({"asimd"}, ""),
    ],
)
def test_the_best_instructions_of_a_processor_are_named(features: set[str], name: str) -> None:
    found = of_processor(features, has_kernels=True)
    assert found.name == (f"this processor ({name})" if name else "this processor")
    assert [found.lacks(kind) for kind in (INT8, INT4, FP8)] == [False, False, True]


def test_without_kernels_everything_is_emulated() -> None:
    found = of_processor(V4, has_kernels=False)
    assert all(found.lacks(kind) for kind in (INT8, INT4, FP8))
    assert advice(found) == advice(found, INT4)
    assert "would only emulate fewer bits" in advice(found)
    assert "emulated" in summary(found)
    assert on(found, INT8).endswith("so they take 16 bits once they are loaded")  # nothing else would do


def test_advice_names_what_the_checkpoint_has_first() -> None:
    assert advice(VNNI).startswith("--quantization int8 would take half the memory, about ")
    assert advice(VNNI, INT4).startswith("--quantization stored would take a third of the memory, about ")
    assert advice(A10, FP8).startswith("--quantization int8 would take half the memory, at most 2x the speed")
    unknown = of_processor(V3 | {"avx_vnni"}, has_kernels=True)
    assert advice(unknown) == "--quantization int8 would take half the memory on this processor (AVX-VNNI)"


@pytest.mark.parametrize(("card", "is_multiplied"), [(L4, True), (A10, False), (VNNI, False)])
def test_float8_needs_a_card_that_has_it(card: Hardware, is_multiplied: bool) -> None:
    assert card.lacks(FP8) != is_multiplied
    said = on(card, FP8)
    assert said.startswith("multiplied as they are by L4") == is_multiplied
    assert ("does not multiply fp8, so they take 16 bits" in said and "int8 would take" in said) != is_multiplied
    assert ("fp8: dequantized" in summary(card)) != is_multiplied


@pytest.mark.parametrize(("capability", "has_it"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_compute_capabilities(capability: tuple[int, int], has_it: bool) -> None:
    assert multiplies_float8(capability) == has_it
