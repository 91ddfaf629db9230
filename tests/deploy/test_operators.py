"""The jobs as their operators' own APIs have them. The models are the operators', generated from the Go types that
their custom resource definitions are generated from; what is Kubernetes' own in a job is checked in test_kubernetes.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from tests.deploy.test_kubernetes import load

_SIMPLE = {"str": str, "int": int, "bool": bool}


def wrong_in_pytorchjob(document: dict[str, Any]) -> list[str]:
    return _wrong(document, "KubeflowOrgV1PyTorchJob", "")


def _wrong(value: Any, kind: str, place: str) -> list[str]:
    """The places in `value` that are no `kind` of the training operator's API."""
    if several := re.fullmatch(r"(?:list\[|dict\(str, )(.+?)[\])]", kind):
        if not isinstance(value, list if kind.startswith("list") else dict):
            return [place]
        items = enumerate(value) if isinstance(value, list) else value.items()
        return [each for name, item in items for each in _wrong(item, several[1], f"{place}.{name}")]
    if kind in _SIMPLE:
        return [] if type(value) is _SIMPLE[kind] else [place]
    if not kind.startswith("KubeflowOrg"):
        return []  # Kubernetes' own
    import kubeflow.training.models as training  # seconds, which whoever only collects the tests need not spend

    model = getattr(training, kind)
    names = {name: each for each, name in model.attribute_map.items()}
    found: list[str] = []
    for name, item in value.items():
        known = name in names
        found += _wrong(item, model.openapi_types[names[name]], f"{place}.{name}") if known else [f"{place}.{name}"]
    return found


def wrong_in_jobset(document: dict[str, Any]) -> list[str]:
    """What its model refuses, and what it does not know."""
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    given = _without_quantities(document)
    try:
        kept = JobsetV1alpha2JobSet.model_validate(given).to_dict()
    except ValidationError as error:
        return [".".join(map(str, each["loc"])) for each in error.errors()]
    return _lost(given, kept, "")


def _without_quantities(value: Any) -> Any:
    """The models have no contents for them."""
    if isinstance(value, list):
        return [_without_quantities(each) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {name: each for name, each in value.items() if name not in ("limits", "requests", "sizeLimit")}
    return {name: _without_quantities(each) for name, each in kept.items()}


def _lost(given: Any, kept: Any, place: str) -> list[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        return [each for name in given for each in _lost(given[name], kept.get(name), f"{place}.{name}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [each for number, item in enumerate(given) for each in _lost(item, kept[number], f"{place}.{number}")]
    return [] if given == kept else [place]


JOBS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "pytorchjob.yaml": wrong_in_pytorchjob,
    "jobset.yaml": wrong_in_jobset,
    "jobset-hosts.yaml": wrong_in_jobset,
}


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    twin = copy.deepcopy(document)
    *parents, last = path.split(".")
    place: Any = twin
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    return twin


@pytest.mark.parametrize("name", JOBS)
def test_the_jobs_are_what_their_operators_accept(name: str) -> None:
    document = load(name)
    assert len(document["spec"]) > 1
    assert JOBS[name](document) == []


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("pytorchjob.yaml", "spec.runPolicy.backoffLimits", 3),
        ("pytorchjob.yaml", "spec.runPolicy.backoffLimit", "3"),
        ("pytorchjob.yaml", "spec.pytorchReplicaSpecs.Master.replica", 1),
        ("pytorchjob.yaml", "spec.pytorchReplicaSpecs.Master.restartPolicy", 1),
        ("pytorchjob.yaml", "spec.elasticPolicy", {"rdzvBackends": "c10d"}),
        ("jobset.yaml", "spec.failurePolicy.maxRestart", 3),
        ("jobset.yaml", "spec.failurePolicy.maxRestarts", "often"),
        ("jobset.yaml", "spec.replicatedJobs.0.replica", 1),
        ("jobset.yaml", "spec.replicatedJobs.0.template.spec.completion", 1),
        ("jobset-hosts.yaml", "spec.network.enableDNSHostname", True),
    ],
)
def test_what_they_would_not_accept_is_found(name: str, path: str, value: Any) -> None:
    (found,) = JOBS[name](changed(load(name), path, value))
    assert found.strip(".").startswith(path)
