"""Makes the PrometheusRules of k8s/components/monitoring from monitoring/rules: `python k8s/make_rules.py`."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "monitoring" / "rules"
TARGET = ROOT / "k8s" / "components" / "monitoring" / "rules.yaml"
HEAD = "# Made from monitoring/rules by `python k8s/make_rules.py`; change those.\n"


def rules() -> str:
    return HEAD + yaml.safe_dump_all(
        (
            {
                "apiVersion": "monitoring.coreos.com/v1",
                "kind": "PrometheusRule",
                "metadata": {"name": f"tidewright-{file.stem}"},
                "spec": yaml.safe_load(file.read_text(encoding="utf-8")),
            }
            for file in sorted(RULES.glob("*.yml"))
        ),
        sort_keys=False,
        width=10_000,
    )


if __name__ == "__main__":
    TARGET.write_text(rules(), encoding="utf-8")
