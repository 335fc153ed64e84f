"""The Grafana dashboard shows metrics that Ray, or kube-state-metrics, really has."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

from helpers.manifests import K8S, find, rendered

DASHBOARD = json.loads((K8S / "base" / "monitoring" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_it_is_delivered_to_grafana() -> None:
    doc = find(rendered()["overlays/gpu"], "ConfigMap", "effdet-dashboard")
    assert doc["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(doc["data"]["dashboard.json"]) == DASHBOARD


def test_metrics_exist_in_the_pinned_ray() -> None:
    ray = find_spec("ray")  # importing it takes seconds
    assert ray is not None
    assert ray.origin is not None
    known = set()
    for pattern in ("dashboard/modules/metrics/dashboards/*.py", "train/**/metrics/*.py"):
        for path in Path(ray.origin).parent.glob(pattern):
            known |= set(re.findall(r"\b(?:ray_)?(?:node|train)_[a-z_]+", path.read_text()))
    used = {name for text in EXPRESSIONS for name in re.findall(r"\bray_\w+(?=\{)", text)}
    assert len(used) >= 12
    missing = {
        name for name in used if name not in known and name.removeprefix("ray_") not in known
    }
    assert missing == set()
    others = {name for text in EXPRESSIONS for name in re.findall(r"\bkube_\w+(?=\{)", text)}
    assert others


def test_panels_ask_one_namespace_and_do_not_overlap() -> None:
    assert all('namespace="$namespace"' in text for text in EXPRESSIONS)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, panel["title"]
                taken.add((x, y))
