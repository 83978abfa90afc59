"""The chart: lints strictly, renders for every kind of installation, and a strict server would take every object."""

from __future__ import annotations

import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.client import MORE_VERBS, VERBS
from k8s.cluster import load_cluster
from k8s.schemas.refresh import versions
from k8s.schemas.validate import problems
from k8s.tools import tool
from trainer.resolve import load_recipe, shipped

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "qwenvl-train"
CASES = ["", *sorted(path.name for path in (CHART / "ci").glob("*.yaml"))]


def helm(*arguments: str, ok: bool = True) -> str:
    # Its warnings about the link to the recipes go to stderr.
    done = subprocess.run([str(tool("helm")), *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done.stdout if ok else done.stdout + done.stderr


def values_of(case: str) -> list[str]:
    return ["-f", str(CHART / "ci" / case)] if case else []


def rendered(case: str = "", *more: str) -> list[dict[str, Any]]:
    text = helm("template", "release", str(CHART), "--namespace", "qwenvl", *values_of(case), *more)
    return [one for one in yaml.safe_load_all(text) if one]


def one(objects: list[dict[str, Any]], kind: str, ending: str = "") -> dict[str, Any]:
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(ending)]
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_chart_lints_strictly(case: str) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), *values_of(case))


@pytest.mark.parametrize("case", CASES)
def test_a_strict_server_takes_every_rendered_object(case: str) -> None:
    objects = rendered(case)
    assert objects
    for each in objects:
        assert problems(each) == [], f"{each['kind']} {each['metadata']['name']}"
        assert each["metadata"]["namespace"] == "qwenvl"
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "release"
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("setting", "want"),
    [
        ("mlflow.enabeld=true", "enabeld"),
        ("mlflow.backend.kind=mysql", "mlflow/backend/kind"),
        ("mlflow.backend.kind=postgresql", "mlflow/backend/postgresql/host"),
        ("mlflow.image.digest=sha256:12", "mlflow/image/digest"),
        ("storage.endpoint=s3.example.com", "storage/endpoint"),
        ("mlflow.service.port=http", "mlflow/service/port"),
        ("reaper.after=0", "reaper/after"),
        ("serviceAccounts.trainer.name=Not_A_Name", "serviceAccounts/trainer/name"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(setting: str, want: str) -> None:
    output = helm("template", "r", str(CHART), "--set", setting, ok=False)
    assert want in output.replace(".", "/") or want in output


@pytest.mark.parametrize("kinds", [(), ("rayjobs",), ("trainjobs",), ("rayjobs", "trainjobs")])
def test_the_launchers_rights_are_those_that_its_client_uses(kinds: tuple[str, ...]) -> None:
    """By default, and with the kinds that a cluster file chooses beside; the reaper looks at those too."""
    from k8s import reaper

    objects = rendered("", *(word for kind in kinds for word in ("--set", f"rbac.kinds.{kind}=true")))
    granted = {
        f"{group}/{resource}": tuple(rule["verbs"])
        for rule in one(objects, "Role")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert granted == VERBS | {key: verbs for kind in kinds for key, verbs in MORE_VERBS[kind].items()}
    job = one(objects, "CronJob")["spec"]["jobTemplate"]["spec"]
    asked = reaper.parser().parse_args(job["template"]["spec"]["containers"][0]["args"])
    assert (tuple(asked.kinds), asked.keep) == (kinds, 144)


def test_the_reaper_runs_as_the_launcher_under_the_restricted_level_and_its_words_are_understood() -> None:
    from k8s import reaper

    job = one(rendered(), "CronJob")["spec"]["jobTemplate"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["serviceAccountName"] == load_cluster("onprem").accounts.launcher
    assert (job["backoffLimit"], pod["restartPolicy"], pod["automountServiceAccountToken"]) == (0, "Never", True)
    assert pod["securityContext"]["runAsNonRoot"] is True and container["securityContext"]["capabilities"]["drop"]
    assert container["command"] == ["python", "-m", reaper.__name__]
    asked = reaper.parser().parse_args(container["args"])
    assert (asked.namespace, asked.after) == ("qwenvl", 6)
    assert not [each for each in rendered("", "--set", "reaper.enabled=false") if each["kind"] == "CronJob"]


def test_the_trainers_account_has_no_rights_and_no_token() -> None:
    objects = rendered("postgresql.yaml")
    (binding,) = [each for each in objects if each["kind"] == "RoleBinding"]
    assert {(subject["namespace"], subject["name"]) for subject in binding["subjects"]} == {
        ("qwenvl", "qwenvl-train-launcher"),
        ("qwenvl", "pipeline-runner"),
        ("kubeflow", "pipeline-runner"),
    }
    assert one(objects, "ServiceAccount", "-trainer")["automountServiceAccountToken"] is False
    assert one(objects, "ServiceAccount", "-launcher")["automountServiceAccountToken"] is True
    assert not [each for each in objects if each["kind"].startswith("Cluster")]


def test_the_recipes_are_the_packages_own(tmp_path: Path) -> None:
    recipes = one(rendered(), "ConfigMap", "-recipes")["data"]
    assert sorted(recipes) == [f"{name}.yaml" for name in shipped()]
    for name in shipped():
        assert load_recipe(recipes[f"{name}.yaml"]) == load_recipe(name)
    # The package that people install has files where the checkout has a link.
    helm("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("*.tgz")
    with tarfile.open(package) as tar:
        packed = {member.name: member for member in tar.getmembers()}
    assert packed["qwenvl-train/recipes/tiny.yaml"].isfile()
    assert not any("/ci/" in name for name in packed)


def test_names_agree_with_the_defaults_of_a_cluster_file() -> None:
    cluster, objects = load_cluster("onprem"), rendered()
    assert one(objects, "ServiceAccount", "-trainer")["metadata"]["name"] == cluster.accounts.trainer
    assert one(objects, "ServiceAccount", "-launcher")["metadata"]["name"] == cluster.accounts.launcher
    service = one(objects, "Service")
    address = f"http://{service['metadata']['name']}.{service['metadata']['namespace']}.svc:{service['spec']['ports'][0]['port']}"
    assert cluster.mlflow_uri == address


def test_no_secret_is_created_or_written_anywhere() -> None:
    for case in CASES:
        assert not [each for each in rendered(case) if each["kind"] == "Secret"]
    container = one(rendered("postgresql.yaml"), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    entries = {entry["name"]: entry for entry in container["env"]}
    for name in ("PGPASSWORD", "AWS_SECRET_ACCESS_KEY"):
        assert "secretKeyRef" in entries[name]["valueFrom"]
    assert not any("PASSWORD" in argument for argument in container["args"])


def test_pods_meet_the_restricted_level() -> None:
    pod = one(rendered(), "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        security = container["securityContext"]
        assert (security["allowPrivilegeEscalation"], security["readOnlyRootFilesystem"]) == (False, True)
        assert security["capabilities"] == {"drop": ["ALL"]}


def test_the_network_policy_selects_the_pods_that_the_launcher_makes() -> None:
    from k8s.pytorchjob import render_stage
    from tests.k8s.golden import RUN

    policy = one(rendered("postgresql.yaml"), "NetworkPolicy", "-trainer")
    job = render_stage(load_recipe("tiny"), "sft", load_cluster("test"), RUN).job
    labels = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert not [each for each in rendered() if each["kind"] == "NetworkPolicy"]


def test_sqlite_survives_an_uninstall_and_has_one_writer() -> None:
    objects = rendered()
    assert one(objects, "PersistentVolumeClaim")["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert one(objects, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    assert not [each for each in rendered("postgresql.yaml") if each["kind"] == "PersistentVolumeClaim"]


def test_the_charts_versions_are_those_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    (version,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert chart["version"] == chart["appVersion"] == version
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert f"{values['mlflow']['image']['repository']}:{values['mlflow']['image']['tag']}" == versions()["MLFLOW_IMAGE"]


def test_the_notes_name_what_is_missing(tmp_path: Path) -> None:
    output = helm("install", "release", str(CHART), "--dry-run=client", "--namespace", "qwenvl")
    notes = output.split("NOTES:")[1]
    assert "http://qwenvl-train-mlflow.qwenvl.svc:5000" in notes
    assert "the secret qwenvl-train-s3" in notes


@pytest.mark.parametrize("case", ["", "postgresql.yaml"])
def test_mlflow_understands_the_command_line_and_answers_to_its_own_names_only(case: str) -> None:
    from mlflow.cli import server
    from mlflow.server.security_utils import is_allowed_host_header, is_health_endpoint

    container = one(rendered(case), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert [*container["command"], container["args"][0]] == ["mlflow", "server"]
    parsed = server.make_context("server", container["args"][1:]).params
    hosts = parsed["allowed_hosts"].split(",")
    for host in ("qwenvl-train-mlflow.qwenvl.svc:5000", "qwenvl-train-mlflow.qwenvl.svc.cluster.local:5000"):
        assert is_allowed_host_header(hosts, host)
    assert not is_allowed_host_header(hosts, "evil.example.com")
    assert not is_allowed_host_header(hosts, "qwenvl-train-mlflow.other.svc:5000")
    assert is_allowed_host_header(hosts, "mlflow.example.com") is (case == "postgresql.yaml")
    # The kubelet asks by the pod's address, which is no allowed host.
    assert is_health_endpoint(container["readinessProbe"]["httpGet"]["path"])
