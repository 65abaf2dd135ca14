"""Writes Grafana's dashboards into monitoring/dashboards: `python monitoring/make_dashboards.py`.

What they show is in `dashboard_panels/`; here is how it becomes Grafana's JSON.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from string import ascii_uppercase

from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models

sys.path.insert(0, str(Path(__file__).parent))

from dashboard_panels import DASHBOARDS
from dashboard_panels.shapes import Dashboard, Panel

FOLDER = Path(__file__).parent / "dashboards"
COLUMNS = 24  # of Grafana's grid
DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
REFRESH = "10s"
RATIO = "percentunit"


def text(dashboard: Dashboard) -> str:
    """Its JSON, as it is committed."""
    return JSONEncoder(sort_keys=True, indent=2).encode(_dashboard(dashboard).build()) + "\n"


def _dashboard(dashboard: Dashboard) -> grafana.Dashboard:
    made = (
        grafana.Dashboard(f"Tidewright: {dashboard.title}")
        .uid(f"tidewright-{dashboard.name}")
        .description(dashboard.description)
        .tags(["tidewright"])
        .refresh(REFRESH)
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(grafana.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .link(grafana.DashboardLink("Tidewright").type(models.DashboardLinkType.DASHBOARDS).tags(["tidewright"]))
    )
    if dashboard.instances_of:
        made = made.with_variable(
            grafana.QueryVariable("instance")
            .label("Instance")
            .datasource(DATASOURCE)
            .query(f"label_values({dashboard.instances_of}, instance)")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(models.VariableOption(text="All", value="$__all"))
        )
    ids = itertools.count(1)
    for row in dashboard.rows:
        made = made.with_row(grafana.Row(row.title).id(next(ids)))
        for panel in row.panels:
            made = made.with_panel(_panel(panel, COLUMNS // len(row.panels)).id(next(ids)))
    return made


def _panel(panel: Panel, width: int) -> stat.Panel | timeseries.Panel:
    made = _stat(panel) if panel.is_stat else _time_series(panel)
    made = made.title(panel.title).datasource(DATASOURCE).unit(panel.unit).span(width).height(4 if panel.is_stat else 8)
    if panel.description:
        made = made.description(panel.description)
    for letter, query in zip(ascii_uppercase, panel.queries, strict=False):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend)
        made = made.with_target(target.ref_id(letter))
    steps = [models.Threshold(value=None, color="green")]
    steps += [models.Threshold(value=value, color=color) for value, color in panel.thresholds]
    if panel.thresholds:
        thresholds = grafana.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)
        made = made.thresholds(thresholds)
    return made


def _stat(panel: Panel) -> stat.Panel:
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    return stat.Panel().reduce_options(last).graph_mode(options.BigValueGraphMode.AREA).no_value("no traffic")


def _time_series(panel: Panel) -> timeseries.Panel:
    legend = common.VizLegendOptions().display_mode(options.LegendDisplayMode.LIST)
    made = timeseries.Panel().legend(legend.placement(options.LegendPlacement.BOTTOM).show_legend(True)).min(0)
    made = made.line_width(1).fill_opacity(10).show_points(options.VisibilityMode.NEVER)
    if panel.unit == RATIO and panel.is_share:
        made = made.max(1)
    if panel.is_stacked:
        made = made.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL).group("A")).fill_opacity(40)
    if panel.thresholds:
        made = made.thresholds_style(common.GraphThresholdsStyleConfig().mode(options.GraphTresholdsStyleMode.DASHED))
    return made


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for one in DASHBOARDS:
        (FOLDER / f"{one.name}.json").write_text(text(one), encoding="utf-8")
