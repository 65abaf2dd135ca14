"""Prometheus' promtool on the rules: they are valid, each alert fires and ends, and a healthy system has none."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.alerts import SCENARIOS, G, Scenario, T
from tidewright_gateway.metrics.catalogue import CATALOGUE

ROOT = Path(__file__).resolve().parents[2]
RULES = sorted((ROOT / "monitoring" / "rules").glob("*.yml"))
ALL = [
    pytest.param(group, scenario, id=scenario.name) for group, scenarios in SCENARIOS.items() for scenario in scenarios
]
HEARTBEAT = "heartbeat_timestamp_seconds"
STATES_THAT_ARE_WELL = {"engine_up", "healthy", "replica_up", "replicas_usable"}


def promtool(*arguments: str | Path) -> str:
    """Empty if it finds no fault."""
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=120)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def only(group: str, tmp_path: Path) -> list[Path]:
    """Rules with the alerts of one group only: promtool evaluates all it gets, each second."""
    alerts, recording = RULES
    found = yaml.safe_load(alerts.read_text())
    found["groups"] = [one for one in found["groups"] if one["name"] == group]
    file = tmp_path / "alerts.yml"
    file.write_text(yaml.safe_dump(found))
    return [file, recording] if group == "slo" else [file]


def run_tests(
    tmp_path: Path, step: str, series: dict[str, str], queries: list[dict[str, Any]], rules: list[Path] = RULES
) -> str:
    group = {
        "interval": step,
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": queries,
    }
    file = tmp_path / "test.yml"
    content = {"rule_files": [str(path) for path in rules], "evaluation_interval": step, "tests": [group]}
    file.write_text(yaml.safe_dump(content))
    return promtool("test", "rules", file)


def firing(alert: str, at: str, count: int) -> dict[str, Any]:
    samples = [{"labels": "{}", "value": count}] if count else []
    which = f'alertstate="firing", alertname="{alert}"' if alert else ""
    return {"expr": f"count(ALERTS{{{which}}})", "eval_time": at, "exp_samples": samples}


def idle_series() -> dict[str, str]:
    """The whole catalogue with every label's first values, as after a start: nothing has happened yet."""
    found = {f"up{{{G}}}": "1x400", f"up{{{T}}}": "1x400"}
    for prefix, specs in CATALOGUE.items():
        target = G if prefix in ("tidewright_gateway_", "process_") else T
        for spec in specs:
            names = [label.name for label in spec.labels]
            for values in itertools.product(*(label.values or ("x",) for label in spec.labels)):
                labels = "".join(f', {name}="{value}"' for name, value in zip(names, values, strict=True))
                value = "1x400" if spec.name in STATES_THAT_ARE_WELL or values[-1:] == ("closed",) else "0x400"
                if spec.name == HEARTBEAT:
                    value = "1000+1x400"
                suffixes = ("_bucket", "_sum", "_count") if spec.kind == "histogram" else ("",)
                for suffix in suffixes:
                    le = ', le="+Inf"' if suffix == "_bucket" else ""
                    found[f"{prefix}{spec.name}{suffix}{{{target}{labels}{le}}}"] = value
    found[f"process_max_fds{{{G}}}"] = "1024x400"
    return found


@pytest.mark.parametrize("file", RULES, ids=lambda path: path.name)
def test_the_rules_are_valid(file: Path) -> None:
    assert not promtool("check", "rules", "--lint=all", "--lint-fatal", file)


@pytest.mark.parametrize(("group", "scenario"), ALL)
def test_an_alert_fires_and_ends(group: str, scenario: Scenario, tmp_path: Path) -> None:
    queries = [firing(scenario.alert, scenario.fires_at, scenario.count)]
    queries += [firing(scenario.alert, at, 0) for at in scenario.quiet_at]
    assert not run_tests(tmp_path, scenario.step, scenario.series, queries, only(group, tmp_path))


@pytest.mark.parametrize("dies", [True, False])
def test_the_failures_of_a_process_that_died_are_told_once(dies: bool, tmp_path: Path) -> None:
    """It was dead for 10 s, and is loaded again: what failed meanwhile is no news afterwards."""
    failure = f'nv_inference_request_failure{{{T}, model="decoder", reason="BACKEND"}}'
    series = {
        failure: "0x100 0+5x10 50x200",
        f'nv_inference_request_success{{{T}, model="decoder"}}': "0+1x320",
        f"tidewright_{HEARTBEAT}{{{T}}}": "100+1x100 200x10 211+1x200" if dies else "100+1x320",
    }
    queries = [firing("ModelProcessDead", "107s", int(dies)), firing("ModelProcessDead", "120s", 0)]
    queries += [firing("TritonRequestsFail", at, int(not dies)) for at in ("125s", "140s", "155s")]
    queries += [firing("TritonRequestsFail", at, 0) for at in ("200s", "300s")]
    assert not run_tests(tmp_path, "1s", series, queries, RULES[:1])


def test_each_alert_has_a_scenario() -> None:
    alerts = yaml.safe_load(RULES[0].read_text())
    expected = {group["name"]: {rule["alert"] for rule in group["rules"]} for group in alerts["groups"]}
    assert {name: {one.alert for one in scenarios} for name, scenarios in SCENARIOS.items()} == expected


def test_nothing_fires_where_nothing_has_happened_yet(tmp_path: Path) -> None:
    queries = [firing("", at, 0) for at in ("0s", "2s", "10s", "60s", "380s")]
    assert not run_tests(tmp_path, "1s", idle_series(), queries)


def test_nothing_fires_at_a_start(tmp_path: Path) -> None:
    """The model loads for 3 minutes, in which Triton answers nothing, then the engine starts; then requests come."""
    series = idle_series()
    for name in series:
        if f"{T}" in name:
            series[name] = "_x180 " + series[name].replace("x400", "x200")
    series[f"up{{{T}}}"] = "0x180 1x200"
    series[f"up{{{G}}}"] = "0x10 1x380"
    series[f"tidewright_engine_up{{{T}}}"] = "_x180 0x10 1x200"
    series[f"tidewright_gateway_replicas_usable{{{G}}}"] = "_x10 0x180 1x200"
    series[f'tidewright_gateway_replica_up{{{G}, replica="x"}}'] = "_x10 0x180 1x200"
    series[f"tidewright_engine_steps_total{{{T}}}"] = "_x180 0x20 0+50x190"
    series[f'tidewright_gateway_request_outcomes_total{{{G}, outcome="ok"}}'] = "_x10 0x200 0+10x190"
    firing_queries = [
        {"expr": 'count(ALERTS{alertstate="firing"})', "eval_time": at, "exp_samples": []}
        for at in ("1s", "9s", "12s", "100s", "181s", "186s", "195s", "215s", "380s")
    ]
    assert not run_tests(tmp_path, "1s", series, firing_queries)


def test_a_few_failures_of_an_idle_service_burn_no_budget(tmp_path: Path) -> None:
    series = {
        f'tidewright_gateway_request_outcomes_total{{{G}, outcome="ok"}}': "0+1x400",
        f'tidewright_gateway_request_outcomes_total{{{G}, outcome="failed"}}': "0x100 2x300",
    }
    alerts = [firing(name, "130m", 0) for name in ("ErrorBudgetBurnsFast", "ErrorBudgetBurns", "RequestsFail")]
    assert not run_tests(tmp_path, "1m", series, alerts)
