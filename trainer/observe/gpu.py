"""Utilisation, memory and power of this rank's GPU through NVML; nothing where there is none.

The readings come from the driver, not from torch: they cost no synchronisation of the device.
"""

from __future__ import annotations

from typing import Any


class Gpu:
    """`read()` gives {} on a machine without an NVIDIA driver, and leaves out what a device does not report."""

    def __init__(self, index: int = 0, *, nvml: Any = None):
        self._nvml, self._handle = nvml, None
        try:
            if self._nvml is None:
                import pynvml

                self._nvml = pynvml
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        except Exception:  # no package, no driver, no such device: all mean that there is nothing to read
            self._nvml = None

    @property
    def is_there(self) -> bool:
        return self._nvml is not None

    def read(self) -> dict[str, float]:
        """gpu.utilisation (0-1), gpu.memory_gib, gpu.memory_share (0-1), gpu.power_w, gpu.temperature_c"""
        nvml, handle = self._nvml, self._handle
        if nvml is None:
            return {}
        found: dict[str, float] = {}
        for read in (self._utilisation, self._memory, self._power, self._temperature):
            try:
                found |= read(nvml, handle)
            except nvml.NVMLError:
                continue
        return found

    @staticmethod
    def _utilisation(nvml: Any, handle: Any) -> dict[str, float]:
        return {"gpu.utilisation": nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100}

    @staticmethod
    def _memory(nvml: Any, handle: Any) -> dict[str, float]:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return {"gpu.memory_gib": memory.used / 2**30, "gpu.memory_share": memory.used / memory.total}

    @staticmethod
    def _power(nvml: Any, handle: Any) -> dict[str, float]:
        return {"gpu.power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1000}

    @staticmethod
    def _temperature(nvml: Any, handle: Any) -> dict[str, float]:
        return {"gpu.temperature_c": float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))}
