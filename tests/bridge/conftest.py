from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.scripted import ScriptedEngine, World
from tidewright.bridge import bridge as bridge_module
from tidewright.bridge.bridge import Bridge
from tidewright.config import Settings
from tidewright.tokenization import Tokenizer


@pytest.fixture
def world(model_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(bridge_module, "EngineClient", ScriptedEngine)
    settings = Settings(max_running=3, max_waiting=2, shutdown_grace=1, class_targets="1000:tpot=1e-9")
    bridge = Bridge(settings, settings.engine_config(model_dir), tokenizer)
    bridge.start()
    yield World(bridge, bridge._client, tokenizer)  # type: ignore[arg-type]
    bridge.stop()
