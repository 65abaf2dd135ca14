"""Input tensors of requests, and an engine that takes them."""

from __future__ import annotations

import json

import numpy as np

from tidewright.engine.messages import Ready

ENGINE = Ready(
    pid=1,
    device="cpu",
    dtype="float32",
    block_size=16,
    num_blocks=8,
    max_model_len=256,
    vocab_size=49152,
    load_seconds=0.1,
    eos_ids=[0, 2],
)


def tensors(**values: object) -> dict[str, np.ndarray]:
    made = {}
    for name, value in values.items():
        if isinstance(value, dict):
            value = json.dumps(value)
        if isinstance(value, str):
            value = value.encode()
        dtype = {bytes: np.object_, bool: np.bool_, list: np.int32}[type(value)]
        made[name] = np.array(value if isinstance(value, list) else [value], dtype=dtype)
    return made
