"""Get the schemas that manifests are checked against, from the Go modules that the servers are built from.

    python k8s/schemas/refresh.py           write kubernetes.json, the CRDs' files and sources.json again
    python k8s/schemas/refresh.py --check   fail when they differ from what is committed

Needs Go and a module proxy; nothing else reads the network. Versions come from images/versions.env. Modules are
verified by Go's checksum database, and their sums are committed in sources.json.

What is committed is an extract: the definitions that our kinds reach, without descriptions, and strict (an object with
listed properties takes no others), as an API server with fieldValidation=Strict reads them. The same module always
gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
VERSIONS = HERE.parents[1] / "images" / "versions.env"

KINDS = {
    "v1": [
        "ConfigMap", "Event", "LimitRange", "Namespace", "PersistentVolumeClaim", "Pod", "ResourceQuota", "Secret",
        "Service", "ServiceAccount",
    ],
    "apps/v1": ["DaemonSet", "Deployment", "StatefulSet"],
    "batch/v1": ["CronJob", "Job"],
    "networking.k8s.io/v1": ["Ingress", "NetworkPolicy"],
    "policy/v1": ["PodDisruptionBudget"],
    "rbac.authorization.k8s.io/v1": ["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"],
    "scheduling.k8s.io/v1": ["PriorityClass"],
}  # fmt: skip
OPENAPI = ("k8s.io/kubernetes", "KUBERNETES_VERSION", "api/openapi-spec/swagger.json")
TRAINER = ("github.com/kubeflow/trainer/v2", "TRAINER_VERSION")
# name -> (module, its version in versions.env, file inside it)
CRDS = {
    "pytorchjob.json": (
        "github.com/kubeflow/training-operator", "TRAINING_OPERATOR_VERSION",
        "manifests/base/crds/kubeflow.org_pytorchjobs.yaml",
    ),
    "trainjob.json": (*TRAINER, "manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml"),
    "trainingruntime.json": (*TRAINER, "manifests/base/crds/trainer.kubeflow.org_trainingruntimes.yaml"),
    "jobset.json": ("sigs.k8s.io/jobset", "JOBSET_VERSION", "config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml"),
    "rayjob.json": (
        "github.com/ray-project/kuberay/ray-operator", "KUBERAY_VERSION", "config/crd/bases/ray.io_rayjobs.yaml",
    ),
}  # fmt: skip

Json = dict[str, Any]


def versions() -> dict[str, str]:
    lines = VERSIONS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def module(path: str, version: str) -> tuple[Path, str]:
    """(folder, checksum) of a Go module, downloaded when it is not in Go's cache."""
    with tempfile.TemporaryDirectory() as folder:  # outside any module, so that no go.mod is read
        command = ["go", "mod", "download", "-json", f"{path}@{version}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"go could not download {path}@{version}:\n{done.stdout}{done.stderr}")
    answer = json.loads(done.stdout)
    return Path(answer["Dir"]), answer["Sum"]


# ---------------------------------------------------------------- extract


def strict(schema: Any, *, custom: bool = False) -> Any:
    """Without descriptions and Kubernetes' extensions; unknown fields refused; ints-or-strings in JSON Schema's way.

    Args:
        custom: of a custom resource, where an object that lists no properties has none; in OpenAPI it may have any.
    """
    if isinstance(schema, list):
        return [strict(item, custom=custom) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("format") == "int-or-string" or schema.get("x-kubernetes-int-or-string"):
        pattern = {"pattern": schema["pattern"]} if "pattern" in schema else {}
        return {"anyOf": [{"type": "integer"}, {"type": "string", **pattern}]}
    made: Json = {}
    for key, value in schema.items():
        if key in ("properties", "definitions"):
            made[key] = {name: strict(inner, custom=custom) for name, inner in value.items()}
        elif key not in ("description", "default", "title") and not key.startswith("x-kubernetes-"):
            made[key] = strict(value, custom=custom)
    if (
        ("properties" in made or (custom and made.get("type") == "object"))
        and "additionalProperties" not in made
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        made["additionalProperties"] = False
    return made


def references(schema: Any) -> set[str]:
    """Names of the definitions that a schema refers to."""
    if isinstance(schema, list):
        return set().union(*map(references, schema)) if schema else set()
    if not isinstance(schema, dict):
        return set()
    own = {schema["$ref"].rsplit("/", 1)[1]} if isinstance(schema.get("$ref"), str) else set()
    return own.union(*(references(value) for value in schema.values()))


def extract_kubernetes(openapi: Json) -> Json:
    """{kinds: {apiVersion/Kind: definition}, definitions}: our kinds and all that they reach."""
    kinds, wanted = {}, set()
    asked = {(version, kind) for version, names in KINDS.items() for kind in names}
    for name, definition in openapi["definitions"].items():
        for gvk in definition.get("x-kubernetes-group-version-kind", []):
            version = f"{gvk['group']}/{gvk['version']}" if gvk["group"] else gvk["version"]
            if (version, gvk["kind"]) in asked:
                kinds[f"{version}/{gvk['kind']}"] = name
                wanted.add(name)
    if missing := {f"{version}/{kind}" for version, kind in asked} - kinds.keys():
        raise SystemExit(f"the OpenAPI file lacks {sorted(missing)}")
    definitions: Json = {}
    while wanted - definitions.keys():
        name = min(wanted - definitions.keys())
        definitions[name] = strict(openapi["definitions"][name])
        wanted |= references(definitions[name])
    # JSON has Quantity as text or number; OpenAPI says text only.
    quantity = "io.k8s.apimachinery.pkg.api.resource.Quantity"
    pattern = r"^[+-]?([0-9]+|[0-9]+\.[0-9]*|\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?[0-9]+))?$"
    definitions[quantity] = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": pattern}]}
    return {"kinds": kinds, "definitions": definitions}


def extract_crd(crd: Json) -> Json:
    """{kinds: {apiVersion/Kind: schema}} of a custom resource in its stored version; its metadata is Kubernetes'."""
    kinds = {}
    for version in crd["spec"]["versions"]:
        if not version["storage"]:
            continue
        schema = strict(version["schema"]["openAPIV3Schema"], custom=True)
        schema["properties"]["metadata"] = {"$ref": "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
        schema["required"] = sorted({*schema.get("required", []), "apiVersion", "kind", "metadata", "spec"})
        kinds[f"{crd['spec']['group']}/{version['name']}/{crd['spec']['names']['kind']}"] = schema
    return {"kinds": kinds}


def as_lines(value: Json) -> str:
    """JSON with one line for each definition: small, and a difference names the definition."""
    parts = []
    for section in sorted(value):
        lines = [
            f"{json.dumps(key)}:{json.dumps(value[section][key], sort_keys=True, separators=(',', ':'))}"
            for key in sorted(value[section])
        ]
        parts.append(f"{json.dumps(section)}:{{\n" + ",\n".join(lines) + "\n}")
    return "{" + ",\n".join(parts) + "}\n"


def sha256(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def made() -> dict[str, str]:
    """name -> content of every file that belongs into this folder."""
    pins = versions()
    files: dict[str, str] = {}
    sources: Json = {}
    for name, (path, pin, inside) in {"kubernetes.json": OPENAPI, **CRDS}.items():
        version = pins[pin]
        extract = extract_crd if name in CRDS else extract_kubernetes
        folder, checksum = module(path, version)
        source = (folder / inside).read_bytes()
        files[name] = as_lines(
            extract(yaml.load(source, yaml.CSafeLoader) if inside.endswith(".yaml") else json.loads(source))
        )
        sources[name] = {
            "module": path, "version": version, "module_sum": checksum, "file": inside,
            "file_sha256": sha256(source), "extract_sha256": sha256(files[name]),
        }  # fmt: skip
    files["sources.json"] = json.dumps(sources, indent=1, sort_keys=True) + "\n"
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    check = parser.parse_args().check
    stale = 0
    for name, content in made().items():
        path = HERE / name
        same = path.exists() and path.read_text(encoding="utf-8") == content
        stale += not same
        if not check:
            path.write_text(content, encoding="utf-8")
        print(f"{name}: {len(content):,} bytes, {'unchanged' if same else 'differs' if check else 'written'}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
