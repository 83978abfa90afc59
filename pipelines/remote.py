"""Runs on Kubeflow Pipelines: ask, follow, read, stop, take up again. kfp's own client does the talking.

list_runs   the newest runs
status      one line a step, with the message of one that failed
follow      tells every change of a step until the run has ended; outlives restarts of the API
logs        what the steps' pods printed, from the cluster itself (kfp's API has no call for it)
stop        terminates the run, then removes what it still owns: kfp's terminate alone deletes nothing
retry       starts the steps that failed once more; they find their jobs and results

Starting a run is pipelines/submit.py. Read in a real Kubeflow Pipelines 2.14.3: a terminated run ends as FAILED, not as
CANCELED, and a retried one forgets its former states; so nothing here hangs on how a run's end is called.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from k8s.client import api_client
from trainer.errors import ClusterError, QwenVLError, StorageError, UsageError

ENDED = {"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED"}
WAIT_S = 10.0
STOP_WAIT_S = 180.0
"""From terminate to the end of a run: its exit task makes a pod and cleans up."""
SILENCE_S = 1800.0
"""How long the API may not answer while a run is followed: an upgrade of Kubeflow Pipelines fits."""
DEFAULT_NAMESPACE = "kubeflow"  # of the steps' pods, where there are no profiles
IMPLEMENTATION = "system-container-impl"  # pods of kfp's drivers print nothing of ours
FORWARD = "Inside a cluster: kubectl port-forward -n kubeflow svc/ml-pipeline 8888, then --host http://localhost:8888"
RUN_LABEL = "pipeline/runid"
NOT_STEPS = ("whole-run", "exit-handler-1")
"""What groups the steps."""

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where Kubeflow Pipelines answers.

    Args:
        namespace: a profile's, where Kubeflow has several users; None where it has not, as its API demands.
    """

    host: str | None
    namespace: str | None = None
    token: str | None = None


class Unanswered(ClusterError):
    """No answer, or one that says "later": worth asking again."""


def client_of(place: Place) -> Any:
    if not place.host:
        raise UsageError(
            "where is Kubeflow Pipelines?", where="--host", do="give --host URL or set KF_PIPELINES_ENDPOINT"
        )
    try:
        with warnings.catch_warnings():  # it greets with one
            warnings.simplefilter("ignore")
            from kfp.client import Client

            with told(place):
                _healthz(place.host, place.token)
                namespace = place.namespace or DEFAULT_NAMESPACE  # what its constructor calls "no namespace"
                return Client(host=place.host, namespace=namespace, existing_token=place.token)
    except ImportError as error:
        raise UsageError("this needs the kfp client", got=str(error), do="install qwenvl-train[pipelines]") from error


def _healthz(host: str, token: str | None) -> None:
    """Is it there, and does it know us? The client's own constructor asks for 25 s and prints each attempt's trace."""
    import kfp_server_api as api

    configuration = api.Configuration(host=host)
    if token:
        configuration.api_key["authorization"] = token
        configuration.api_key_prefix["authorization"] = "Bearer"
    with api.ApiClient(configuration) as client:
        api.HealthzServiceApi(client).healthz_service_get_healthz()


@contextlib.contextmanager
def told(place: Place) -> Iterator[None]:
    """Errors of the API as one message of ours; what kfp's client prints on the way is left out."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except (QwenVLError, ImportError):
        raise
    except Exception as error:
        status = getattr(error, "status", None)
        got = f"{status} {_message(error)}" if status else _why_no_answer(error)
        if status == 404:
            raise UsageError("Kubeflow Pipelines does not know it", where=place.host, got=got) from error
        if status == 400:
            raise UsageError("Kubeflow Pipelines refuses it", where=place.host, got=got) from error
        if status in (401, 403):
            do = "give a token in KFP_TOKEN, and your profile's --namespace where Kubeflow has several users"
            raise ClusterError("Kubeflow Pipelines lets you not do it", where=place.host, got=got, do=do) from error
        if not status or status == 429 or status >= 500:
            do = (
                None
                if status
                else f"is the address right (--host, KF_PIPELINES_ENDPOINT), and reached from here? {FORWARD}"
            )
            raise Unanswered("Kubeflow Pipelines did not answer", where=place.host, got=got, do=do) from error
        raise ClusterError("Kubeflow Pipelines did not do it", where=place.host, got=got) from error


def _why_no_answer(error: BaseException) -> str:
    """What the operating system said (connection refused, no such host), from under the layers of the HTTP client."""
    chain: list[BaseException] = [error]
    while (inner := getattr(chain[-1], "reason", None) or chain[-1].__cause__ or chain[-1].__context__) is not None:
        if not isinstance(inner, BaseException) or inner in chain:
            break
        chain.append(inner)
    for one in reversed(chain):
        if isinstance(one, OSError) and one.strerror:
            return one.strerror
    last = chain[-1]
    return f"{type(last).__name__}: {' '.join(str(last).split())[:300]}"


def _message(error: Exception) -> str:
    """The server's own words, out of the JSON that it answers with."""
    body = getattr(error, "body", None)
    try:
        found = json.loads(body or "")
        text = str(found.get("message") or found.get("error") or body)
    except (ValueError, AttributeError):
        text = str(body or error)
    return " ".join(text.split())[:400]


def asked(place: Place, call: Callable[[], T], *, say: Say, sleep: Callable[[float], None], clock: Callable) -> T:
    """The answer of a call that changes nothing, asked again while there is none, at most SILENCE_S."""
    began, wait_s = None, 2.0
    while True:
        try:
            with told(place):
                answer = call()
        except Unanswered as error:
            if began is None:
                began = clock()
                say(f"no answer, asking again for {SILENCE_S / 60:.0f} min: {error.got}")
            if clock() - began > SILENCE_S:
                raise
            sleep(wait_s)
            wait_s = min(wait_s * 2, 60.0)
            continue
        if began is not None:
            say("it answers again")
        return answer


# ---------------------------------------------------------------- reading


def list_runs(place: Place, *, number: int = 20, say: Say = print) -> int:
    """The newest runs of every experiment, one line each."""
    client = client_of(place)
    with told(place):
        found = client.list_runs(page_size=number, sort_by="created_at desc", namespace=place.namespace).runs or []
    say(f"{'run':36}  {'state':10}  {'created':16}  name, output")
    for run in found:
        created = f"{run.created_at:%Y-%m-%d %H:%M}" if run.created_at else ""
        out = given(run).get("out", "")
        say(f"{run.run_id:36}  {run.state or 'PENDING':10}  {created:16}  {run.display_name}  {out}")
    return 0


def given(run: Any) -> dict[str, Any]:
    """The parameters that a run was started with."""
    return (run.runtime_config.parameters if run.runtime_config else None) or {}


def status(place: Place, run_id: str, *, say: Say = print) -> int:
    """Print a run's state and its steps; 1 when it failed."""
    client = client_of(place)
    with told(place):
        run = client.get_run(run_id)
    say(f"{run.display_name}: {run.state or 'PENDING'}{_error(run)}")
    for task in tasks(run, names_of(place, client, run)):
        say(f"  {task.display_name:28} {task.state or 'PENDING':10} {_seconds(task)}{_error(task)}")
    return 1 if run.state in ("FAILED", "CANCELED") else 0


def tasks(run: Any, names: Mapping[str, str]) -> list[Any]:
    """The steps under the names that the pipeline gives them, without kfp's drivers and groups.

    Args:
        names: names_of(the run); empty where the server does not show its definition: then everything is shown.
    """
    details = (run.run_details.task_details if run.run_details else None) or []
    own = [task for task in details if task.pod_name or task.executor_detail or task.state]
    for task in own:
        task.display_name = names.get(task.display_name or "", task.display_name)
    known = set(names.values()) - set(NOT_STEPS)
    return [task for task in own if not names or task.display_name in known]


def names_of(place: Place, client: Any, run: Any) -> dict[str, str]:
    """Key of a task -> the step's name. A 2.14 server knows tasks by their keys, which are their components' names
    (train, train-2), whatever the pipeline calls them."""
    spec, version = run.pipeline_spec, run.pipeline_version_reference
    if not spec and version and version.pipeline_version_id:
        with contextlib.suppress(UsageError), told(place):  # deleted since
            spec = client.get_pipeline_version(version.pipeline_id, version.pipeline_version_id).pipeline_spec
    spec = (spec or {}).get("pipeline_spec", spec or {})
    parts = [spec.get("root", {}), *spec.get("components", {}).values()]
    found = [task for part in parts for task in part.get("dag", {}).get("tasks", {}).items()]
    return {key: task.get("taskInfo", {}).get("name", key) for key, task in found}


def _error(item: Any) -> str:
    message = " ".join((item.error.message if item.error else None or "").split())
    return f"  {message[:300]}" if message else ""


def _seconds(task: Any) -> str:
    if not task.start_time or not task.end_time or task.end_time < task.start_time:
        return ""
    return f"{(task.end_time - task.start_time).total_seconds():.0f} s"


def follow(
    place: Place,
    run_id: str,
    *,
    say: Say = print,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Tell every change of a step until the run has ended; 0 when it succeeded, else 1."""
    client = client_of(place)
    known: dict[str, str] = {}
    names: dict[str, str] | None = None
    while True:
        run = asked(place, lambda: client.get_run(run_id), say=say, sleep=sleep, clock=clock)
        if names is None:
            names = asked(place, lambda run=run: names_of(place, client, run), say=say, sleep=sleep, clock=clock)
        for task in tasks(run, names):
            if task.state and known.get(task.display_name) != task.state:
                known[task.display_name] = task.state
                say(f"{time.strftime('%H:%M:%S')} {task.display_name}: {task.state}{_error(task)}")
        if run.state in ENDED:
            say(f"run {run_id}: {run.state}{_error(run)}")
            return 0 if run.state == "SUCCEEDED" else 1
        sleep(WAIT_S)


def logs(place: Place, run_id: str, *, step: str | None = None, tail: int = 200, say: Say = print) -> int:
    """The last lines of every step's pod, from the cluster that KUBECONFIG names."""
    from kubernetes import client
    from kubernetes.client.exceptions import ApiException

    core, namespace, shown = client.CoreV1Api(api_client()), place.namespace or DEFAULT_NAMESPACE, 0
    names: dict[str, str] = {}
    with contextlib.suppress(QwenVLError):  # the cluster is asked for the lines; without the API they have other names
        api = client_of(place)
        with told(place):
            run = api.get_run(run_id)
        names = names_of(place, api, run)
    with _of_kubernetes():
        pods = core.list_namespaced_pod(namespace, label_selector=f"{RUN_LABEL}={run_id}").items
    for pod in sorted(pods, key=lambda pod: pod.metadata.creation_timestamp):
        node: str = (pod.metadata.annotations or {}).get("workflows.argoproj.io/node-name") or pod.metadata.name
        name = ".".join(names.get(part, part) for part in node.split("."))
        if IMPLEMENTATION not in pod.metadata.name or (step and step not in name):
            continue
        say(f"==> {name} ({pod.status.phase})")
        try:
            say(core.read_namespaced_pod_log(pod.metadata.name, namespace, container="main", tail_lines=tail))
        except ApiException as error:  # not started yet, or gone since the list was made
            say(f"no log: {_message(error)}")
        shown += 1
    if not shown:
        raise UsageError(
            "no pod of this run is left" if step is None else "no pod of this step is left",
            where=f"{run_id} in namespace {namespace}",
            do="training's own lines lie in OUT/STAGE/attempts",
        )
    return 0


@contextlib.contextmanager
def _of_kubernetes() -> Iterator[None]:
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        raise ClusterError("the cluster refused a request", got=f"{error.status} {_message(error)}") from error
    except HTTPError as error:
        do = "is the cluster that KUBECONFIG names reached from here?"
        raise ClusterError("the cluster did not answer", got=_why_no_answer(error), do=do) from error


# ---------------------------------------------------------------- acting


def stop(
    place: Place,
    run_id: str,
    *,
    say: Say = print,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Terminate a run, wait until its steps are gone, and remove what it still owns on the cluster.

    In this order: a step that is still there would take a removed job for a lost one and create the next attempt.
    """
    client = client_of(place)
    with told(place):
        run = client.get_run(run_id)
    if run.state not in ENDED:
        with told(place):
            client.terminate_run(run_id)
        say(f"{run_id}: terminated")
        until = clock() + STOP_WAIT_S
        while run.state not in ENDED and clock() < until:
            sleep(2.0)
            run = asked(place, lambda: client.get_run(run_id), say=say, sleep=sleep, clock=clock)
        say(
            f"{run_id}: {run.state}" if run.state in ENDED else f"{run_id}: still {run.state}; cleaning up all the same"
        )
    out, cluster = given(run).get("out"), given(run).get("cluster")
    if not out or not cluster or cluster == "local":
        return 0
    from k8s import cleanup

    try:
        cleanup.clean_up(cluster, out=out, run_id=run_id)
    except (ClusterError, StorageError) as error:  # refused, or no answer
        say(f"the run's own exit task removes its jobs; from here it could not be done: {error}")
    return 0


def retry(place: Place, run_id: str, *, wait: bool = True, say: Say = print) -> int:
    """Start the failed steps of a run that has ended once more; they adopt what runs and skip what is finished."""
    client = client_of(place)
    with told(place):
        client.runs.run_service_retry_run(run_id=run_id)
    say(f"{run_id}: started again")
    return follow(place, run_id, say=say) if wait else 0
