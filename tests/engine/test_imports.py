"""An engine on a CPU imports nothing of a GPU's: PyPI's `triton` takes a second, and machines without a GPU lack it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import transformers

from helpers.checkpoints import SIZES, save

_STEP = """
import os, sys
from tidewright.engine.engine import Engine
from tidewright.engine.messages import EngineConfig, Submit
from tidewright.schema import SamplingParams
config = EngineConfig(model_dir=sys.argv[1], device="cpu", dtype="float32", threads=1, kv_cache_memory="1MiB")
engine = Engine(config)
engine.submit(Submit(1, [3, 4], SamplingParams(seed=0, top_k=2, frequency_penalty=1.0)))
assert len(engine.step()[0].token_ids) == 1
print(*{name.partition(".")[0] for name in sys.modules} & {"triton", "transformers", "onnxruntime"}, flush=True)
os._exit(0)  # as the engine's process does: a thread of it may be inside torch, which Python can't end
"""


def test_an_engine_on_a_cpu_imports_no_triton(tmp_path: Path) -> None:
    save(tmp_path, transformers.LlamaConfig(**SIZES))
    run = subprocess.run([sys.executable, "-c", _STEP, str(tmp_path)], check=True, capture_output=True, text=True)
    assert run.stdout.split() == []
