"""Cards of two sizes: a model that fits on the larger alone is on the larger, on a real Ray of two nodes."""

import json

import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster

from vidgen_ray.batch.fleet import labels_of
from vidgen_ray.batch.render import render
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner import Cluster, Node, demand_of, parse_gpus, plan
from vidgen_ray.script import iter_script

from .fake_stages import FAKES
from .test_batch import Events

SMALL_GB, LARGE_GB = 24.0, 80.0


@pytest.fixture(scope="module")
def profile(tiny):
    sizes = {"instantid": 1, "flux": 60, "svd": 16, "realesrgan": 4}
    actors = {
        name: tiny.actors[name].model_copy(update={"device": "cuda", "memory_gb": gb, "cpus": 0.5})
        for name, gb in sizes.items()
    }
    return tiny.model_copy(update={"name": "fakes", "actors": actors, "cpu_workers": None})


@pytest.fixture(scope="module")
def nodes():
    """Memory of their cards -> Ray's id of the node."""
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 1, "include_dashboard": False})
    added = cluster.add_node(num_cpus=8, num_gpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield {SMALL_GB: cluster.head_node.node_id, LARGE_GB: added.node_id}
    ray.shutdown()
    cluster.shutdown()


def where_flux_is():
    workers = [ray.get_actor(name) for name in ray.util.list_named_actors() if "/worker/" in name]
    nodes = {ray.get(worker.place.remote()).node: ray.get(worker.load.remote()) for worker in workers}
    assert set(nodes.values()) == {None}
    return set(nodes)


def test_a_model_is_on_a_card_that_holds_it(tmp_path, profile, nodes):
    script = tmp_path / "s.jsonl"
    script.write_text("".join(json.dumps({"id": f"s{n}", "prompt": "a", "generate_video": False}) + "\n" for n in range(4)))
    found = set()
    report = render(
        iter_script(script, profile_defaults=profile.defaults),
        profile,
        OutputFolder(tmp_path / "out"),
        source=script.name,
        watcher=Events(lambda: found.update(where_flux_is())),
        cluster=Cluster(tuple(Node((gb,), 8, None, ("ray.io/node-id", node)) for gb, node in nodes.items())),
        stages=FAKES,
    )
    assert (report.done, report.failed) == (4, 0)
    assert found == {nodes[LARGE_GB]}, "a picture needs FLUX alone, which the small card does not hold"


def test_where_ray_cannot_tell_cards_apart_nothing_is_begun(profile, make_shot):
    for cluster, says in (
        (parse_gpus("1x24GB+1x80GB"), "is not told by --gpus"),
        (Cluster((Node((SMALL_GB, LARGE_GB), 16, None, ("a", "b")),)), "cannot be told apart"),
    ):
        chosen = plan(profile, demand_of([make_shot()]), cluster)
        with pytest.raises(SetupError, match=says):
            labels_of(chosen, cluster)
    alike = parse_gpus("2x80GB")
    assert set(labels_of(plan(profile, demand_of([make_shot()]), alike), alike)) == {None}
