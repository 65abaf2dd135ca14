"""NVIDIA's aiperf, unchanged, beside our own load test: the same requests against the same server, one after the other.

aiperf has no endpoint type for Triton. Its `template` speaks to Triton's HTTP `generate_stream`; KServe's gRPC it does
not speak at all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.environments import install_with_pip, made, python_of
from tidewright.cache import cache_dir

PINS = Path(__file__).resolve().parent.parent / "tests" / "clients" / "environments" / "aiperf.txt"
TIMEOUT = 3600  # seconds
TEMPLATE = "triton.json"  # a file, as aiperf cuts options at commas


class AiperfError(Exception):
    """It did not run to its end; the message has its last words."""


@dataclass(frozen=True)
class Plan:
    """What both do."""

    url: str
    """Of the gateway; of Triton's HTTP if `triton_model` is set."""
    model: str
    tokenizer: str
    """The folder of the model."""
    requests: int
    concurrency: int
    prompt: int
    answer: int
    key: str = ""
    triton_model: str = ""


def template(answer: int) -> str:
    """The body of a request to Triton, with aiperf's text in it."""
    options = {"max_tokens": answer, "ignore_eos": True, "stream": True, "temperature": 0.7}
    return '{"text_input": {{ text|tojson }}, ' + json.dumps(options).removeprefix("{")


def command(plan: Plan, program: Path, folder: Path) -> list[str]:
    words = [str(program.with_name("aiperf")), "profile", "--model", plan.model, "--url", plan.url, "--streaming"]
    if plan.triton_model:
        words += ["--endpoint-type", "template", "--endpoint", f"/v2/models/{plan.triton_model}/generate_stream"]
        words += [
            "--extra-inputs",
            f"payload_template:{folder / TEMPLATE}",
            "--extra-inputs",
            "response_field:text_output",
        ]
    else:
        words += ["--endpoint-type", "chat", "--use-server-token-count"]
        words += ["--extra-inputs", f"min_tokens:{plan.answer}", "--extra-inputs", "ignore_eos:true"]
    if plan.key:
        words += ["--api-key", plan.key]
    return [
        *words,
        *("--tokenizer", plan.tokenizer, "--random-seed", "1", "--ui", "none", "--workers-max", "1"),
        *("--synthetic-input-tokens-mean", str(plan.prompt), "--output-tokens-mean", str(plan.answer)),
        *("--request-count", str(plan.requests), "--concurrency", str(plan.concurrency)),
        *("--output-artifact-dir", str(folder)),
    ]


def run(plan: Plan) -> dict[str, Any]:
    """aiperf's own report.

    Raises:
        AiperfError: it failed.
    """
    print("Making aiperf's environment, if there is none yet (some minutes).", file=sys.stderr)
    try:
        program = python_of(made(PINS, cache_dir() / "clients", install_with_pip))
    except RuntimeError as error:
        raise AiperfError(str(error)) from None
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / TEMPLATE).write_text(template(plan.answer), encoding="utf-8")
        # HF_HUB_OFFLINE would make it refuse a folder as tokenizer.
        environment = {**os.environ, "HF_HOME": scratch, "NO_PROXY": "127.0.0.1"}
        try:
            done = subprocess.run(
                command(plan, program, Path(scratch)),
                env=environment,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise AiperfError(f"aiperf did not end within {TIMEOUT} s: ask for fewer requests") from None
        found = list(Path(scratch).rglob("profile_export_aiperf.json"))
        if done.returncode or not found:
            words = (done.stdout + done.stderr).strip().splitlines()[-15:]
            raise AiperfError("aiperf failed:\n" + "\n".join(words))
        report: dict[str, Any] = json.loads(found[0].read_text())
    return report


def figures(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Of aiperf's report, by our names."""

    def of(name: str, field: str = "avg") -> float | None:
        value = (report.get(name) or {}).get(field)
        return None if value is None else float(value)

    errors = of("error_request_count")
    found = {"requests": of("request_count"), "failed": errors or 0.0, "requests/s": of("request_throughput")}
    requests, length = of("request_count"), of("output_sequence_length")
    found["output tokens"] = round(requests * length) if requests and length else None
    for label, name in (("TTFT", "time_to_first_token"), ("TPOT", "inter_token_latency"), ("whole", "request_latency")):
        for ours, theirs in (("mean", "avg"), ("p50", "p50"), ("p99", "p99")):
            found[f"{label} {ours}, ms"] = of(name, theirs)
    return found


def ours(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """The same of our report's summary."""
    found = {
        "requests": summary["requests"],
        "failed": summary["failed"],
        "requests/s": summary["requests_per_second"],
        "output tokens": summary["output_tokens"],
    }
    for label, name in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("whole", "e2e_ms")):
        for statistic in ("mean", "p50", "p99"):
            found[f"{label} {statistic}, ms"] = summary[name][statistic]
    return found


def rows(summary: Mapping[str, Any] | None, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Side by side; `summary` is None if ours did not run."""
    right = figures(report)
    left = ours(summary) if summary else dict.fromkeys(right)
    return [
        {"name": name, "ours": left[name], "aiperf": right[name], "ratio": _ratio(left[name], right[name])}
        for name in left
    ]


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None
