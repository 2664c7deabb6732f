"""Metrics: Ray exports every name of the table as the dashboard asks for it, and the dashboard asks for nothing else."""

import json
import re
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from vidgen_ray.batch import metrics
from vidgen_ray.batch.metrics import ERRORS_NAMED, METRICS, RunMetrics, exported_names
from vidgen_ray.batch.run_progress import Snapshot, StageStatus

DASHBOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana" / "vidgen.json").read_text())
MONITORING = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
EXPRESSIONS = [
    pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}".replace(" ", "-"))
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
]
SERIES = re.compile(r"\bray_vidgen_\w+")
FUNCTIONS = {"sum", "avg", "rate", "increase", "round", "histogram_quantile"}
KEYWORDS = {"by"}
LABELS = {"profile", "le", *(label for spec in METRICS.values() for label in spec.labels)}


def every_exported_name():
    return {series for name in METRICS for series in exported_names(name)}


# The dashboard and the table


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_dashboard_asks_only_for_series_that_exist(expression):
    series = SERIES.findall(expression)
    assert series
    assert set(series) <= every_exported_name()


def test_every_metric_is_on_the_dashboard_and_in_the_docs():
    shown = set(SERIES.findall(json.dumps(DASHBOARD)))
    for name, spec in METRICS.items():
        assert shown & set(exported_names(name)), name
        assert f"`{name}`" in MONITORING
        assert spec.about in MONITORING


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_dashboards_queries_are_well_formed(expression):
    open_brackets = []
    pairs = {")": "(", "]": "[", "}": "{"}
    for sign in re.sub(r'"[^"]*"', '""', expression):
        if sign in pairs.values():
            open_brackets.append(sign)
        elif sign in pairs:
            assert open_brackets.pop() == pairs[sign]
    assert not open_brackets
    bare = re.sub(r'"[^"]*"|\[\$__(rate_interval|range)\]', "", expression)
    assert set(re.findall(r"[a-z_]+", SERIES.sub("", bare))) <= FUNCTIONS | KEYWORDS | LABELS
    # A rate of a gauge, or a counter as it is, would be drawn without complaint and mean nothing.
    for series in SERIES.findall(expression):
        kind = next(METRICS[name].kind for name in METRICS if series in exported_names(name))
        assert bool(re.search(rf"(rate|increase)\({series}\b", expression)) == (kind != "gauge")


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_dashboard_groups_by_labels_that_the_series_have(expression):
    [series] = set(SERIES.findall(expression))
    spec = next(spec for name, spec in METRICS.items() if series in exported_names(name))
    labels = {"profile", *spec.labels, *(["le"] if series.endswith("_bucket") else [])}
    used = [label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")]
    used += re.findall(r"(\w+)=~?\"", expression)
    assert set(used) <= labels


def test_the_dashboard_can_be_imported_anywhere():
    """Panels name the variable, not somebody's data source; ids are unique; nothing lies over another."""
    panels = DASHBOARD["panels"]
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "profile"}
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert {target["datasource"]["uid"] for panel in panels for target in panel["targets"]} == {"${datasource}"}
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert "id" not in DASHBOARD
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


# What Ray really exports


@pytest.fixture(scope="module")
def metrics_address():
    """A Ray of our own that exports what its workers tell it every second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    yield f"http://127.0.0.1:{port}/metrics"
    ray.shutdown()


@ray.remote(num_cpus=0)
class Run:
    """Stands where the coordinator of a run stands: in a worker process."""

    def tell(self):
        run = RunMetrics("tiny")
        run.shot_ended("done")
        run.shot_ended("failed")
        run.step_ended("svd", 12.0, cached=False)
        run.step_ended("svd", 0.0, cached=True)
        for n in range(ERRORS_NAMED + 5):
            run.step_failed("svd", f"Error{n}")
        run.retried("svd")
        run.adapter_loads(0)
        run.adapter_loads(3)
        run.frames_upscaled(25)
        run.snapshot(Snapshot({"svd": StageStatus(14, 2, 2, 0.98)}, gpus_busy=0.93, in_progress=21))
        self._run = run


def scraped(address, wanted):
    """Name -> samples, once all the wanted names are there."""
    deadline = time.monotonic() + 60
    while True:
        found = {}
        try:
            text = urllib.request.urlopen(address, timeout=5).read().decode()
        except (urllib.error.URLError, ConnectionError):
            text = ""
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample)
        if wanted <= set(found):
            return found
        assert time.monotonic() < deadline, f"not exported: {sorted(wanted - set(found))}"
        time.sleep(0.5)  # the agent tells nobody that it has new values


def test_ray_exports_every_metric_under_the_names_that_the_table_says(metrics_address):
    run = Run.remote()
    ray.get(run.tell.remote())
    found = scraped(metrics_address, every_exported_name())
    assert {name for name in found if "vidgen" in name} == every_exported_name()
    for name, spec in METRICS.items():
        for sample in found[exported_names(name)[0]]:
            assert {"profile", *spec.labels} <= set(sample.labels), name
    value = {name: samples[0].value for name, samples in found.items()}
    assert value["ray_vidgen_queued"] == 14
    assert value["ray_vidgen_busy_share"] == pytest.approx(0.98)
    assert value["ray_vidgen_adapter_loads_total"] == 3
    assert value["ray_vidgen_step_seconds_count"] == 1
    shots = {sample.labels["status"]: sample.value for sample in found["ray_vidgen_shots_total"]}
    assert shots == {"done": 1, "failed": 1}
    errors = {sample.labels["error"]: sample.value for sample in found["ray_vidgen_step_failures_total"]}
    assert len(errors) == ERRORS_NAMED + 1
    assert errors["other"] == 5


def test_buckets_reach_from_tenths_of_a_second_to_a_stages_time_out():
    assert sorted(metrics.STEP_SECONDS) == metrics.STEP_SECONDS
    assert metrics.STEP_SECONDS[0] <= 0.1
    assert metrics.STEP_SECONDS[-1] >= 1800
