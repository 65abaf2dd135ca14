"""What a kernel is launched with besides its arguments: constants, warps and stages. No torch, no Triton, no device."""

from __future__ import annotations

from typing import Any, NamedTuple


class Launch(NamedTuple):
    """`constants` are compiled into the kernel; `stages`: how many iterations of a loop are in flight."""

    constants: dict[str, int]
    warps: int
    stages: int
    fuses: bool = True
    """Whether a product and a sum may be rounded once; not where results must be bit-equal to a CPU's."""

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": self.fuses}


def start(kernel: Any, grid: tuple[int, ...], launch: Launch, *arguments: Any) -> None:
    kernel[grid](*arguments, **launch.constants, **launch.options)


def power_of_two(least: int) -> int:
    """The smallest power of two >= `least`. Tiles of the language have no other sizes."""
    return 1 << max(least - 1, 0).bit_length()
