"""lm-eval's local-completions, against lm-eval's own transformers model with the same weights in float32."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{sys.prefix}/huggingface", "OPENAI_API_KEY": os.environ["API_KEY"]}

import torch
from checks import BASE_URL, MODEL, run
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

MODEL_DIR = os.environ["MODEL_DIR"]
TASKS = Path(__file__).parent.parent / "lm_eval_tasks"
NUM_ITEMS = 20
TOLERANCE = 1e-3


def log_likelihoods() -> None:
    expected = samples(reference(), "tidewright_choices")
    for options in ({}, {"batch_size": 4}, {"tokenized_requests": False}):
        found = samples(served(**options), "tidewright_choices")
        for one, other in zip(found, expected, strict=True):
            assert one["doc"] == other["doc"]
            # One answer per choice: its log-likelihood, and whether greedy decoding gives it.
            for (value, greedy), (wanted, wanted_greedy) in zip(
                one["filtered_resps"], other["filtered_resps"], strict=True
            ):
                assert abs(float(value) - float(wanted)) < TOLERANCE, (options, one["doc"], value, wanted)
                assert greedy == wanted_greedy, (options, one["doc"])
            assert one["acc"] == other["acc"]


def generations() -> None:
    expected = samples(reference(), "tidewright_answers")
    found = samples(served(), "tidewright_answers")
    answers = [sample["filtered_resps"] for sample in found]
    assert answers == [sample["filtered_resps"] for sample in expected]
    assert any(answer[0].strip() for answer in answers)


def served(**options: Any) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        base_url=f"{BASE_URL}/completions",
        model=MODEL,
        tokenizer=MODEL_DIR,
        tokenizer_backend="huggingface",
        max_retries=1,
        **options,
    )


def reference() -> HFLM:
    torch.set_num_threads(1)
    return HFLM(pretrained=MODEL_DIR, dtype="float32", device="cpu", batch_size=1, max_length=2048)


def samples(model: Any, task: str) -> list[dict[str, Any]]:
    """By item, in the file's order."""
    os.chdir(TASKS)  # the tasks name their file relative to it
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = simple_evaluate(model=model, tasks=[task], task_manager=manager, log_samples=True, bootstrap_iters=0)
    made: list[dict[str, Any]] = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    assert len(made) == NUM_ITEMS
    return made


if __name__ == "__main__":
    run(globals())
