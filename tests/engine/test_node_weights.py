"""Downloads of weights on every node of a cluster."""

import shutil

import pytest

from tests.ray_workers import connected_cluster, own_workers
from tests.weights.hub_server import running_hub
from vidgen_ray.engine.ray_cluster import pull_on_all_nodes
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.weights import resolve
from vidgen_ray.weights.download import Hub

NODE = {"object_store_memory": 100 << 20, **own_workers()}


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes whose processes may use the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with connected_cluster(num_cpus=0, **NODE) as cluster:
        cluster.add_node(num_cpus=1, **NODE)
        yield cluster


def test_every_node_downloads_and_reports_its_own_failures(cluster, tmp_path):
    repository = shutil.copytree(resolve("builtin:tiny/svd"), tmp_path / "svd")
    with running_hub() as server:
        server.repositories = {"owner/svd": repository}
        references = [("hub:owner/nothing", None), ("hub:owner/svd", None)]
        nodes = pull_on_all_nodes(references, Hub(tmp_path / "hub", server.url), dry_run=False, verify=False)
    assert [node.node is None for node in nodes] == [False, False]
    for node in nodes:
        (pulled,), (problem,) = node.pulled, node.problems
        assert digest(tmp_path / "hub" / "models--owner--svd" / "snapshots" / server.commit) == digest(repository)
        assert pulled.path.endswith(server.commit)
        assert "hub:owner/nothing: no repository at" in problem
