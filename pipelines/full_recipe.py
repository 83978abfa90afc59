"""The whole recipe as a Kubeflow Pipelines v2 definition.

    python pipelines/full_recipe.py                 compiles it to pipelines/full_recipe.yaml
    python pipelines/full_recipe.py --cluster mine.yaml --to mine-pipeline.yaml       the same for a cluster file
    qwenvl run tiny --out out/tiny                  runs it on this machine through kfp.local (pipelines/run.py)
    qwenvl submit RECIPE --out s3://...             starts it on Kubeflow Pipelines (pipelines/remote.py)

    prepare-data -+-> prepare-stage1 -> prepare-stage2 -> prepare-stage3   (plans: a later one while an earlier trains)
                  +-> init -> stage1 -> stage2 -> stage3 -+
                  +-> prepare-sft-requests ---------------+-> -answers -> -select -> prepare-sft -> sft
                  +-> prepare-dpo-requests, -answers, -select, prepare-dpo likewise, after sft -> dpo
    dpo -> export -> evaluate -> report

A recipe without some stage runs the same steps; those of the missing stage return at once. dsl.If would be no better:
no task outside of a condition may depend on one inside. The arrows are the only order: data passes through OUT, where
every step finds what is finished. On a cluster an exit task removes what a stopped run still owns there.

kfp traces the function while it decorates it, so it is defined inside of one that knows the pods. No `from __future__
import annotations` here: kfp reads the annotations as types.
"""

import argparse
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from pipelines import step_pods, steps
from pipelines.step_pods import StepPods
from trainer.recipe import STAGES

NAME = "qwenvl-full-recipe"
DESCRIPTION = "Data preparation, three pretraining stages, SFT, DPO, export, evaluation, report"
COMPILED = Path(__file__).with_suffix(".yaml")
SAMPLED_STAGES = ("sft", "dpo")
WAITS: dict[str, Any] = {"num_retries": 2, "backoff_duration": "60s", "backoff_factor": 2.0}
"""On a cluster a step waits for a job and may be evicted meanwhile; started again, it finds the job and waits on."""


def definition(pods: StepPods | None) -> Any:
    """The pipeline, with the pods of its steps placed; None for this machine, where steps are processes."""

    def task(name: str, component: Any, *after: dsl.PipelineTask, **arguments: Any) -> dsl.PipelineTask:
        """One task, named in the UI; kfp's cache is off (OUT says what is finished); tried again if its pod is lost."""
        made = component(**arguments).set_display_name(name).set_caching_options(False).set_retry(**WAITS)
        return step_pods.place(made, pods).after(*after)

    def sampled(stage: str, data: dsl.PipelineTask, newest: dsl.PipelineTask, where: dict) -> dsl.PipelineTask:
        """Answers of the newest model, chosen by their correctness: three steps, as only the second needs a GPU."""
        requests = task(f"prepare-{stage}-requests", steps.make_requests, data, stage=stage, **where)
        answers = task(f"prepare-{stage}-answers", steps.answer, requests, newest, stage=stage, **where)
        return task(f"prepare-{stage}-select", steps.select, answers, stage=stage, **where)

    @dsl.pipeline(name=NAME, description=DESCRIPTION)
    def full_recipe(
        recipe: str,
        out: str,
        cluster: str = "local",
        overrides: list = [],  # noqa: B006 - kfp records defaults in the compiled file
        base_model: str = "",
        accept_changes: list = [],  # noqa: B006
    ):
        """Every stage of a recipe.

        Args:
            recipe: Name of a shipped recipe, URI, or the YAML itself.
            out: Folder or s3:// URI of everything that the run makes.
            cluster: local, or name or URI of a cluster file, or the YAML itself.
            overrides: a.b=value strings.
            base_model: Model folder that takes the place of the recipe's model.base or model.init.
            accept_changes: Result fields whose change a begun stage accepts.
        """
        where = {"cluster": cluster, "out": out, "run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
        clean_up: Any = steps.clean_up
        cleaning = step_pods.place(clean_up(**where).set_caching_options(False), pods)
        with dsl.ExitHandler(cleaning, name="whole-run"):
            asked = {"recipe": recipe, "overrides": overrides, "base_model": base_model}
            data = task("prepare-data", steps.prepare_data, accept_changes=accept_changes, **asked, **where)
            newest = task("init", steps.init, data, **where)
            prepared = data
            for stage in STAGES:
                ready = [prepared, sampled(stage, data, newest, where)] if stage in SAMPLED_STAGES else [prepared]
                prepared = task(f"prepare-{stage}", steps.prepare_stage, *ready, stage=stage, **where)
                newest = task(stage, steps.train, prepared, newest, stage=stage, accept_changes=accept_changes, **where)
            exported = task("export", steps.export, newest, **where)
            evaluated = task("evaluate", steps.evaluate, exported, **where)
            task("report", steps.report, evaluated, out=out)

    return full_recipe


full_recipe = definition(None)


def compile_to(path: Path = COMPILED, pods: StepPods | None = None) -> None:
    """Write the definition; without pods with those of the committed file."""
    compiler.Compiler().compile(definition(pods or step_pods.shipped()), str(path))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python pipelines/full_recipe.py", description="compile the pipeline")
    parser.add_argument("--cluster", help="cluster file, shipped name or URI that the pods of the steps are placed by")
    parser.add_argument("--to", type=Path, default=COMPILED, metavar="FILE")
    asked = parser.parse_args()
    if asked.cluster and asked.to == COMPILED:
        parser.error("--cluster needs --to: the committed file is of no cluster")
    from k8s.cluster import load_cluster

    compile_to(asked.to, step_pods.of_cluster(load_cluster(asked.cluster)) if asked.cluster else None)
    print(f"wrote {asked.to}")


if __name__ == "__main__":
    main()
