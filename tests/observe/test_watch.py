"""The hang watchdog and the GPU readings."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from trainer.heartbeat import PHASE_LIMIT_S, Pulse
from trainer.observe.gpu import Gpu
from trainer.observe.watch import Watch, hang_of


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_rank_without_progress_is_ended_and_one_with_progress_is_not() -> None:
    clock, hung = Clock(), threading.Event()
    pulse = Pulse(None, 3, clock=clock)
    pulse.beat(phase="train", step=7)
    watch = Watch(pulse, on_hang=lambda _: hung.set(), every_s=0.01).start()
    clock.now = PHASE_LIMIT_S["train"] - 1
    pulse.beat(step=8)
    clock.now += PHASE_LIMIT_S["train"] - 1
    assert not hung.wait(0.1)
    clock.now += 2
    assert hung.wait(2.0)
    watch.stop()
    assert "rank 3, phase train, step 8" in str(hang_of(pulse))


def test_a_phase_brings_its_own_limit_and_a_slow_step_may_raise_it() -> None:
    pulse = Pulse(None, 0)
    pulse.beat(phase="load")
    assert pulse.state.phase_limit_s == PHASE_LIMIT_S["load"]
    pulse.beat(limit_s=5.0)
    pulse.beat(step=1)
    assert pulse.state.phase_limit_s == 5.0


def test_a_machine_without_a_gpu_has_no_readings() -> None:
    def refuse() -> None:
        raise OSError("no driver")

    assert Gpu(nvml=SimpleNamespace(nvmlInit=refuse)).read() == {}


def test_a_reading_that_the_device_refuses_is_left_out() -> None:
    class Refused(Exception):
        pass

    def refuse(*_: object) -> None:
        raise Refused

    nvml = SimpleNamespace(
        NVMLError=Refused,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=lambda _: SimpleNamespace(gpu=50),
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(used=2**30, total=2**31),
        nvmlDeviceGetPowerUsage=refuse,
        nvmlDeviceGetTemperature=lambda *_: 41,
    )
    assert Gpu(nvml=nvml).read() == {
        "gpu.utilisation": 0.5,
        "gpu.memory_gib": 1.0,
        "gpu.memory_share": 0.5,
        "gpu.temperature_c": 41.0,
    }
