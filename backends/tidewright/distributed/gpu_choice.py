"""Reads `device`: which GPUs the ranks of a host take. No torch: settings are validated by it, too."""

from __future__ import annotations

DEVICE_PATTERN = r"^(auto|cpu|cuda(:\d{1,3}(,\d{1,3})*)?)$"


class GpuChoiceError(ValueError):
    """`device` names other GPUs than the ranks of a host can take."""


def gpus_of(device: str, ranks: int) -> tuple[int, ...]:
    """The GPU of each rank of a host, by its local number: one named, or none, is the first of consecutive ones.

    Args:
        device: "cuda", "cuda:4" or "cuda:4,6,5,7".

    Raises:
        GpuChoiceError: several are named, but not one for each rank.
    """
    _, _, names = device.partition(":")
    named = [int(name) for name in names.split(",")] if names else [0]
    if len(named) == 1:
        return tuple(range(named[0], named[0] + ranks))
    if len(named) != ranks or len(set(named)) != ranks:
        raise GpuChoiceError(
            f"device {device!r} names {len(set(named))} different GPUs, but each host has {ranks} "
            f"{'rank' if ranks == 1 else 'ranks'}; name a GPU for each, or only the first of consecutive ones"
        )
    return tuple(named)
