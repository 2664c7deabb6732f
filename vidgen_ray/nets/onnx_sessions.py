"""Opens ONNX models on the device that was asked for, or says why that cannot be. Knows no model."""

import os
from pathlib import Path
from typing import Any

from vidgen_ray.errors import SetupError

ERRORS_ONLY = 3


def import_onnxruntime() -> Any:
    """The module onnxruntime, which here reports nothing of itself to anyone. SetupError where it is damaged."""
    # Read when the module is imported for the first time.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    if not hasattr(onnxruntime, "InferenceSession"):
        raise SetupError(
            "onnxruntime-gpu is damaged, as it is when `onnxruntime` was installed or removed beside it; "
            "run `pip install --no-deps --force-reinstall onnxruntime-gpu`"
        )
    return onnxruntime


def session_arguments(device: str, threads: int | None) -> dict[str, Any]:
    """What an InferenceSession is made with: `providers` and `sess_options`. No number of threads means all cores."""
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads or 0
    return {"providers": list(dict.fromkeys([_provider(device), "CPUExecutionProvider"])), "sess_options": options}


def open_session(model: Path | bytes, device: str, threads: int | None, what: str) -> Any:
    """An InferenceSession of a file, or of its bytes, that runs on `device`. `what` names it in a SetupError."""
    onnxruntime = import_onnxruntime()
    if device.startswith("cuda") and hasattr(onnxruntime, "preload_dlls"):
        # CUDA's libraries are where torch's wheels put them, which onnxruntime alone does not search.
        onnxruntime.preload_dlls()
    try:
        source = model if isinstance(model, bytes) else str(model)
        session = onnxruntime.InferenceSession(source, **session_arguments(device, threads))
    # Damaged files raise whatever onnxruntime stumbles over.
    except Exception as error:
        raise SetupError(f"{what}: cannot be loaded, give an intact ONNX file: {error}") from error
    require_provider(session, device, what)
    return session


def require_provider(session: Any, device: str, what: str) -> None:
    """SetupError where onnxruntime fell back to the CPU, which it does without a word."""
    used, wanted = session.get_providers()[0], _provider(device)
    if used != wanted:
        raise SetupError(f"{what} runs on {used}, the profile asks for {wanted}; check onnxruntime-gpu")


def _provider(device: str) -> str:
    return "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
