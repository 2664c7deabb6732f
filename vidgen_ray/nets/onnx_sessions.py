"""Open ONNX models with onnxruntime on the requested device."""

import os
from pathlib import Path
from typing import Any

from vidgen_ray.errors import SetupError

ERRORS_ONLY = 3


def import_onnxruntime() -> Any:
    """Import onnxruntime with telemetry turned off. Raises SetupError if the installation is damaged."""
    # onnxruntime reads this variable when it is first imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    if not hasattr(onnxruntime, "InferenceSession"):
        raise SetupError(
            "onnxruntime-gpu is damaged, because `onnxruntime` was also installed or removed; "
            "run `pip install --no-deps --force-reinstall onnxruntime-gpu`"
        )
    return onnxruntime


def session_arguments(device: str, threads: int | None) -> dict[str, Any]:
    """Return the InferenceSession arguments `providers` and `sess_options`. `threads=None` uses all cores."""
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads or 0
    return {"providers": list(dict.fromkeys([_provider(device), "CPUExecutionProvider"])), "sess_options": options}


def open_session(model: Path | bytes, device: str, threads: int | None, label: str) -> Any:
    """Open an InferenceSession on `device` for an ONNX file or its bytes. `label` names the model in a SetupError."""
    onnxruntime = import_onnxruntime()
    if device.startswith("cuda") and hasattr(onnxruntime, "preload_dlls"):
        # onnxruntime does not search torch's wheels, which contain the CUDA libraries.
        onnxruntime.preload_dlls()
    try:
        source = model if isinstance(model, bytes) else str(model)
        session = onnxruntime.InferenceSession(source, **session_arguments(device, threads))
    # onnxruntime raises many exception types for damaged files.
    except Exception as error:
        raise SetupError(f"{label}: cannot be loaded, use an intact ONNX file: {error}") from error
    require_provider(session, device, label)
    return session


def require_provider(session: Any, device: str, label: str) -> None:
    """Raise SetupError if onnxruntime silently fell back to the CPU."""
    used, required = session.get_providers()[0], _provider(device)
    if used != required:
        raise SetupError(f"{label} runs on {used}, the profile asks for {required}; check onnxruntime-gpu")


def _provider(device: str) -> str:
    return "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
