"""Which quantization a model is served with: what was asked for, what the checkpoint is, what the device has. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tidewright.quantization.affine import SCHEMES, QuantizationError, Scheme, scheme_named
from tidewright.quantization.hardware import FP8, Hardware, advice, on

AUTO, NONE, STORED = "auto", "none", "stored"


@dataclass(frozen=True)
class Quantization:
    """Of a model's linear layers, its head and its embedding."""

    scheme: Scheme | None = None
    """Weights that the checkpoint has in 16 or 32 bits are quantized so as they are loaded; None: they stay.

    Of a quantized checkpoint: that of most of its weights.
    """
    head: Scheme | None = None
    """The same for the head and the embedding."""
    is_stored: bool = False
    """The checkpoint's own weights are quantized; each says how."""
    reason: str = ""
    """For the log: what was chosen, and why."""

    def scheme_of(self, is_head: bool) -> Scheme | None:
        """What a layer's weight becomes as it is loaded."""
        if self.is_stored:
            return None
        return self.head if is_head else self.scheme


NOT_QUANTIZED = Quantization()


@dataclass(frozen=True)
class Stored:
    """How a checkpoint is quantized."""

    name: str
    scheme: Scheme | None = None
    """Of most of its weights; None: they are plain, as all of a GGUF file may be."""
    has_plain: bool = False
    """The same weights are there in 16 or 32 bits as well."""


def choose(asked: str, head: str, hardware: Hardware, stored: Stored | None = None) -> Quantization:
    """`asked` is the option: auto, none, stored or a scheme's name. `head`: "int8", "same" or "keep".

    auto loses nothing: weights stay as the checkpoint has them, and the reason says what would be smaller or faster.
    Raises QuantizationError.
    """
    if asked == STORED and not stored:
        raise QuantizationError(
            "quantization is 'stored', but the checkpoint is not quantized; choose auto or a scheme"
        )
    if stored and (asked == STORED or not stored.has_plain):
        if asked == NONE:
            return Quantization(reason=f"none: as the option says, dequantized from {stored.name} while loading")
        if asked not in (AUTO, STORED):
            raise QuantizationError(
                f"the checkpoint is quantized ({stored.name}) and can't be made {asked}; choose auto, or serve the "
                f"checkpoint that it was made from"
            )
        reason = f"{stored.name}: the checkpoint is quantized so"
        if stored.scheme:
            reason = f"{stored.scheme.name}: the checkpoint is quantized so; {on(hardware, kind_of(stored.scheme))}"
        return Quantization(stored.scheme, is_stored=True, reason=reason)
    if asked == AUTO:
        beside = kind_of(stored.scheme) if stored and stored.scheme else ""
        return Quantization(reason=f"none: auto keeps plain weights; {advice(hardware, beside)}")
    if asked == NONE:
        return Quantization(reason="none: as the option says")
    scheme = scheme_named(asked)
    head_scheme = {"int8": SCHEMES["int8"], "same": scheme, "keep": None}[head]
    said = head_scheme.name if head_scheme else "as they are"
    reason = f"{scheme.name}: as the option says, rounded to nearest while loading; head and embedding: {said}"
    return Quantization(scheme, head_scheme, reason=f"{reason}; {on(hardware, kind_of(scheme))}")


def kind_of(scheme: Scheme) -> str:
    """As `Hardware` names them."""
    return FP8 if scheme.is_float else f"int{scheme.weight_bits}"
