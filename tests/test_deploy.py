"""Container and Kubernetes manifests: fields that KubeRay knows, safe settings, and commands and versions of this project.

The models are the part of Kubernetes and of KubeRay's ray.io/v1 that the manifests use. Unknown fields are errors.
"""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from vidgen_ray.batch.render import GRACE_S
from vidgen_ray.cli.app import app
from vidgen_ray.online.server import check_config
from vidgen_ray.planner.cluster import parse_gpus
from vidgen_ray.profile import builtin_profiles
from vidgen_ray.version import __version__

ROOT = Path(__file__).parent.parent
KUBERAY = ROOT / "deploy" / "kuberay"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Capabilities(Strict):
    drop: list[str]


class SecurityContext(Strict):
    allowPrivilegeEscalation: Literal[False]
    capabilities: Capabilities


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class SecretKeyRef(Strict):
    name: Name
    key: str


class ValueFrom(Strict):
    secretKeyRef: SecretKeyRef


class EnvVar(Strict):
    name: str
    value: str | None = None
    valueFrom: ValueFrom | None = None


class VolumeMount(Strict):
    name: Name
    mountPath: str
    subPath: str | None = None
    readOnly: bool = False


class Container(Strict):
    name: Name
    image: str
    args: list[str] = []
    securityContext: SecurityContext
    resources: Resources
    env: list[EnvVar]
    volumeMounts: list[VolumeMount]


class ClaimSource(Strict):
    claimName: Name


class EmptyDir(Strict):
    medium: Literal["Memory"]
    sizeLimit: Quantity


class SecretSource(Strict):
    secretName: Name


class Volume(Strict):
    name: Name
    persistentVolumeClaim: ClaimSource | None = None
    emptyDir: EmptyDir | None = None
    secret: SecretSource | None = None


class Seccomp(Strict):
    type: Literal["RuntimeDefault"]


class PodSecurityContext(Strict):
    runAsNonRoot: Literal[True]
    runAsUser: int
    runAsGroup: int
    fsGroup: int
    seccompProfile: Seccomp


class MatchExpression(Strict):
    key: str
    operator: Literal["In"]
    values: list[str]


class SelectorTerm(Strict):
    matchExpressions: list[MatchExpression]


class NodeSelector(Strict):
    nodeSelectorTerms: list[SelectorTerm]


class NodeAffinity(Strict):
    requiredDuringSchedulingIgnoredDuringExecution: NodeSelector


class Affinity(Strict):
    nodeAffinity: NodeAffinity


class Toleration(Strict):
    key: str
    operator: Literal["Exists"]
    effect: Literal["NoSchedule"]


class PodSpec(Strict):
    securityContext: PodSecurityContext
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume]
    affinity: Affinity | None = None
    tolerations: list[Toleration] = []
    terminationGracePeriodSeconds: int = 30
    restartPolicy: Literal["OnFailure"] | None = None


class PodTemplate(Strict):
    spec: PodSpec


class HeadGroup(Strict):
    serviceType: Literal["ClusterIP"]
    enableIngress: Literal[False]
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(Strict):
    groupName: Name
    replicas: int
    minReplicas: int
    maxReplicas: int
    rayStartParams: dict[str, str]
    template: PodTemplate


class AuthOptions(Strict):
    mode: Literal["token"]


class AutoscalerOptions(Strict):
    idleTimeoutSeconds: int
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]


class ClusterSpec(Strict):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)


class JobSpec(Strict):
    entrypoint: str
    backoffLimit: int
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    rayClusterSpec: ClusterSpec


class ServiceSpec(Strict):
    serveConfigV2: str
    rayClusterConfig: ClusterSpec


class Metadata(Strict):
    name: Name


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: ServiceSpec


MODELS: dict[str, type[Any]] = {"cluster": RayCluster, "job": RayJob, "service": RayService}


def documents(name):
    return list(yaml.safe_load_all((KUBERAY / f"{name}.yaml").read_text()))


def load(name):
    (document,) = documents(name)
    return MODELS[name].model_validate(document)


def cluster_of(manifest):
    spec = manifest.spec
    return {RayCluster: lambda: spec, RayJob: lambda: spec.rayClusterSpec, RayService: lambda: spec.rayClusterConfig}[
        type(manifest)
    ]()


def pods(name):
    cluster = cluster_of(load(name))
    return [cluster.headGroupSpec.template.spec, *(group.template.spec for group in cluster.workerGroupSpecs)]


def weights_pod():
    job = documents("weights")[-1]
    return PodSpec.model_validate(job["spec"]["template"]["spec"])


def all_pods():
    return [*(pod for name in MODELS for pod in pods(name)), weights_pod()]


@pytest.mark.parametrize("name", MODELS)
def test_manifest_has_only_fields_that_kuberay_knows(name):
    assert load(name)


@pytest.mark.parametrize(
    ("valid", "invalid"),
    [
        ("enableInTreeAutoscaling", "enableAutoscaling"),
        ("claimName", "claim"),
        ("mode: token", "mode: disabled"),
        ("serviceType: ClusterIP", "serviceType: LoadBalancer"),
        ("allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true"),
        ("memory: 32Gi", "memory: 32GB"),
        ("name: ray-head", "name: ray_head"),
    ],
)
def test_invalid_manifest_is_rejected(valid, invalid):
    text = (KUBERAY / "cluster.yaml").read_text()
    assert valid in text
    with pytest.raises(ValidationError):
        RayCluster.model_validate(yaml.safe_load(text.replace(valid, invalid, 1)))


@pytest.mark.parametrize("pod", all_pods(), ids=lambda pod: pod.containers[0].name)
def test_pods_mount_declared_volumes_and_reserve_what_they_may_use(pod):
    declared = {volume.name for volume in pod.volumes}
    claims = {document["metadata"]["name"] for document in documents("weights") if document["kind"] == "PersistentVolumeClaim"}
    for container in pod.containers:
        assert {mount.name for mount in container.volumeMounts} == declared
        assert container.image == f"REGISTRY/vidgen-ray:{__version__}"
        assert container.resources.requests.get("nvidia.com/gpu") == container.resources.limits.get("nvidia.com/gpu")
    assert {volume.persistentVolumeClaim.claimName for volume in pod.volumes if volume.persistentVolumeClaim} <= claims


@pytest.mark.parametrize("name", MODELS)
def test_head_runs_no_work_and_pods_read_weights_only(name):
    cluster = cluster_of(load(name))
    assert cluster.headGroupSpec.rayStartParams == {"num-cpus": "0", "num-gpus": "0"}
    for pod in pods(name):
        mounts = {mount.mountPath: mount for mount in pod.containers[0].volumeMounts}
        assert mounts["/weights"].readOnly
        assert mounts["/home/vidgen/.insightface"].readOnly
        assert "/dev/shm" in mounts
        env = {variable.name: variable.value for variable in pod.containers[0].env}
        assert float(env["RAY_JOB_STOP_WAIT_TIME_S"]) > GRACE_S
        assert (env["HF_HOME"], env["HF_HUB_OFFLINE"]) == ("/weights/huggingface", "1")


def test_workers_of_batch_clusters_are_spot_nodes_and_may_finish_their_shots():
    for name in ("cluster", "job"):
        (group,) = cluster_of(load(name)).workerGroupSpecs
        assert group.template.spec.affinity is not None
        assert group.template.spec.terminationGracePeriodSeconds > GRACE_S
    head, worker = pods("service")
    assert head.affinity is worker.affinity is None


def test_ray_version_of_the_manifests_is_that_of_the_image():
    pinned = dict(line.split("==") for line in constraints() if "==" in line)
    assert {cluster_of(load(name)).rayVersion for name in MODELS} == {pinned["ray"]}


def constraints():
    lines = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_pinned_versions_are_allowed_by_the_project():
    allowed = {requirement.name: requirement.specifier for requirement in map(Requirement, PROJECT["dependencies"])}
    for pinned in map(Requirement, constraints()):
        versions = [specifier.version for specifier in pinned.specifier if specifier.operator in ("==", ">=")]
        assert all(version in allowed[pinned.name] for version in versions), pinned


def test_gpus_of_the_job_fit_into_its_worker_group():
    job = load("job")
    words = shlex.split(job.spec.entrypoint)
    cluster = parse_gpus(words[words.index("--gpus") + 1])
    (group,) = job.spec.rayClusterSpec.workerGroupSpecs
    assert len(cluster.nodes) <= group.maxReplicas
    assert {len(node.gpus) for node in cluster.nodes} == {
        int(group.template.spec.containers[0].resources.limits["nvidia.com/gpu"])
    }


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
    program, *words = shlex.split(load("job").spec.entrypoint)
    assert program == "vidgen"
    check_command(words)
    check_command(weights_pod().containers[0].args)
    *_, entrypoint = json.loads(re.search(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.MULTILINE)[1])
    assert entrypoint in PROJECT["scripts"]
    check_command(json.loads(re.search(r"^CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)[1]))


def test_serve_config_is_valid_and_listens_where_the_service_connects(tmp_path):
    (tmp_path / "serve.yaml").write_text(load("service").spec.serveConfigV2)
    config, settings = check_config(tmp_path / "serve.yaml")
    assert config.http_options.host == "0.0.0.0"
    assert settings.keys_file is not None, "a server that listens on all addresses requires API keys"
    mounted = {mount.mountPath for pod in pods("service") for mount in pod.containers[0].volumeMounts}
    assert str(Path(settings.keys_file).parent) in mounted
    (group,) = load("service").spec.rayClusterConfig.workerGroupSpecs
    assert len(parse_gpus(settings.gpus).nodes) <= group.maxReplicas


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


def test_image_runs_as_user_of_the_manifests():
    user = re.search(r"useradd .*--uid (\d+) .* (\w+) ", DOCKERFILE)
    assert re.search(rf"^USER {user[2]}$", DOCKERFILE, re.MULTILINE)
    assert {pod.securityContext.runAsUser for pod in all_pods()} == {int(user[1])}
    homes = {
        mount.mountPath for pod in all_pods() for mount in pod.containers[0].volumeMounts if mount.mountPath.startswith("/home")
    }
    assert homes == {f"/home/{user[2]}/.insightface"}


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
