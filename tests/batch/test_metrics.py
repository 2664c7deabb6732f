"""Batch metrics: Ray exports every metric, and the Grafana dashboard uses only exported series."""

import json
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from vidgen_ray.batch.results import METRICS, RunMetrics
from vidgen_ray.engine.engine_metrics import MAX_ERROR_LABELS, exported_names
from vidgen_ray.engine.ray_cluster import init_local_ray
from vidgen_ray.engine.status import Snapshot
from vidgen_ray.outputs.run_log import RunLabels, StageStatus

DASHBOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana" / "vidgen.json").read_text())
MONITORING = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SERIES = re.compile(r"\bray_vidgen_\w+")
RUN_LABELS = {"profile": "tiny", "run": "film", "script": r"M\xe4rz.jsonl", "team": "team", "submission_id": "job"}


def every_exported_name():
    return {series for name in METRICS for series in exported_names(name, METRICS[name])}


def test_every_metric_is_on_the_dashboard_and_in_the_docs():
    shown = set(SERIES.findall(json.dumps(DASHBOARD)))
    for name, spec in METRICS.items():
        assert shown & set(exported_names(name, METRICS[name])), name
        assert f"`{name}`" in MONITORING
        assert spec.description in MONITORING


def test_dashboard_queries_have_the_labels_and_rates_of_their_series():
    specs = {series: spec for name, spec in METRICS.items() for series in exported_names(name, spec)}
    for expression in EXPRESSIONS:
        [series] = set(SERIES.findall(expression))
        # Grafana would plot the rate of a gauge or a raw counter without an error. Neither has a meaning.
        is_rate = bool(re.search(rf"(rate|increase)\({series}\b", expression))
        assert is_rate == (specs[series].kind != "gauge"), expression
        labels = {*RUN_LABELS, *specs[series].labels, *(["le"] if series.endswith("_bucket") else [])}
        used = [label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")]
        used += re.findall(r"(\w+)=~?\"", expression)
        assert set(used) <= labels, expression


@pytest.fixture(scope="module")
def metrics_address():
    """Address of the metrics of a local Ray with a report interval of one second."""
    init_local_ray(
        num_cpus=1,
        log_to_driver=False,
        object_store_memory=100 << 20,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    (node,) = ray.nodes()
    yield f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


@ray.remote(num_cpus=0)
class Run:
    """Worker process that records metrics, like the director of a run."""

    def record(self):
        labels = RunLabels(run="000001-x", name="film", profile="tiny", script="März.jsonl", team="team", submission_id="job")
        run = RunMetrics(labels, lambda *_: None, print)
        run.shot_ended("done")
        run.shot_ended("failed")
        run.step_ended("svd", 12.0, cached=False)
        run.step_ended("svd", 0.0, cached=True)
        for n in range(MAX_ERROR_LABELS + 5):
            run.step_failed("svd", f"Error{n}")
        run.retried("svd")
        run.adapter_loads(0)
        run.adapter_loads(3)
        run.frames_upscaled(25)
        run.quarantined("worker on node", "failed for svd")
        run.snapshot(
            Snapshot({"svd": StageStatus(14, 2, 2, 0.98)}, gpus_busy=0.93, in_progress=21, quarantined=("worker on node",))
        )
        self._run = run


def scrape(address):
    """Return name -> samples of what is exported now, without runs that other tests of this process have recorded."""
    try:
        text = urllib.request.urlopen(address, timeout=5).read().decode()
    except (urllib.error.URLError, ConnectionError):
        return {}
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "vidgen" not in sample.name or RUN_LABELS.items() <= sample.labels.items():
                samples.setdefault(sample.name, []).append(sample)
    return samples


FIGURES = {
    "ray_vidgen_queued": 14,
    "ray_vidgen_busy_share": pytest.approx(0.98),
    "ray_vidgen_adapter_loads_total": 3,
    "ray_vidgen_quarantines_total": 1,
    "ray_vidgen_quarantined": 1,
    "ray_vidgen_step_seconds_count": 1,
}
ERRORS = {**{f"Error{n}": 1 for n in range(MAX_ERROR_LABELS)}, "other": 5}


def by_label(samples, label):
    return {sample.labels[label]: sample.value for sample in samples}


def is_complete(exported):
    """Return whether all metrics are exported with the labels and values of the run. Reports come one after another."""
    return (
        every_exported_name() <= exported.keys()
        and all({*spec.labels} <= {*exported[exported_names(name, spec)[0]][0].labels} for name, spec in METRICS.items())
        and {name: exported[name][0].value for name in FIGURES} == FIGURES
        and by_label(exported["ray_vidgen_shots_total"], "status") == {"done": 1, "failed": 1}
        and by_label(exported["ray_vidgen_step_failures_total"], "error") == ERRORS
    )


def test_ray_exports_every_metric_under_its_documented_name(metrics_address):
    deadline = time.monotonic() + 60
    # Ray loses what it reports before the agent has started. By default, its first report comes after 10 s.
    while not scrape(metrics_address):
        assert time.monotonic() < deadline
        time.sleep(0.1)  # polls: the agent does not send events
    # A new process: one that Ray started before the agent may have given up to report.
    run = Run.options(runtime_env={"env_vars": {"RECORDS": "1"}}).remote()
    ray.get(run.record.remote())
    deadline = time.monotonic() + 60
    while not is_complete(exported := scrape(metrics_address)):
        assert time.monotonic() < deadline, {name: exported[name] for name in exported if "vidgen" in name}
        time.sleep(0.2)  # polls: the metrics agent does not send events
    assert {name for name in exported if "vidgen" in name} == every_exported_name()
