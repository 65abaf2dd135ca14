"""Which quantization a model is served with: what was asked for, against what the checkpoint is. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tidewright.quantization.affine import SCHEMES, QuantizationError, Scheme, scheme_named

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


def choose(asked: str, head: str, stored: str = "", has_plain: bool = True) -> Quantization:
    """`asked` is the option: auto, none, stored or a scheme's name. `head`: "int8", "same" or "keep".

    `stored` is the format that the checkpoint is quantized in, empty if it is not; `has_plain`: it has the same weights
    in 16 or 32 bits as well. Raises QuantizationError.
    """
    if asked == STORED and not stored:
        raise QuantizationError(
            "quantization is 'stored', but the checkpoint is not quantized; choose auto or a scheme"
        )
    if stored and (asked == STORED or not has_plain):
        if asked == NONE:
            return Quantization(reason=f"none: as the option says, dequantized from {stored} while loading")
        if asked not in (AUTO, STORED):
            raise QuantizationError(
                f"the checkpoint is quantized ({stored}) and can't be made {asked}; choose auto, or serve the "
                f"checkpoint that it was made from"
            )
        return Quantization(is_stored=True, reason=f"{stored}: the checkpoint is quantized so")
    if asked == AUTO:
        return Quantization(reason="none: the checkpoint has plain weights")
    if asked == NONE:
        return Quantization(reason="none: as the option says")
    scheme = scheme_named(asked)
    head_scheme = {"int8": SCHEMES["int8"], "same": scheme, "keep": None}[head]
    said = head_scheme.name if head_scheme else "as they are"
    reason = f"{scheme.name}: as the option says, rounded to nearest while loading; head and embedding: {said}"
    return Quantization(scheme, head_scheme, reason=reason)
