"""What docs/cluster.md gives to Ray's autoscaler and to KubeRay is what their schemas allow."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

jsonschema = pytest.importorskip("jsonschema")
yaml = pytest.importorskip("yaml")

from conceptmaster.runtime.server.command import add_arguments  # noqa: E402

PLACE = Path(__file__).resolve().parents[2] / "docs" / "serving"
PUBLISHED = Path(__file__).with_name("kuberay-raycluster-v1.json")


def closed(schema: Any) -> Any:
    """The same, and no field besides: Kubernetes drops what it does not know, and Ray ignores it."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(part) for name, part in schema.items()}
    if isinstance(found.get("properties"), dict) and found.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


@pytest.fixture(scope="module")
def kuberay() -> Any:
    schema = closed(json.loads(PUBLISHED.read_text("utf-8")))
    schema["properties"]["metadata"]["additionalProperties"] = True  # Kubernetes' own
    return jsonschema.Draft202012Validator(schema)


def cluster() -> Any:
    documents = list(yaml.safe_load_all((PLACE / "kuberay.yaml").read_text("utf-8")))
    return next(document for document in documents if document["kind"] == "RayCluster")


def served(words: list[str]) -> argparse.Namespace:
    """The options of a `conceptmaster serve` among a script's words."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    begin = words.index("serve") + 1
    return parser.parse_args(words[begin : words.index("&", begin)])


def test_the_manifest_is_a_ray_cluster_of_kuberay(kuberay):
    kuberay.validate(cluster())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "image"), 1),
        (("spec", "workerGroupSpecs", 0, "maxReplica"), 4),
        (("spec", "authOptions", "mode"), "password"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resource"), {}),
    ],
)
def test_the_schema_tells_what_is_wrong(kuberay, path, value):
    wrong = found = cluster()
    for step in path[:-1]:
        found = found[step]
    found[path[-1]] = value
    assert not kuberay.is_valid(wrong)


def test_the_head_serves_as_many_workers_as_the_group_may_have_gpus():
    spec = cluster()["spec"]
    (script,) = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["args"]
    options = served(shlex.split(script.replace("\\\n", " ")))
    group = spec["workerGroupSpecs"][0]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert options.max_workers == group["maxReplicas"] * gpus
    mounts = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    for path in (options.data, Path(options.bundle[0]), options.api_key_file):
        assert any(path.is_relative_to(mount["mountPath"]) for mount in mounts)


def test_the_cluster_of_rays_autoscaler_is_one_by_its_schema():
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:
        pytest.skip("Ray is not installed")
    schema = json.loads(
        Path(found.origin).with_name("autoscaler").joinpath("ray-schema.json").read_text("utf-8")
    )
    config = yaml.safe_load((PLACE / "ray-cluster.yaml").read_text("utf-8"))
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "max_worker": 4}, schema)
