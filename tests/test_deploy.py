"""Container, Kubernetes, cluster.yaml, lock file, configs of Serve: safe settings, commands and versions of this project."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from vidgen_ray.batch.run_options import GRACE_S
from vidgen_ray.cli.app import app
from vidgen_ray.errors import ProfileError, SetupError
from vidgen_ray.online.application import build
from vidgen_ray.online.server_plan import API
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.planner.cluster import parse_gpus
from vidgen_ray.profile import builtin_profiles
from vidgen_ray.version import __version__

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLIENT = tomllib.loads((ROOT / "clients" / "python" / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "packaging" / "requirements.lock").read_text()
CONSTRAINTS = [
    Requirement(line) for line in (ROOT / "deploy" / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
]
CLUSTER_TEXT = (ROOT / "cluster.yaml").read_text()
UNPRIVILEGED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def documents(name):
    return list(yaml.safe_load_all((ROOT / "deploy" / "kuberay" / f"{name}.yaml").read_text()))


SPECS = {name: documents(name)[0]["spec"] for name in ("cluster", "job", "service")}
CLUSTERS = {name: spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec for name, spec in SPECS.items()}
"""Manifest -> its Ray cluster."""
WORKERS = {name: cluster["workerGroupSpecs"][0] for name, cluster in CLUSTERS.items()}
PODS = {
    name: [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for name, cluster in CLUSTERS.items()
}
"""Manifest -> pods of its head and its workers."""
RAY_PODS = list(chain(*PODS.values()))
SUBMITTER = SPECS["job"]["submitterPodTemplate"]["spec"]
FILES, DOWNLOAD = documents("weights")[-2:]
DOWNLOADER = DOWNLOAD["spec"]["template"]["spec"]


def test_clusters_need_a_token_are_not_exposed_and_their_heads_run_no_work():
    for name, kind in {"cluster": "RayCluster", "job": "RayJob", "service": "RayService"}.items():
        document, cluster = documents(name)[0], CLUSTERS[name]
        assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
        assert cluster["authOptions"] == {"mode": "token"}
        head = cluster["headGroupSpec"]
        assert (head["serviceType"], head["enableIngress"]) == ("ClusterIP", False)
        assert head["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
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
    # Every pod that the manifests or the operator create and that connects to Ray's, by labels that all versions set.
    admitted = [
        source["podSelector"]["matchLabels"]
        for rule in policy["spec"]["ingress"]
        for source in rule["from"][:2]
        if "podSelector" in source
    ]
    submitter = SPECS["job"]["submitterPodTemplate"]["metadata"]["labels"]
    assert admitted == [{"app.kubernetes.io/name": "kuberay"}, submitter]


def test_no_pod_runs_as_root_or_has_privileges():
    for pod in [*RAY_PODS, SUBMITTER, FILES["spec"], DOWNLOADER]:
        security = pod["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 1000)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert [container["securityContext"] for container in pod["containers"]] == [UNPRIVILEGED] * len(pod["containers"])
    for name in ("cluster", "service"):
        assert CLUSTERS[name]["autoscalerOptions"]["securityContext"] == UNPRIVILEGED


def test_pods_read_mounted_weights_reserve_what_they_may_use_and_end_after_the_grace_period():
    claims = {document["metadata"]["name"] for document in documents("weights") if document["kind"] == "PersistentVolumeClaim"}
    for pod in [*RAY_PODS, FILES["spec"], DOWNLOADER]:
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
            assert container["image"] == f"REGISTRY/vidgen-ray:{__version__}"
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu"), container["name"]
        used = {volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]}
        assert used - {None} <= claims
    for pod in RAY_PODS:
        mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["/weights"]["readOnly"]
        assert mounts["/home/vidgen/.insightface"]["readOnly"]
        assert "/dev/shm" in mounts
        env = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
        assert float(env["RAY_JOB_STOP_WAIT_TIME_S"]) > GRACE_S
        assert pod["terminationGracePeriodSeconds"] > float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) >= GRACE_S
        assert (env["HF_HOME"], env["HF_HUB_OFFLINE"]) == ("/weights/huggingface", "1")


def test_pinned_versions_are_allowed_by_the_project_and_those_of_the_manifests():
    allowed = {requirement.name: requirement.specifier for requirement in map(Requirement, PROJECT["dependencies"])}
    for pinned in CONSTRAINTS:
        versions = [specifier.version for specifier in pinned.specifier if specifier.operator in ("==", ">=")]
        assert all(version in allowed[pinned.name] for version in versions), pinned
    (ray,) = [pinned.specifier for pinned in CONSTRAINTS if pinned.name == "ray"]
    assert {f"=={cluster['rayVersion']}" for cluster in CLUSTERS.values()} == {str(ray)}
    version = re.search(r"^FROM python:([\d.]+)-", DOCKERFILE, re.MULTILINE)[1]
    assert version in SpecifierSet(PROJECT["requires-python"])


def amount(text):
    """Return a Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([\d.]+)(m|Mi|Gi)?", str(text)).groups()
    return float(number) * {"m": 1e-3, "Mi": 2**20, "Gi": 2**30}.get(unit, 1)


def test_kueue_admits_the_job_on_spot_nodes_with_its_head_on_demand():
    """Check what the webhook and the scheduler of Kueue require. No Python package has its schemas."""
    found = {(document["kind"], document["metadata"]["name"]): document for document in documents("kueue")}
    labels = documents("job")[0]["metadata"]["labels"]
    local_queue = found["LocalQueue", labels["kueue.x-k8s.io/queue-name"]]
    assert ("WorkloadPriorityClass", labels["kueue.x-k8s.io/priority-class"]) in found
    (resources,) = found["ClusterQueue", local_queue["spec"]["clusterQueue"]]["spec"]["resourceGroups"]
    assert SPECS["job"]["shutdownAfterJobFinishes"]
    assert "enableInTreeAutoscaling" not in CLUSTERS["job"], "Kueue refuses it without its annotation for elastic jobs"
    group, (head, worker) = WORKERS["job"], PODS["job"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"], "Kueue counts `replicas`"
    needed = {"on-demand": [head, SUBMITTER], "spot": [worker] * group["replicas"]}
    assert list(needed) == [flavor["name"] for flavor in resources["flavors"]], "Kueue tries them in this order"
    for flavor in resources["flavors"]:
        quota = {each["name"]: amount(each["nominalQuota"]) for each in flavor["resources"]}
        assert list(quota) == resources["coveredResources"]
        requests = [container["resources"]["requests"] for pod in needed[flavor["name"]] for container in pod["containers"]]
        for name in set().union(*requests):
            assert sum(amount(each.get(name, 0)) for each in requests) <= quota[name], (flavor["name"], name)
        # A worker that requires spot nodes would wait for a GPU on demand forever.
        assert flavor["name"] == "spot" or not quota["nvidia.com/gpu"]
    (spot_label,) = found["ResourceFlavor", "spot"]["spec"]["nodeLabels"].items()
    required = worker["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    allowed = {(each["key"], value) for term in required for each in term["matchExpressions"] for value in each["values"]}
    assert spot_label in allowed


def test_probes_of_the_server_need_no_token_and_wait_for_no_weights():
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    for pod in PODS["service"]:
        (container,) = pod["containers"]
        for probe in ("startupProbe", "livenessProbe"):
            request = container[probe]["httpGet"]
            assert request["path"] in PUBLIC_EXACT_PATHS
            assert request["port"] == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    head, worker = (pod["containers"][0]["readinessProbe"]["httpGet"] for pod in PODS["service"])
    assert head == PODS["service"][0]["containers"][0]["startupProbe"]["httpGet"], "no replica runs on the head"
    assert worker == {"path": "/-/healthz", "port": 8000}


def check_command(words):
    """Assert that the words after `vidgen` are a command with existing options, and that the profile exists."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.get_command(None, words[0]), words[1:]
    accepted = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)} <= accepted
    assert {word for word in words if word.startswith("gpu-")} <= set(builtin_profiles())


def test_commands_of_image_and_manifests_exist_and_use_the_gpus_of_the_workers():
    program, *words = shlex.split(SPECS["job"]["entrypoint"])
    assert program == "vidgen"
    check_command(words)
    nodes, group = parse_gpus(words[words.index("--gpus") + 1]).nodes, WORKERS["job"]
    (container,) = group["template"]["spec"]["containers"]
    assert len(nodes) <= group["maxReplicas"]
    assert {len(node.gpus) for node in nodes} == {int(container["resources"]["limits"]["nvidia.com/gpu"])}
    check_command(DOWNLOADER["containers"][0]["args"])
    *_, entrypoint = json.loads(re.search(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.MULTILINE)[1])
    assert entrypoint in PROJECT["scripts"]
    check_command(json.loads(re.search(r"^CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)[1]))


def test_serve_config_is_valid_and_listens_where_the_service_connects():
    config, settings = checked_config(SPECS["service"]["serveConfigV2"])
    assert config.http_options.host == "0.0.0.0"
    assert settings.keys_file is not None, "a server that listens on all addresses requires API keys"
    mounted = {mount["mountPath"] for pod in PODS["service"] for mount in pod["containers"][0]["volumeMounts"]}
    assert str(Path(settings.keys_file).parent) in mounted
    nodes = len(parse_gpus(settings.gpus).nodes)
    assert settings.max_queue_s
    assert (nodes, 2 * nodes) == (WORKERS["service"]["minReplicas"], WORKERS["service"]["maxReplicas"])


def test_targets_of_copies_and_mounts_exist_before_they_are_used():
    page = (ROOT / "docs" / "cluster.md").read_text()
    copied = re.findall(r"^kubectl cp \S+ ([\w-]+):(/\w+)/", page, re.MULTILINE)
    mounts = [mount["mountPath"] for mount in FILES["spec"]["containers"][0]["volumeMounts"]]
    assert copied == [(FILES["metadata"]["name"], folder) for folder in mounts]
    for folder in re.findall(r"-v \"\$PWD/(\w+)\":", page):
        assert re.search(rf"^mkdir {folder}\b", page[: page.index(f'$PWD/{folder}":')], re.MULTILINE), (
            f"docker makes {folder} root's"
        )
    for volume in re.findall(r"-v vidgen-weights:(\S+)", page):
        assert f" {volume}" in re.search(r"install -d -o vidgen .*", DOCKERFILE)[0], (
            "a new volume takes its owner from the image"
        )


def test_image_copies_existing_files():
    sources = [word for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text()
    assert [source for source in sources if f"!{source}" not in ignored] == []
    extras = set(re.search(r'"\.\[([\w,]+)\]"', DOCKERFILE)[1].split(","))
    assert extras <= PROJECT["optional-dependencies"].keys()


# cluster.yaml

CLUSTER_YAML = yaml.safe_load(CLUSTER_TEXT)
OPTIONS = " ".join(CLUSTER_YAML["docker"]["run_options"])


def test_ray_accepts_cluster_yaml():
    prepared = prepare_config(copy.deepcopy(CLUSTER_YAML))
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "gpu"}, "Ray merged in defaults of its own"


def test_every_start_of_ray_needs_a_token_and_the_dashboard_listens_on_localhost_only():
    assert "-e RAY_AUTH_MODE=token" in OPTIONS
    commands = CLUSTER_YAML["head_start_ray_commands"] + CLUSTER_YAML["worker_start_ray_commands"]
    head, worker = [command for command in commands if "ray start" in command]
    for command in (head, worker):
        assert command.index("export RAY_AUTH_MODE=token;") < command.index("ray start")
    assert CLUSTER_YAML["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN" not in CLUSTER_TEXT, "the file must not contain the token"
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in CLUSTER_TEXT


def test_cluster_yaml_contains_no_secrets_or_account_ids():
    """Only two placeholders are left to fill in. `ray up` fails immediately if they are not replaced."""
    for name, pattern in {
        "access key": r"A(KI|SI)A[0-9A-Z]{16}",
        "account, or resource of one": r"\b\d{12}\b|arn:aws|\b(ami|fs|sg|subnet|vpc|i)-[0-9a-f]{8,}",
        "private key": r"PRIVATE KEY|\.pem\b",
        "address": r"(?!127\.0\.0\.1)\b\d{1,3}(\.\d{1,3}){3}\b",
        "token": r"\b[0-9a-f]{32,}\b",
    }.items():
        assert not re.search(pattern, CLUSTER_TEXT), name
    assert set(re.findall(r"\b(?:AMI|FILE_SYSTEM)_ID\b", re.sub(r"(?m)#.*$", "", CLUSTER_TEXT))) == {"AMI_ID", "FILE_SYSTEM_ID"}


def test_docs_use_existing_options_of_jobs_and_the_grace_period():
    page = (ROOT / "docs" / "cluster.md").read_text()
    render = typer.main.get_command(app).get_command(None, "render")
    accepted = {option for parameter in render.params for option in parameter.opts}
    jobs = re.findall(r"python -m vidgen_ray.jobs.render([^#`\n]*)", page)
    assert jobs
    for options in jobs:
        assert set(re.findall(r"(?<=\s)--?[a-z-]+", options)) <= accepted, options
    for gpus in re.findall(r"--gpus (\d\S*?)[`\s]", page):
        parse_gpus(gpus)
    assert f"at most {GRACE_S:g} s (`--grace`)" in " ".join(page.split())
    [seconds] = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", OPTIONS)
    assert int(seconds) > GRACE_S, "shots in progress need the whole grace period"


def test_ray_version_is_pinned_consistently_and_allowed_by_the_project():
    allowed = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ray")
    [(extras, version)] = re.findall(r'"ray\[([a-z,]+)\]==([0-9.]+)"', " ".join(CLUSTER_YAML["setup_commands"]))
    assert set(extras.split(",")) == allowed.extras
    assert version in allowed.specifier
    for image in (CLUSTER_YAML["docker"]["head_image"], CLUSTER_YAML["docker"]["worker_image"]):
        ray, minor = re.fullmatch(r"rayproject/ray:(\d+\.\d+\.\d+)-py3(\d+)-(?:cpu|gpu)", image).groups()
        assert ray == version
        assert f"3.{minor}" in SpecifierSet(PROJECT["requires-python"])


# The lock file installs what both distributions ask for, from any index.


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, list[Requirement]]:
    """Return name -> its entries, one for each version or marker."""
    found: dict[str, list[Requirement]] = {}
    for entry in re.split(r"\n(?=\S)", LOCK.strip()):
        requirement = Requirement(entry.split("\\")[0].strip())
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}", entry), requirement
        found.setdefault(canonical(requirement.name), []).append(requirement)
    return found


def test_requirements_are_locked_to_versions_that_they_allow():
    extras = PROJECT["optional-dependencies"]["postgres"] + CLIENT["optional-dependencies"]["mcp"]
    names = locked()
    for requirement in map(Requirement, [*PROJECT["dependencies"], *CLIENT["dependencies"], *extras]):
        for entry in names[canonical(requirement.name)]:
            (pin,) = entry.specifier
            assert pin.operator == "==", entry
            assert requirement.specifier.contains(pin.version), f"{entry} is not {requirement}; run `make lock`"
    assert "onnxruntime-gpu" in names
    assert "onnxruntime" not in names, "both own the folder onnxruntime/"


def test_no_version_with_a_known_vulnerability_is_allowed_locked_or_pinned():
    page = (ROOT / "docs" / "supply-chain.md").read_text()
    table = re.findall(r"^- ([a-z-]+) ([\d.]+), (?:CVE|PYSEC)-", page, re.MULTILINE)
    assert len(table) >= 10
    declared = list(map(Requirement, chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())))
    for package, fixed in table:
        found = [requirement for requirement in declared if requirement.name == package]
        assert found, f"{package} is not declared, so its lowest version depends on other packages"
        pinned = [requirement for requirement in CONSTRAINTS if requirement.name == package]
        for requirement in [*found, *pinned, *locked().get(package, [])]:
            [lowest] = [each.version for each in requirement.specifier if each.operator in (">=", "==")]
            assert Version(lowest) >= Version(fixed), requirement


def test_lock_names_no_index_and_no_local_version():
    assert not re.search(r"://|--index|--find-links|^[^ ]+==[^ ;]*\+", LOCK, re.MULTILINE)


@pytest.mark.slow
def test_tests_run_from_the_source_distribution(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    folder = tmp_path / archive.name.removesuffix(".tar.gz")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")
    assert [file for file in tracked if not (folder / file).exists()] == []
    sample = ["tests/test_deploy.py", "tests/script"]
    program = "import vidgen_ray, sys, pytest; print(vidgen_ray.__file__); sys.exit(pytest.main(sys.argv[1:]))"
    run = subprocess.run(
        [sys.executable, "-c", program, "-n", "0", *sample],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert run.stdout.startswith(str(folder / "vidgen_ray"))


# The configs for `serve deploy`: all keys are known and all deployments exist.

CONFIGS = ROOT / "serve_configs"
GPUS = {"laptop": None, "gpu-80gb": None, "cluster": "8x80GB"}
"""Config -> GPUs that it names."""


def checked_config(text):
    """Return a config and the settings of its application. Fails for unknown keys, which Serve accepts."""
    config = ServeDeploySchema.model_validate(yaml.safe_load(text), extra="forbid")
    (app,) = config.applications
    assert app.import_path == "vidgen_ray.online.application:build"
    for deployment in app.deployments:
        assert deployment.name == API, "the others always have one replica"
        if isinstance(deployment.autoscaling_config, dict):
            AutoscalingConfig.model_validate(deployment.autoscaling_config, extra="forbid")
    settings = OnlineSettings.model_validate(app.args)
    assert (settings.host, settings.port) == (config.http_options.host, config.http_options.port)
    return config, settings


def test_shipped_configs_are_valid():
    assert {file.stem for file in CONFIGS.iterdir()} == set(GPUS)
    for name, gpus in GPUS.items():
        _, settings = checked_config((CONFIGS / f"{name}.yaml").read_text())
        assert (settings.host, settings.gpus) == ("127.0.0.1", gpus)
        if settings.gpus:
            assert parse_gpus(settings.gpus)


def test_serve_validates_the_args():
    with pytest.raises(ValueError, match="max_queue_s: needs gpus"):
        OnlineSettings(max_queue_s=60)
    call = call_user_app_builder_with_args_if_necessary
    with pytest.raises(SetupError, match="max_queue"):
        call(build, {"profile": "tiny", "max_queue": 7})
    with pytest.raises(ProfileError, match="must be one of auto, demo"):
        call(build, {"profile": "nope", "gpus": "1x80GB"})
