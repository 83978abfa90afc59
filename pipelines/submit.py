"""Start a run on Kubeflow Pipelines: check here, compile for the cluster, upload a version, create the run.

A version's name ends with the digest of what was compiled, so the same definition is uploaded once and a run says in
the UI which one it has. What a recipe or a cluster file gets wrong is told here, not by a pod an hour later.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from k8s.cluster import Cluster, check, example_images, load_cluster
from pipelines.remote import Place, Say, client_of, follow, told
from pipelines.settle import asked_recipe
from trainer.errors import RecipeError, UsageError


@dataclass(frozen=True)
class Asked:
    """What a person wants to run.

    Args:
        recipe, cluster: shipped name, URI, or the YAML itself.
        service_account: of the steps' pods; default: what Kubeflow Pipelines gives them.
    """

    recipe: str
    out: str
    cluster: str
    overrides: tuple[str, ...] = ()
    base_model: str = ""
    accept_changes: tuple[str, ...] = ()
    experiment: str | None = None
    run_name: str | None = None
    service_account: str | None = None

    def parameters(self) -> dict[str, Any]:
        """As the pipeline has them (pipelines/full_recipe.py)."""
        return {
            "recipe": self.recipe,
            "out": self.out,
            "cluster": self.cluster,
            "overrides": list(self.overrides),
            "base_model": self.base_model,
            "accept_changes": list(self.accept_changes),
        }


def submit(place: Place, asked: Asked, *, wait: bool = True, say: Say = print) -> int:
    """Start a run and, with `wait`, follow it: 0 when it succeeded, else 1. Its id is on the last line before that."""
    name, cluster = checked(asked)
    client = client_of(place)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "full_recipe.yaml"
        version_name = compiled(package, cluster)
        pipeline_id, version_id = uploaded(place, client, package, version_name)
    with told(place):
        experiment = client.create_experiment(asked.experiment or name, namespace=place.namespace)
        run = client.run_pipeline(
            experiment_id=experiment.experiment_id,
            job_name=asked.run_name or f"{name} {time.strftime('%Y-%m-%d %H:%M')}",
            params=asked.parameters(),
            pipeline_id=pipeline_id,
            version_id=version_id,
            service_account=asked.service_account,
        )
    say(f"version {version_name}: {place.host}/#/runs/details/{run.run_id}")
    say(f"follow it: qwenvl runs status {run.run_id}    stop it: qwenvl runs stop {run.run_id}")
    say(run.run_id)
    return follow(place, run.run_id, say=say) if wait else 0


def checked(asked: Asked) -> tuple[str, Cluster]:
    """The recipe's name and the cluster, when both are valid and fit together.

    Raises:
        RecipeError: with every field that the cluster cannot give.
        UsageError: the output is no object store's, or the cluster file names images of the examples.
    """
    if "://" not in asked.out:
        expected = "s3://BUCKET/PREFIX"
        raise UsageError("the pods of a cluster share no folder", where=f"--out {asked.out}", expected=expected)
    recipe, cluster = asked_recipe(asked.recipe, list(asked.overrides), asked.base_model), load_cluster(asked.cluster)
    if problems := check(recipe, cluster):
        raise RecipeError([("on this cluster", problem) for problem in problems])
    if examples := example_images(cluster):
        raise UsageError(
            "the cluster file still has the example's images",
            where=f"cluster {cluster.name}: {', '.join(f'images.{name}' for name in examples)}",
            do="build the images (images/README.md) and give their digests",
        )
    return recipe.name, cluster


def compiled(package: Path, cluster: Cluster) -> str:
    """Write the definition for the cluster; the version's name."""
    from pipelines.full_recipe import compile_to
    from pipelines.step_pods import of_cluster

    compile_to(package, of_cluster(cluster))
    return f"{version('qwenvl-train')}-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}"


def uploaded(place: Place, client: Any, package: Path, version_name: str) -> tuple[str, str]:
    """(pipeline id, version id); what is there already is used."""
    from pipelines.full_recipe import DESCRIPTION, NAME

    pipeline_id = _pipeline(place, client, NAME)
    if pipeline_id is None:
        with told(place):  # Kubeflow Pipelines makes a first version of it as well, named like the pipeline
            client.upload_pipeline(str(package), pipeline_name=NAME, description=DESCRIPTION, namespace=place.namespace)
        pipeline_id = _pipeline(place, client, NAME)
        if pipeline_id is None:
            raise UsageError("the uploaded pipeline is not there", where=NAME, do="give your profile's --namespace")
    same = {"operation": "EQUALS", "key": "display_name", "stringValue": version_name}
    with told(place):
        answer = client.list_pipeline_versions(pipeline_id, filter=json.dumps({"predicates": [same]}))
        found = [one for one in answer.pipeline_versions or [] if one.display_name == version_name]
        made = found[0] if found else client.upload_pipeline_version(str(package), version_name, pipeline_id)
    return pipeline_id, made.pipeline_version_id


def _pipeline(place: Place, client: Any, name: str) -> str | None:
    more = {"namespace": place.namespace} if place.namespace else {}
    try:
        with told(place):
            return client.pipelines.pipeline_service_get_pipeline_by_name(name=name, **more).pipeline_id
    except UsageError as error:
        if getattr(error.__cause__, "status", None) == 404:
            return None
        raise
