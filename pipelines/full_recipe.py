"""The whole recipe as a Kubeflow Pipelines v2 definition.

    python pipelines/full_recipe.py                 compiles it to pipelines/full_recipe.yaml
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

kfp traces the function while it decorates it, so its helpers come first. No `from __future__ import annotations`
here: kfp reads the annotations as types.
"""

from pathlib import Path

from kfp import compiler, dsl

from pipelines import steps
from trainer.recipe import STAGES

NAME = "qwenvl-full-recipe"
COMPILED = Path(__file__).with_suffix(".yaml")
SAMPLED_STAGES = ("sft", "dpo")
WAITS = {"num_retries": 2, "backoff_duration": "60s", "backoff_factor": 2.0}
"""On a cluster a step waits for a job and may be evicted meanwhile; started again, it finds the job and waits on."""


def named(name: str, task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Name a task in the UI, turn kfp's cache off (OUT says what is finished), and try it again if its pod is lost."""
    return task.set_display_name(name).set_caching_options(False).set_retry(**WAITS)


def sampled(stage: str, data: dsl.PipelineTask, newest: dsl.PipelineTask, where: dict) -> dsl.PipelineTask:
    """Answers of the newest model, chosen by their correctness: three steps, because only the second needs a GPU."""
    requests = named(f"prepare-{stage}-requests", steps.make_requests(stage=stage, **where).after(data))
    answers = named(f"prepare-{stage}-answers", steps.answer(stage=stage, **where).after(requests, newest))
    return named(f"prepare-{stage}-select", steps.select(stage=stage, **where).after(answers))


@dsl.pipeline(name=NAME, description="Data preparation, three pretraining stages, SFT, DPO, export, evaluation, report")
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
        cluster: local, or name or URI of a cluster file.
        overrides: a.b=value strings.
        base_model: Model folder that takes the place of the recipe's model.base or model.init.
        accept_changes: Result fields whose change a begun stage accepts.
    """
    where = {"cluster": cluster, "out": out}
    cleaning = steps.clean_up(run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, **where).set_caching_options(False)
    with dsl.ExitHandler(cleaning, name="whole-run"):
        data = named(
            "prepare-data",
            steps.prepare_data(
                recipe=recipe, overrides=overrides, base_model=base_model, accept_changes=accept_changes, **where
            ),
        )
        newest = named("init", steps.init(**where).after(data))
        prepared = data
        for stage in STAGES:
            ready = [prepared]
            if stage in SAMPLED_STAGES:
                ready += [sampled(stage, data, newest, where)]
            prepared = named(f"prepare-{stage}", steps.prepare_stage(stage=stage, **where).after(*ready))
            trained = steps.train(stage=stage, accept_changes=accept_changes, **where).after(prepared, newest)
            newest = named(stage, trained)
        exported = named("export", steps.export(**where).after(newest))
        evaluated = named("evaluate", steps.evaluate(**where).after(exported))
        named("report", steps.report(out=out).after(evaluated))


def compile_to(path: Path = COMPILED) -> None:
    compiler.Compiler().compile(full_recipe, str(path))


if __name__ == "__main__":
    compile_to()
    print(f"wrote {COMPILED}")
