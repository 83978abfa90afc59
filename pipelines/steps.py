"""The steps as Kubeflow Pipelines components: each body calls one function of pipelines/work.py.

They are lightweight Python components: kfp carries their source in the compiled pipeline and executes it in the
launcher image (on a cluster) or in this environment (kfp.local); both have this package installed. Nothing is cached
by kfp: each function recognises what is finished by what lies in OUT, which is true also after a change of recipe.

No `from __future__ import annotations` here: kfp reads the annotations as types.
"""

from kfp import dsl

from pipelines.images import launcher_image

step = dsl.component(base_image=launcher_image(), install_kfp_package=False)


@step
def prepare_data(
    recipe: str, overrides: list, base_model: str, accept_changes: list, cluster: str, out: str, run_id: str
):
    from pipelines import work

    work.prepare_data(
        recipe=recipe,
        overrides=overrides,
        base_model=base_model,
        accept_changes=accept_changes,
        cluster=cluster,
        out=out,
        run_id=run_id,
    )


@step
def prepare_stage(stage: str, cluster: str, out: str, run_id: str):
    from pipelines import work

    work.prepare_stage(stage=stage, cluster=cluster, out=out, run_id=run_id)


@step
def init(cluster: str, out: str, run_id: str):
    from pipelines import work

    work.init(cluster=cluster, out=out, run_id=run_id)


@step
def train(stage: str, accept_changes: list, cluster: str, out: str, run_id: str):
    from pipelines import work

    work.train(stage=stage, accept_changes=accept_changes, cluster=cluster, out=out, run_id=run_id)


@step
def make_requests(stage: str, cluster: str, out: str, run_id: str):
    from pipelines import work

    work.make_requests(stage=stage, cluster=cluster, out=out, run_id=run_id)


@step
def answer(stage: str, cluster: str, out: str, run_id: str):
    from pipelines import work

    work.answer(stage=stage, cluster=cluster, out=out, run_id=run_id)


@step
def select(stage: str, cluster: str, out: str, run_id: str):
    from pipelines import work

    work.select(stage=stage, cluster=cluster, out=out, run_id=run_id)


@step
def export(cluster: str, out: str, run_id: str):
    from pipelines import work

    work.export(cluster=cluster, out=out, run_id=run_id)


@step
def evaluate(cluster: str, out: str, run_id: str):
    from pipelines import work

    work.evaluate(cluster=cluster, out=out, run_id=run_id)


@step
def report(out: str):
    from pipelines import work

    work.report(out=out)


@step
def clean_up(cluster: str, out: str, run_id: str, status: dsl.PipelineTaskFinalStatus):
    from pipelines import work

    work.clean_up(cluster=cluster, out=out, run_id=run_id, state=status.state)
