"""eepass: speculative early exit for any decoder PyTorch can trace."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from eepass.artifact import load_artifact
    from eepass.benchmarking import bench
    from eepass.config import ExitConfig
    from eepass.doctoring import doctor
    from eepass.errors import InputError
    from eepass.generation import generate
    from eepass.models import load
    from eepass.offline import write_folder
    from eepass.onnx_export import export_onnx
    from eepass.preparing import prepare
    from eepass.probing import probe
    from eepass.serving import serve
    from eepass.training.door import train
    from eepass.training.recalibration import calibrate
    from eepass.transformation import transform

_HOMES = {
    "ExitConfig": "eepass.config",
    "InputError": "eepass.errors",
    "bench": "eepass.benchmarking",
    "calibrate": "eepass.training.recalibration",
    "doctor": "eepass.doctoring",
    "export_onnx": "eepass.onnx_export",
    "generate": "eepass.generation",
    "load": "eepass.models",
    "load_artifact": "eepass.artifact",
    "prepare": "eepass.preparing",
    "probe": "eepass.probing",
    "serve": "eepass.serving",
    "train": "eepass.training.door",
    "transform": "eepass.transformation",
    "write_folder": "eepass.offline",
}

__all__ = [
    "ExitConfig",
    "InputError",
    "bench",
    "calibrate",
    "doctor",
    "export_onnx",
    "generate",
    "load",
    "load_artifact",
    "prepare",
    "probe",
    "serve",
    "train",
    "transform",
    "write_folder",
]


def __getattr__(name: str) -> Any:
    # the stages import eepass.plan: importing them here would re-enter a half-made package
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'eepass' has no attribute {name!r}")
