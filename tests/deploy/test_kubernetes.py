"""The manifests: as Kubernetes' own schemas read them, and two containers that can really share what they have to."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.tools import DEPLOY, knows_option, saver_environment

_FOLDER = DEPLOY / "kubernetes"
_VERSIONS = ("1.29", "1.37")  # the first with native sidecars on by default, and the newest known here
_UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}
_TEMPLATES = {
    "jobset.yaml": lambda job: job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"],
    "jobset-hosts.yaml": lambda job: job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"],
    "pytorchjob.yaml": lambda job: job["spec"]["pytorchReplicaSpecs"]["Master"]["template"],
}


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((_FOLDER / name).read_text())
    return found


@pytest.fixture(params=sorted(_TEMPLATES))
def pod(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The spec of the pod that a job's template makes."""
    spec: dict[str, Any] = _TEMPLATES[request.param](load(request.param))["spec"]
    return spec


def sidecar(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod["initContainers"]
    return dict(found)


def trainer(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod["containers"]
    return dict(found)


def validate(document: dict[str, Any]) -> None:
    for version in _VERSIONS:
        kubernetes_validate.validate(document, version, strict=True)


def test_the_pods_are_what_kubernetes_accepts(pod: dict[str, Any]) -> None:
    document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
    validate(document)
    pod["terminationGracePeriodSecs"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(document)


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset-hosts.yaml"])
def test_the_claim_and_the_job_in_the_jobset_are_what_kubernetes_accepts(name: str) -> None:
    validate(load("claim.yaml"))
    jobset = load(name)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": job})


def test_the_operator_finds_its_container() -> None:
    job = load("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert trainer(_TEMPLATES["pytorchjob.yaml"](job)["spec"])["name"] == "pytorch"
    assert "restartPolicy" not in _TEMPLATES["pytorchjob.yaml"](job)["spec"], "the replica's is the one that counts"


def test_the_pods_of_several_hosts_meet_where_torchrun_looks_for_them() -> None:
    jobset = load("jobset-hosts.yaml")
    (job,) = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]
    command = trainer(pod["spec"])["command"]
    pods = job["template"]["spec"]["completions"]
    assert (f"--nnodes={pods}" in command, job["template"]["spec"]["parallelism"]) == (True, pods)
    network = jobset["spec"]["network"]
    assert network["enableDNSHostnames"] is True
    first = f"{jobset['metadata']['name']}-{job['name']}-0-0.{network['subdomain']}"  # as JobSet names its first pod
    assert f"--rdzv-endpoint={first}:29500" in command
    (apart,) = pod["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert apart["labelSelector"]["matchLabels"] == pod["metadata"]["labels"]


def test_saver_and_ranks_share_what_they_have_to(pod: dict[str, Any]) -> None:
    assert pod["shareProcessNamespace"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    for container in (sidecar(pod), trainer(pod)):
        assert "runAsUser" not in container["securityContext"], "one uid for both"
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert (mounts["/dev/shm"], mounts["/run/async-ckpt"], mounts["/checkpoints"]) == (
            "shm",
            "socket",
            "checkpoints",
        )
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")["emptyDir"]
    assert shm["medium"] == "Memory"
    limits = [container["resources"]["limits"]["memory"] for container in (sidecar(pod), trainer(pod))]
    assert all(in_bytes(limit) > in_bytes(shm["sizeLimit"]) for limit in limits), "pages of /dev/shm count"
    (endpoint,) = [each["value"] for each in trainer(pod)["env"] if each["name"] == "ASYNC_CKPT_SAVER"]
    assert endpoint == settings()["bind"]


def test_the_sidecar_outlives_the_trainer_and_has_no_rights(pod: dict[str, Any]) -> None:
    assert sidecar(pod)["restartPolicy"] == "Always", "what makes an init container a native sidecar"
    assert pod["terminationGracePeriodSeconds"] >= 2 * 25 + 60, "--grace-s, and commits after it"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (sidecar(pod), trainer(pod)):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_the_kustomization_names_files_and_images_that_are_there() -> None:
    document = load("kustomization.yaml")
    (generated,) = document["configMapGenerator"]
    for name in [*document["resources"], *generated["files"]]:
        assert (_FOLDER / name).is_file()
    for name in _TEMPLATES:
        pod = _TEMPLATES[name](load(name))["spec"]
        assert {container["image"] for container in (sidecar(pod), trainer(pod))} == {
            image["name"] for image in document["images"]
        }
        (configured,) = [volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume]
        assert configured == generated["name"]
        assert document["generatorOptions"]["disableNameSuffixHash"] is True
        assert "claimName: " + load("claim.yaml")["metadata"]["name"] in (_FOLDER / name).read_text()


@pytest.fixture
def empty_dir(tmp_path: Path) -> Iterator[Path]:
    """As kubelet makes one: everybody may write to it."""
    path = Path(f"/tmp/ackpt-{tmp_path.name[-8:]}-{time.monotonic_ns() % 10**6}")
    path.mkdir()
    path.chmod(0o2777)
    yield path
    subprocess.run(["rm", "-r", str(path)], check=True)


def test_the_socket_folder_and_the_probe_work(pod: dict[str, Any], empty_dir: Path) -> None:
    """A real saver where the manifest has it, and the probe's own command."""
    endpoint = settings()["bind"].replace("/run/async-ckpt", str(empty_dir))
    probe = [
        part.replace("/run/async-ckpt", str(empty_dir)).replace("/usr/bin/python3", sys.executable)
        for part in sidecar(pod)["livenessProbe"]["exec"]["command"]
    ]
    assert probe[-1] == endpoint
    command = [sys.executable, "-m", "async_ckpt_saver", "run", "--bind", endpoint, "--root", str(empty_dir)]
    assert subprocess.run(probe, env=saver_environment(), capture_output=True).returncode == 1
    saver = subprocess.Popen(command, env=saver_environment(), stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 30
        while subprocess.run(probe, env=saver_environment(), capture_output=True).returncode != 0:
            assert saver.poll() is None
            assert time.monotonic() < deadline_s
    finally:
        saver.terminate()
        saver.wait(30)


def test_the_saver_understands_its_settings(empty_dir: Path) -> None:
    if not knows_option("--config"):
        pytest.skip("this saver has no --config yet")
    text = (_FOLDER / "saver.toml").read_text()
    file = empty_dir / "saver.toml"
    file.write_text(text.replace("/run/async-ckpt", str(empty_dir)).replace("/checkpoints", str(empty_dir)))
    command = [sys.executable, "-m", "async_ckpt_saver", "run"]
    saver = subprocess.Popen(
        command, env=saver_environment(ASYNC_CKPT_CONFIG=str(file)), stderr=subprocess.PIPE, text=True
    )
    try:
        assert saver.stderr is not None
        assert f"serves ipc://{empty_dir}/private/saver.sock, root {empty_dir}" in saver.stderr.readline()
    finally:
        saver.terminate()
        saver.wait(30)


def settings() -> dict[str, str]:
    """The texts in saver.toml; tomllib is there from Python 3.11 on only."""
    return dict(re.findall(r'^(\w+) = "(.*)"$', (_FOLDER / "saver.toml").read_text(), re.MULTILINE))


def in_bytes(quantity: str) -> int:
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]
