"""Up and down: the whole test cluster, with the time of each part."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

from tests.cluster import control, images, nodes, operators, pki, programs
from tests.cluster.place import GATEWAY, HOME, LAST_FAILURE, LOCK, LOGS, NODES, UP
from tests.cluster.processes import (
    folders,
    leftovers,
    network,
    remove_all,
    save_sysctls,
    wait_for,
)
from trainer.errors import UsageError


@dataclass(frozen=True)
class State:
    """What a running cluster says of itself, in up.json."""

    programs: str
    image: str
    seconds: float


def check_machine() -> None:
    """Raises UsageError: with everything that this machine lacks."""
    if lacks := programs.missing():
        raise UsageError("no test cluster on this machine", expected="; ".join(lacks))


def up(*, queue: bool = True) -> State:
    """A new cluster, whatever is left of another one.

    Args:
        queue: with Kueue, which is most of the start.

    Raises:
        UsageError: the machine lacks something, or a part does not start; then nothing is left.
    """
    check_machine()
    built = programs.build()
    with _alone():
        if left := leftovers():
            print(f"removing what another cluster left: {', '.join(left)}")
            _remove()
        began = time.monotonic()
        try:
            image = _start(built, queue)
        except BaseException:
            _remove(keep_logs=True)
            raise
        state = State(str(built.folder), image.digest, round(time.monotonic() - began, 1))
        UP.write_text(json.dumps(asdict(state)))
    print(f"test cluster up in {state.seconds} s; down again: make cluster-down")
    return state


def down() -> None:
    """Everything of the cluster, also of one whose owner was killed."""
    with _alone():
        found = leftovers()
        began = time.monotonic()
        _remove()
        told = f"removed {', '.join(found)}, in {time.monotonic() - began:.1f} s" if found else "there was none"
        print(f"test cluster: {told}")


def current() -> State | None:
    """The running cluster, if it is whole and answers."""
    try:
        state = State(**json.loads(UP.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return state if control.answers(f"https://{GATEWAY}/readyz") else None


def renew_image() -> str:
    """The running cluster's nodes get the packages as the checkout has them now; the image's digest."""
    state = current()
    assert state is not None
    image = images.make_trainer()
    if image.digest != state.image:
        for node in NODES:
            nodes.load_images(node, [image])
        UP.write_text(json.dumps(asdict(replace(state, image=image.digest))))
    return image.digest


def _start(built: programs.Programs, queue: bool) -> images.Image:
    """In parallel where one part does not need another."""
    with _timed("folders, certificates, network"):
        folders()
        save_sysctls()
        network()
        pki.make_all()
    with ThreadPoolExecutor(max_workers=4) as pool:
        made = pool.submit(_images, built)
        with _timed("control plane"):
            control.start_control_plane(built)
            control.apply(control.POLICIES.read_text())
        with _timed("nodes, DNS and operators, beside each other"):
            pause, image = made.result()
            operators_of = (_operators, _kueue, _dns) if queue else (_operators, _dns)
            parts = [pool.submit(part, built) for part in operators_of]
            with _timed("  images and nodes"):
                _nodes(built, [pause, image])
            for part in parts:
                part.result()
    with _timed("policies in force"):
        wait_for("the admission policy", _policy_works)
    return image


def _images(built: programs.Programs) -> tuple[images.Image, images.Image]:
    for node in NODES:
        nodes.start_containerd(node)
    return images.make_pause(built), images.make_trainer()


def _nodes(built: programs.Programs, made: list[images.Image]) -> None:
    for node in NODES:
        nodes.load_images(node, made)
        nodes.start_kubelet(built, node)
    for node in NODES:
        nodes.node_ready(node)


def _operators(built: programs.Programs) -> None:
    with _timed("  training-operator"):
        operators.install_training_operator(built)
        operators.start_training_operator(built)
        operators.training_operator_ready()


def _kueue(built: programs.Programs) -> None:
    with _timed("  Kueue"):
        operators.install_kueue(built)
        operators.start_kueue(built)
        operators.kueue_ready()


def _dns(built: programs.Programs) -> None:
    with _timed("  DNS"):
        control.start_dns(built)


def _policy_works() -> bool:
    """The API server compiles a policy some time after it is stored: ask what it makes of a pod."""
    container = {"name": "c", "image": "none", "resources": {"requests": {"cpu": "16"}}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe", "namespace": "default"}}
    text = json.dumps({**pod, "spec": {"containers": [container]}})
    cpu = "jsonpath={.spec.containers[0].resources.requests.cpu}"
    arguments = ("create", "-f", "-", "--dry-run=server", "-o", cpu)
    return control.kubectl(*arguments, text=text, check=False) == "10m"


def _remove(*, keep_logs: bool = False) -> None:
    """Kubelets first, so that nothing is started again; the API server and etcd last of what is ended gently."""
    if keep_logs:
        _keep_logs()
    kubelets = [nodes.kubelet_name(node) for node in NODES]
    remove_all([*kubelets, "kube-scheduler", "kube-controller-manager", operators.KUEUE, operators.OPERATOR])


def _keep_logs() -> None:
    shutil.rmtree(LAST_FAILURE, ignore_errors=True)
    with contextlib.suppress(OSError):
        shutil.copytree(LOGS, LAST_FAILURE)
        print(f"logs: {LAST_FAILURE}")


@contextlib.contextmanager
def _timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"  {what}: {time.monotonic() - began:.1f} s", flush=True)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process at a time starts or removes the machine's cluster."""
    HOME.mkdir(parents=True, exist_ok=True)
    with LOCK.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError("another process starts or removes the test cluster", where=str(LOCK)) from None
        yield
