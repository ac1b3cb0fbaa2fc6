"""A CUDA device that is not there: enough of one for autograd to run over fake tensors on a CPU build of torch.

torch asks for its accelerator once, when it is imported. So the library is loaded before torch is, and the process that
does so is good for tracing only: `python -m lora_jobs.training.trace`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from lora_jobs.errors import RunError

NAME = "lora_jobs_fake_cuda"
SOURCE = Path(__file__).with_name("fake_cuda.cpp")
_RESTARTED = "LORA_JOBS_TRACE_RESTARTED"


def find_cache() -> Path:
    """Directory of the built library and of earlier traces: $XDG_CACHE_HOME/lora-jobs, made when it is missing."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-jobs"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root


def library_path() -> Path:
    """Where the library for this torch and this Python is."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stamp = f"{SOURCE.stat().st_size}-{SOURCE.stat().st_mtime_ns:x}"
    return find_cache() / f"fake_cuda-{version('torch')}-{python}-{stamp}" / f"{NAME}.so"


def load_shim() -> None:
    """Load the library, before torch; build it first where it is missing, which restarts this process.

    Errors: RunError where torch is imported already or not installed, or no C++ compiler is.
    """
    if "torch" in sys.modules:
        raise RunError("a trace needs a process of its own: torch is imported already")
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        raise RunError(
            f"torch is not installed for {sys.executable}",
            hint="run the trace in the job's environment: pip install '.[train]' there; without it use check alone",
        )
    library = library_path()
    if not library.is_file():
        _build(library)
        if os.environ.get(_RESTARTED):
            raise RunError(f"{library} was built, and is not there")
        os.execve(sys.executable, sys.orig_argv, {**os.environ, _RESTARTED: "1"})  # noqa: S606
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(Path(torch.origin).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    shim = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import_module("torch")
    shim.lora_jobs_install_guard()


def _build(library: Path) -> None:
    from torch.utils import cpp_extension

    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        cpp_extension.load(
            NAME, [str(SOURCE)], build_directory=str(library.parent), is_python_module=False, extra_cflags=["-O1"]
        )
    except (RuntimeError, OSError) as error:
        raise RunError(
            f"the library that stands for a GPU does not build: {str(error).strip().splitlines()[0][:300]}",
            hint="--exact needs a C++ compiler (g++) and ninja; without them use check alone",
        ) from error
