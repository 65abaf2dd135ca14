"""What each dashboard shows."""

from __future__ import annotations

from dashboard_panels.engine import ENGINE
from dashboard_panels.gpu import GPU
from dashboard_panels.replicas import REPLICAS
from dashboard_panels.service import SERVICE
from dashboard_panels.tenants import TENANTS

DASHBOARDS = (SERVICE, ENGINE, REPLICAS, TENANTS, GPU)
