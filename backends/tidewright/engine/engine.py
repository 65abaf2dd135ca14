"""The engine: requests in, new tokens out, one step at a time. It knows no process and no socket (process.py)."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch

from tidewright.engine.messages import EngineConfig, EngineStats, Ready, SequenceOutput, Submit
from tidewright.engine.model_runner import EngineConfigError, ModelRunner, read_json
from tidewright.engine.scheduler import RequestRefusedError, Scheduler, SchedulerConfig
from tidewright.engine.sequence import Sequence
from tidewright.kv_cache.block_pool import BlockPool

log = logging.getLogger(__name__)


class Engine:
    """Raises a ValueError whose message says what to change when it can't be made."""

    def __init__(self, config: EngineConfig) -> None:
        for name in ("block_size", "max_batched_tokens", "max_running"):
            if getattr(config, name) < 1:
                raise EngineConfigError(f"{name} must be at least 1")
        if config.threads > 0:
            torch.set_num_threads(config.threads)
        started = time.monotonic()
        self.runner = ModelRunner(config)
        self.load_seconds = time.monotonic() - started
        self.config = config
        self.scheduler = Scheduler(
            SchedulerConfig(
                block_size=config.block_size,
                max_batched_tokens=config.max_batched_tokens,
                max_running=config.max_running,
                max_model_len=self.runner.max_model_len,
                vocab_size=self.runner.vocab_size,
                eos_ids=_eos_ids(Path(config.model_dir)),
            ),
            BlockPool(self.runner.kv_cache.num_blocks),
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def submit(self, request: Submit) -> SequenceOutput | None:
        """Takes a request; the output that ends it at once, if it can never run."""
        try:
            self.scheduler.add(Sequence(request.request_id, request.prompt_token_ids, request.sampling))
        except RequestRefusedError as error:
            log.warning("request %d refused: %s", request.request_id, error)
            return SequenceOutput(request.request_id, [], "invalid")
        return None

    def abort(self, request_id: int) -> None:
        self.scheduler.abort(request_id)

    def step(self) -> list[SequenceOutput]:
        plan = self.scheduler.schedule()
        result = self.runner.run(plan)
        return self.scheduler.commit(plan, result)

    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    def ready(self) -> Ready:
        return Ready(
            pid=os.getpid(),
            device=str(self.runner.device),
            dtype=self.config.dtype,
            block_size=self.config.block_size,
            num_blocks=self.runner.kv_cache.num_blocks,
            max_model_len=self.runner.max_model_len,
            vocab_size=self.runner.vocab_size,
            load_seconds=self.load_seconds,
        )


def _eos_ids(folder: Path) -> tuple[int, ...]:
    """From generation_config.json, which often names more of them, else from config.json."""
    value: Any = None
    if (folder / "generation_config.json").is_file():
        value = read_json(folder / "generation_config.json").get("eos_token_id")
    if value is None:
        value = read_json(folder / "config.json").get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
