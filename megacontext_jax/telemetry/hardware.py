"""What a run ran on: processor, memory, accelerators, software, source revision; peak figures for MFU."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

PROJECT_ROOT = Path(__file__).resolve().parents[2]

# Dense matrix throughput in TFLOP/s with float32 accumulation, no structured sparsity, from the vendors' data
# sheets (which mostly print the sparse figure: half of it). Each row: the words a device name must hold, the
# 16-bit figure, and whether bfloat16 runs at that rate. The first row that fits wins.
_PEAKS: tuple[tuple[str, float, bool], ...] = (
    ("gb300", 2500.0, True),
    ("gb200", 2500.0, True),
    ("b300", 2250.0, True),
    ("b200", 2250.0, True),
    ("gh200", 989.4, True),
    ("h200 nvl", 835.5, True),
    ("h200", 989.4, True),
    ("h100 nvl", 835.5, True),
    ("h100 pcie", 756.0, True),
    ("h100", 989.4, True),
    ("h800 pcie", 756.0, True),
    ("h800", 989.4, True),
    ("h20", 148.0, True),
    ("a100", 312.0, True),
    ("a800", 312.0, True),
    ("a40", 149.7, True),
    ("a30", 165.0, True),
    ("a10", 125.0, True),
    ("l40s", 362.05, True),
    ("l40", 181.05, True),
    ("l4", 121.0, True),
    ("rtx pro 6000 blackwell", 503.8, True),
    ("rtx 6000 ada", 364.2, True),
    ("rtx a6000", 154.8, True),
    ("rtx 5090", 209.5, True),
    ("rtx 5080", 112.6, True),
    ("rtx 4090", 165.2, True),
    ("rtx 4080 super", 104.4, True),
    ("rtx 4080", 97.5, True),
    ("rtx 3090 ti", 80.0, True),
    ("rtx 3090", 71.0, True),
    ("v100s", 130.0, False),
    ("v100 pcie", 112.0, False),
    ("v100", 125.0, False),
    ("t4", 65.0, False),
    ("instinct mi300x", 1307.4, True),
)
# Cut-down relatives and slices of these chips share their names but not their figures.
_OTHER_CHIPS = {"laptop", "mobile", "mig", "d", "max"}


def peak_flops(device_kind: str, dtype: Any = "bfloat16") -> float | None:
    """Dense matrix peak of one device in FLOP/s, or None where it is unknown (CPUs always; then MFU is n/a).

    Args:
        device_kind: JAX's `device.device_kind` or the name `nvidia-smi` shows.
        dtype: the type the matrix products run in, as a string or a numpy/JAX dtype. Only the 16-bit types
            have a figure: what a float32 product costs depends on the precision it is allowed.
    """
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    if name not in ("bfloat16", "float16"):
        return None
    words = _words(device_kind)
    if words & _OTHER_CHIPS:
        return None
    for key, tera, bfloat16 in _PEAKS:
        if set(key.split()) <= words:
            return tera * 1e12 if bfloat16 or name == "float16" else None
    return None


def _words(device_kind: str) -> set[str]:
    words = set(re.findall(r"[a-z0-9]+", device_kind.lower()))
    # "A100-SXM4-80GB" and "RTX 4080 SUPER" split well; "Ti" and "PCIe" are sometimes glued to the number.
    for word in list(words):
        match = re.fullmatch(r"(\d{4})(ti|super)", word)
        if match:
            words |= set(match.groups())
    return words


def describe() -> dict[str, Any]:
    """Facts about this machine and software, without importing JAX or touching a GPU's memory.

    Keys: platform, cpu, cpu_cores, memory_bytes, gpus (list of {"name", "memory_bytes"}), python, jax, jaxlib
    and other library versions under "versions", git (see `git_state`; None outside a checkout).
    """
    return {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_cores": usable_cpus(),
        "memory_bytes": usable_memory(),
        "gpus": gpus(),
        "python": platform.python_version(),
        "versions": {
            name: _version(name)
            for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
        },
        "git": git_state(),
    }


def total_peak_flops(dtype: Any = "bfloat16") -> float | None:
    """Peak of all devices of the run together (every process), or None if one of them is unknown."""
    import jax

    peaks = [peak_flops(device.device_kind, dtype) for device in jax.devices()]
    return None if None in peaks else sum(peaks)


def gpu_profile() -> str:
    """The hardware profile of run10 that fits: h200, h100, 5090 or cpu, by the memory of the largest GPU.

    A smaller GPU than the 5090 profile needs, none at all, or JAX confined to the CPU: cpu.
    """
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return "cpu"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "cpu"
    memory = max((gpu["memory_bytes"] for gpu in gpus()), default=0)
    sizes = (("h200", 120), ("h100", 70), ("5090", 30))
    return next((name for name, gibibytes in sizes if memory >= gibibytes * 1024**3), "cpu")


def memory_bytes(device: Any = None) -> int:
    """Bytes a JAX device (the first by default) may allocate; of a CPU device the machine's usable memory.

    Raises:
        RuntimeError: an accelerator that does not report its memory.
    """
    device = _device(device)
    if device.platform == "cpu":
        return usable_memory()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise RuntimeError(f"{device.device_kind} does not report how much memory it has")
    return int(stats["bytes_limit"])


def compiled_memory(compiled) -> int:
    """Bytes per device that an ahead-of-time compiled function asks for: arguments, results, scratch, code."""
    m = compiled.memory_analysis()
    results = m.output_size_in_bytes - m.alias_size_in_bytes  # donated arguments are results too
    return m.argument_size_in_bytes + results + m.temp_size_in_bytes + m.generated_code_size_in_bytes


def peak_memory(device: Any = None) -> int:
    """Highest memory use so far in bytes: of an accelerator by its own count, of a CPU device `peak_rss`."""
    device = _device(device)
    if device.platform == "cpu":
        return peak_rss()
    return int((device.memory_stats() or {}).get("peak_bytes_in_use", 0))


def _device(device: Any) -> Any:
    if device is None:
        import jax

        device = jax.local_devices()[0]
    return device


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes."""
    # getrusage would also count what a parent held when it forked this process; the kernel's mark does not.
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def usable_memory() -> int:
    """Bytes of memory this process may use: the machine's, or less inside a container with a limit."""
    total = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(path)
        if text.isdigit():
            total = min(total, int(text))
    return total


def usable_cpus() -> int:
    """Processors this process may use, respecting its affinity and a container's quota; at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        count = min(count, max(1, round(int(quota[0]) / int(quota[1]))))
    return count


def cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    if match:
        return match[1].strip()
    if sys.platform == "darwin":
        name = _run(["sysctl", "-n", "machdep.cpu.brand_string"])
        if name:
            return name
    return platform.processor() or platform.machine()


def gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs as `nvidia-smi` lists them; empty where there is none."""
    text = _run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"])
    found = []
    for line in (text or "").splitlines():
        name, _, mebibytes = line.rpartition(",")
        if name and mebibytes.strip().isdigit():
            found.append({"name": name.strip(), "memory_bytes": int(mebibytes) * 1024**2})
    return found


def git_state(root: Path = PROJECT_ROOT) -> dict[str, Any] | None:
    """{"commit", "branch", "dirty", "message"} of the checkout at `root`; None if it is not one."""
    top = _run(["git", "-C", str(root), "rev-parse", "--show-toplevel"])
    if not top or Path(top).resolve() != Path(root).resolve():
        return None  # no repository, or a foreign one around an installed package
    commit = _run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return None
    return {
        "commit": commit,
        "branch": _run(["git", "-C", str(root), "rev-parse", "--abbrev-ref", "HEAD"]) or "",
        "dirty": bool(_run(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])),
        "message": _run(["git", "-C", str(root), "log", "-1", "--format=%s"]) or "",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _run(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
