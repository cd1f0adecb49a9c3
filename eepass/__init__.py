"""eepass: speculative early exit for any decoder PyTorch can trace."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from eepass.benchmark.bench import bench
    from eepass.benchmark.probe import probe
    from eepass.bundle.write import write_folder
    from eepass.checkpoints.artifact import load_artifact
    from eepass.checkpoints.fitting_artifact import drafts_alone
    from eepass.config import ExitConfig
    from eepass.doctoring import doctor
    from eepass.drafts.import_head import import_draft
    from eepass.drafts.write_head import export_draft
    from eepass.errors import InputError
    from eepass.exactness.certificate import verify
    from eepass.hf.generation import generate, prepare
    from eepass.loading import load
    from eepass.model import transform
    from eepass.onnx.export import export_onnx
    from eepass.server.running import serve
    from eepass.training.recalibrate import calibrate
    from eepass.training.train import train

_HOMES = {
    "ExitConfig": "eepass.config",
    "InputError": "eepass.errors",
    "bench": "eepass.benchmark.bench",
    "calibrate": "eepass.training.recalibrate",
    "doctor": "eepass.doctoring",
    "drafts_alone": "eepass.checkpoints.fitting_artifact",
    "export_draft": "eepass.drafts.write_head",
    "export_onnx": "eepass.onnx.export",
    "generate": "eepass.hf.generation",
    "import_draft": "eepass.drafts.import_head",
    "load": "eepass.loading",
    "load_artifact": "eepass.checkpoints.artifact",
    "prepare": "eepass.hf.generation",
    "probe": "eepass.benchmark.probe",
    "serve": "eepass.server.running",
    "train": "eepass.training.train",
    "transform": "eepass.model",
    "verify": "eepass.exactness.certificate",
    "write_folder": "eepass.bundle.write",
}

__all__ = [
    "ExitConfig",
    "InputError",
    "bench",
    "calibrate",
    "doctor",
    "drafts_alone",
    "export_draft",
    "export_onnx",
    "generate",
    "import_draft",
    "load",
    "load_artifact",
    "prepare",
    "probe",
    "serve",
    "train",
    "transform",
    "verify",
    "write_folder",
]


def __getattr__(name: str) -> Any:
    # the stages import eepass.plan: importing them here would re-enter a half-made package
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'eepass' has no attribute {name!r}")
