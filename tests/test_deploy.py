"""Container and Kubernetes manifests: safe settings, and commands and versions of this project."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import typer
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

from tests.online.test_serve_configs import checked_config
from vidgen_ray.batch.run_options import GRACE_S
from vidgen_ray.cli.app import app
from vidgen_ray.planner.cluster import parse_gpus
from vidgen_ray.profile import builtin_profiles
from vidgen_ray.version import __version__

ROOT = Path(__file__).parent.parent
KUBERAY = ROOT / "deploy" / "kuberay"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


SAFE_POD = {"allowPrivilegeEscalation": False, "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
UNPRIVILEGED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
SAFE_CLUSTER = {**SAFE_POD, "serviceType": "ClusterIP", "enableIngress": False, "authOptions": {"mode": "token"}}
KINDS = {"cluster": "RayCluster", "job": "RayJob", "service": "RayService"}
"""Manifest -> its kind."""


def documents(name):
    return list(yaml.safe_load_all((KUBERAY / f"{name}.yaml").read_text()))


def fields_of(manifest):
    """Yield each field of a manifest, and its value."""
    for each in manifest if isinstance(manifest, list) else [manifest]:
        for name, value in each.items() if isinstance(each, dict) else ():
            yield name, value
            yield from fields_of(value)


def unsafe(manifest, safe):
    """Return the safe fields that a manifest lacks, or has with another value."""
    found = list(fields_of(manifest))
    return [*(safe.keys() - dict(found).keys()), *(name for name, value in found if value != safe.get(name, value))]


def spec_of(name):
    return documents(name)[0]["spec"]


def cluster_of(name):
    spec = spec_of(name)
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def worker_group(name):
    (group,) = cluster_of(name)["workerGroupSpecs"]
    return group


def pods(name):
    return [group["template"]["spec"] for group in (cluster_of(name)["headGroupSpec"], *cluster_of(name)["workerGroupSpecs"])]


def submitter_pod():
    return spec_of("job")["submitterPodTemplate"]["spec"]


def weights_pod():
    return documents("weights")[-1]["spec"]["template"]["spec"]


def all_pods():
    return [*(pod for name in KINDS for pod in pods(name)), weights_pod()]


def test_manifests_have_safe_values():
    for name, kind in KINDS.items():
        document = documents(name)[0]
        assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
        assert unsafe(document, SAFE_CLUSTER) == []
    assert unsafe(weights_pod(), SAFE_POD) == []


def test_no_pod_runs_as_root_and_no_container_has_privileges():
    for pod in [*all_pods(), submitter_pod()]:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        assert [container["securityContext"] for container in pod["containers"]] == [UNPRIVILEGED] * len(pod["containers"])
    for name in ("cluster", "service"):
        assert cluster_of(name)["autoscalerOptions"]["securityContext"] == UNPRIVILEGED


def test_pods_mount_declared_volumes_and_reserve_what_they_may_use():
    claims = {document["metadata"]["name"] for document in documents("weights") if document["kind"] == "PersistentVolumeClaim"}
    for pod in all_pods():
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
            assert container["image"] == f"REGISTRY/vidgen-ray:{__version__}"
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu"), container["name"]
        volume_claims = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        assert {claim["claimName"] for claim in volume_claims} <= claims


def test_head_runs_no_work_and_pods_read_weights_only():
    for name in KINDS:
        assert cluster_of(name)["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
        for pod in pods(name):
            mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
            assert mounts["/weights"]["readOnly"]
            assert mounts["/home/vidgen/.insightface"]["readOnly"]
            assert "/dev/shm" in mounts
            env = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
            assert float(env["RAY_JOB_STOP_WAIT_TIME_S"]) > GRACE_S
            assert pod["terminationGracePeriodSeconds"] > float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) >= GRACE_S
            assert (env["HF_HOME"], env["HF_HUB_OFFLINE"]) == ("/weights/huggingface", "1")


def test_ray_version_of_the_manifests_is_that_of_the_image():
    pinned = dict(line.split("==") for line in constraints() if "==" in line)
    assert {cluster_of(name)["rayVersion"] for name in KINDS} == {pinned["ray"]}


def constraints():
    lines = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_pinned_versions_are_allowed_by_the_project():
    allowed = {requirement.name: requirement.specifier for requirement in map(Requirement, PROJECT["dependencies"])}
    for pinned in map(Requirement, constraints()):
        versions = [specifier.version for specifier in pinned.specifier if specifier.operator in ("==", ">=")]
        assert all(version in allowed[pinned.name] for version in versions), pinned


def test_gpus_of_the_job_fit_into_its_worker_group():
    words = shlex.split(spec_of("job")["entrypoint"])
    nodes = parse_gpus(words[words.index("--gpus") + 1]).nodes
    group = worker_group("job")
    (container,) = group["template"]["spec"]["containers"]
    assert len(nodes) <= group["maxReplicas"]
    assert {len(node.gpus) for node in nodes} == {int(container["resources"]["limits"]["nvidia.com/gpu"])}


def total(pods_of_flavor):
    """Return resource -> amount that these pods request."""
    requests = [container["resources"]["requests"] for pod in pods_of_flavor for container in pod["containers"]]
    return {name: sum(amount(each.get(name, 0)) for each in requests) for name in set().union(*requests)}


def amount(text):
    """Return a Kubernetes quantity as a number."""
    units = {"m": 1e-3, "Mi": 2**20, "Gi": 2**30}
    number, unit = re.fullmatch(r"([\d.]+)(m|Mi|Gi)?", str(text)).groups()
    return float(number) * units.get(unit, 1)


def test_kueue_admits_the_job_on_spot_nodes_with_its_head_on_demand():
    """Check what the webhook and the scheduler of Kueue require. No Python package has its schemas."""
    found = {(document["kind"], document["metadata"]["name"]): document for document in documents("kueue")}
    labels = documents("job")[0]["metadata"]["labels"]
    local_queue = found["LocalQueue", labels["kueue.x-k8s.io/queue-name"]]
    assert ("WorkloadPriorityClass", labels["kueue.x-k8s.io/priority-class"]) in found
    (resources,) = found["ClusterQueue", local_queue["spec"]["clusterQueue"]]["spec"]["resourceGroups"]
    assert spec_of("job")["shutdownAfterJobFinishes"]
    assert "enableInTreeAutoscaling" not in cluster_of("job"), "Kueue refuses it without its annotation for elastic jobs"
    group = worker_group("job")
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"], "Kueue counts `replicas`"
    head, worker = pods("job")
    pods_of_flavors = {"on-demand": [head, submitter_pod()], "spot": [worker] * group["replicas"]}
    assert list(pods_of_flavors) == [flavor["name"] for flavor in resources["flavors"]], "Kueue tries them in this order"
    for flavor in resources["flavors"]:
        assert [each["name"] for each in flavor["resources"]] == resources["coveredResources"]
        quota = {each["name"]: amount(each["nominalQuota"]) for each in flavor["resources"]}
        needed = total(pods_of_flavors[flavor["name"]])
        assert all(needed[name] <= quota[name] for name in needed)
        if flavor["name"] == "on-demand":
            assert not quota["nvidia.com/gpu"], "a worker that requires spot nodes would wait for one forever"
    (spot_label,) = found["ResourceFlavor", "spot"]["spec"]["nodeLabels"].items()
    required = worker["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    allowed = {(each["key"], value) for term in required for each in term["matchExpressions"] for value in each["values"]}
    assert spot_label in allowed


def test_probes_of_the_server_need_no_token_and_wait_for_no_weights():
    for pod in pods("service"):
        (container,) = pod["containers"]
        for probe in ("startupProbe", "livenessProbe"):
            request = container[probe]["httpGet"]
            assert request["path"] in PUBLIC_EXACT_PATHS
            assert request["port"] == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    head, worker = (pod["containers"][0]["readinessProbe"]["httpGet"] for pod in pods("service"))
    assert head == pods("service")[0]["containers"][0]["startupProbe"]["httpGet"], "no replica runs on the head"
    assert worker == {"path": "/-/healthz", "port": 8000}


def test_disruption_budgets_of_the_server_select_its_head_and_its_fewest_workers():
    groups = {"head": cluster_of("service")["headGroupSpec"], "worker": worker_group("service")}
    for node_type, budget in zip(groups, documents("service")[1:], strict=True):
        labels = {**groups[node_type]["template"]["metadata"]["labels"], "ray.io/node-type": node_type}
        least = groups[node_type].get("minReplicas", 1)
        assert budget["spec"] == {"minAvailable": least, "selector": {"matchLabels": labels}}


def check_command(words):
    """Assert that the words after `vidgen` are a command with existing options, and that the profile exists."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.get_command(None, words[0]), words[1:]
    accepted = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)} <= accepted
    profiles = [word for word in words if word.startswith("gpu-")]
    assert set(profiles) <= set(builtin_profiles())


def test_commands_of_image_and_manifests_exist():
    program, *words = shlex.split(spec_of("job")["entrypoint"])
    assert program == "vidgen"
    check_command(words)
    check_command(weights_pod()["containers"][0]["args"])
    *_, entrypoint = json.loads(re.search(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.MULTILINE)[1])
    assert entrypoint in PROJECT["scripts"]
    check_command(json.loads(re.search(r"^CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)[1]))


def test_serve_config_is_valid_and_listens_where_the_service_connects():
    config, settings = checked_config(spec_of("service")["serveConfigV2"])
    assert config.http_options.host == "0.0.0.0"
    assert settings.keys_file is not None, "a server that listens on all addresses requires API keys"
    mounted = {mount["mountPath"] for pod in pods("service") for mount in pod["containers"][0]["volumeMounts"]}
    assert str(Path(settings.keys_file).parent) in mounted
    nodes = len(parse_gpus(settings.gpus).nodes)
    assert settings.max_queue_s
    assert (nodes, 2 * nodes) == (worker_group("service")["minReplicas"], worker_group("service")["maxReplicas"])


def test_network_policy_opens_the_dashboard_to_the_operator_only():
    (policy,) = documents("network-policy")
    open_ports = {
        namespace: {port["port"] for port in rule["ports"]}
        for rule in policy["spec"]["ingress"]
        for source in rule["from"]
        if "namespaceSelector" in source
        for namespace in source["namespaceSelector"]["matchLabels"].values()
    }
    assert open_ports == {"kuberay-system": {8265, 52365, 8000}, "ingress-nginx": {8000}}
    assert policy["spec"]["policyTypes"] == ["Ingress"]


def test_image_has_a_python_that_the_project_allows_and_copies_existing_files():
    version = re.search(r"^FROM python:([\d.]+)-", DOCKERFILE, re.MULTILINE)[1]
    assert version in SpecifierSet(PROJECT["requires-python"])
    sources = [word for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text()
    assert [source for source in sources if f"!{source}" not in ignored] == []
    assert "HEALTHCHECK" in DOCKERFILE
    extras = set(re.search(r'"\.\[([\w,]+)\]"', DOCKERFILE)[1].split(","))
    assert extras <= PROJECT["optional-dependencies"].keys()
