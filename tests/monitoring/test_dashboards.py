"""Grafana's dashboards are what the code makes of them; they and the rules ask only for metrics that exist."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tidewright_gateway.metrics.catalogue import CATALOGUE

MONITORING = Path(__file__).resolve().parents[2] / "monitoring"
sys.path.insert(0, str(MONITORING))

from dashboard_panels import DASHBOARDS  # noqa: E402
from dashboard_panels.shapes import Dashboard, Panel  # noqa: E402
from make_dashboards import text  # noqa: E402

GROUPS = [
    group
    for file in ("recording", "alerts")
    for group in yaml.safe_load((MONITORING / "rules" / f"{file}.yml").read_text())["groups"]
]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
PANELS = [
    pytest.param(panel, id=f"{dashboard.name}-{panel.title}")
    for dashboard in DASHBOARDS
    for row in dashboard.rows
    for panel in row.panels
]
EXTERNAL = {
    *("up", "ALERTS"),
    *("node_filesystem_avail_bytes", "node_filesystem_size_bytes", "node_filesystem_readonly"),
    # https://github.com/NVIDIA/dcgm-exporter/blob/main/etc/default-counters.csv
    *("DCGM_FI_DEV_GPU_TEMP", "DCGM_FI_DEV_POWER_USAGE", "DCGM_FI_DEV_SM_CLOCK", "DCGM_FI_DEV_XID_ERRORS"),
    *("DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_FREE", "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL"),
    *("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL", "DCGM_FI_PROF_GR_ENGINE_ACTIVE", "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"),
    *("DCGM_FI_PROF_DRAM_ACTIVE", "DCGM_FI_PROF_PCIE_TX_BYTES", "DCGM_FI_PROF_PCIE_RX_BYTES"),
}


def series() -> dict[str, set[str]]:
    """Labels of each series that there can be."""
    found: dict[str, set[str]] = {}
    for prefix, specs in CATALOGUE.items():
        for spec in specs:
            labels = {label.name for label in spec.labels}
            if spec.kind == "histogram":
                found |= {f"{prefix}{spec.name}_{suffix}": labels for suffix in ("sum", "count")}
                found[f"{prefix}{spec.name}_bucket"] = labels | {"le"}
            else:
                found[prefix + spec.name] = labels
    return found


SERIES = series()
RECORDED = {rule["record"] for rule in RULES if "record" in rule}


def selectors(node: Any) -> Iterator[Any]:
    """All in an expression of promql-parser."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        if (child := getattr(node, name, None)) is not None and not isinstance(child, str):
            yield from selectors(child)
    for child in getattr(node, "args", None) or []:
        yield from selectors(child)


def faults(expr: str) -> list[str]:
    """What an expression names that there is not."""
    wrong = []
    found = list(selectors(promql_parser.parse(expr)))
    for selector in found:
        if selector.name in EXTERNAL | RECORDED:
            continue
        if selector.name not in SERIES:
            wrong.append(f"no metric {selector.name}")
            continue
        known = SERIES[selector.name] | {"job", "instance"}
        wrong += [
            f"{selector.name} has no label {one.name}" for one in selector.matchers.matchers if one.name not in known
        ]
    in_text = set(re.findall(r"\b(?:tidewright|nv|process|node|DCGM)_\w+|\b\w+:\w+:\w+", re.sub(r'"[^"]*"', "", expr)))
    return wrong + [f"{name} was not looked at" for name in in_text - {selector.name for selector in found}]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda one: one.name)
def test_the_committed_dashboard_is_what_the_code_makes(dashboard: Dashboard) -> None:
    file = MONITORING / "dashboards" / f"{dashboard.name}.json"
    assert file.read_text() == text(dashboard), "python monitoring/make_dashboards.py"


def test_there_are_no_other_dashboards() -> None:
    assert {path.stem for path in (MONITORING / "dashboards").iterdir()} == {one.name for one in DASHBOARDS}


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_asks_for_what_exists(panel: Panel) -> None:
    assert panel.queries
    assert [fault for query in panel.queries for fault in faults(query.expr)] == []


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_of_engines_names_their_models(panel: Panel) -> None:
    """One server may have several: a series without its model's name is one of all, or of nobody knows which."""
    of_engines = {name for name in SERIES if re.match(r"tidewright_(?!gateway_|failsafe_|fallback_)", name)}
    of_engines |= {name for name in RECORDED if name.startswith("instance:tidewright_")}
    for query in panel.queries:
        if of_engines & {selector.name for selector in selectors(promql_parser.parse(query.expr))}:
            grouping = re.search(r"\bby \(([^)]*)\)", query.expr)
            has_model = "model" in re.split(r", *", grouping[1]) if grouping else True
            assert ("{{model}}" in query.legend) == has_model, query
            assert has_model or "instance" in str(grouping), query


@pytest.mark.parametrize("rule", RULES, ids=lambda one: one.get("alert", one.get("record")))
def test_a_rule_asks_for_what_exists(rule: dict[str, Any]) -> None:
    assert faults(rule["expr"]) == []


def test_faults_are_found() -> None:
    assert faults("rate(tidewright_gateway_none_total[5m]) / 2") == ["no metric tidewright_gateway_none_total"]
    assert faults('sum(tidewright_gateway_tokens_total{kin="x"})') == [
        "tidewright_gateway_tokens_total has no label kin"
    ]
    assert faults("histogram_quantile(0.9, sum by (le) (job:none:x))") == ["no metric job:none:x"]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda one: one.name)
def test_panels_fill_rows_and_lie_side_by_side(dashboard: Dashboard) -> None:
    content = json.loads(text(dashboard))
    taken: set[tuple[int, int]] = set()
    for panel in content["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        names = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(names)) == len(names)
    assert len({panel["id"] for panel in content["panels"]}) == len(content["panels"])


def test_a_gateways_figure_is_on_some_dashboard_or_alert() -> None:
    """What is measured is looked at."""
    exprs = [query.expr for panel in PANELS for query in panel.values[0].queries] + [rule["expr"] for rule in RULES]
    named = {selector.name for expr in exprs for selector in selectors(promql_parser.parse(expr))}
    specs = [spec for spec in CATALOGUE["tidewright_gateway_"] if spec.name != "info"]
    names = {spec.name: {f"tidewright_gateway_{spec.name}{end}" for end in ("", "_bucket", "_count")} for spec in specs}
    assert [name for name, series in names.items() if not series & named] == ["breaker_transitions_total"]
