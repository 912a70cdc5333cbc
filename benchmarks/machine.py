"""Facts that a figure is worth nothing without: processor, versions, commit. No host name, no paths."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from .cores import usable_cores

DISTRIBUTIONS = (
    "sr-sdk", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "torch",
    "opencv-python-headless", "opencv-python", "spandrel", "pyvips", "uvicorn", "cuda-python", "pycuda",
)  # fmt: skip
BF16_FLAGS = ("avx512_bf16", "amx_bf16")
ROOT = Path(__file__).parent.parent


def machine_facts() -> dict[str, Any]:
    """Describe the machine and the software as JSON values; what is not known is None."""
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cpu_bf16": [flag for flag in BF16_FLAGS if flag in _cpuinfo("flags").split()],
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpus": _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
    }


def _cpuinfo(key: str) -> str:
    """Look up the first core's entry in Linux' list, "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Name the commit of the source tree, "-dirty" behind it if files differ; None for an installed package."""
    if not (ROOT / ".git").exists():
        return None
    git = ("git", "--no-optional-locks", "-C", str(ROOT))
    return _output(*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or None


def _output(*command: str) -> str:
    """Run a command and give what it prints; "" if it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
