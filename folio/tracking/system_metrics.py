"""CPU, memory, disk, network and GPU usage, measured by MLflow's monitors."""

import contextlib
import time

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor


class SystemMetrics:
    INTERVAL = 5.0  # minimum number of seconds between readings

    def __init__(self) -> None:
        self._monitors: list[BaseMetricsMonitor] = []
        for monitor in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            with contextlib.suppress(Exception):  # not available on this machine
                self._monitors.append(monitor())
        self._last_reading = time.monotonic()

    def read(self) -> dict[str, float]:
        """Return the metrics under the names that MLflow's UI expects, or {} if the last reading
        was less than INTERVAL ago."""
        if time.monotonic() - self._last_reading < self.INTERVAL:
            return {}
        self._last_reading = time.monotonic()
        metrics: dict[str, float] = {}
        for monitor in self._monitors:
            with contextlib.suppress(Exception):
                monitor.collect_metrics()
            collected = monitor.aggregate_metrics()
            metrics |= {f"system/{name}": value for name, value in collected.items()}
            monitor.clear_metrics()
        return metrics
