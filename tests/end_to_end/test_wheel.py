"""The wheel: everything is in it, and it runs where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from models import random_artifact, tiny_model, tiny_tokenizer

import eepass

ROOT = Path(__file__).parents[2]
SKIPPED = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")
SAID = """
import json, eepass
loaded = eepass.load("model", "fp32")
model = eepass.transform(loaded.model, loaded.artifact, max_length=64)
print(json.dumps([eepass.__file__, model.generate([[5, 9, 44]], 6)[0].tolist()]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    path = tmp_path_factory.mktemp("wheel")
    # building leaves folders beside what it builds
    shutil.copytree(ROOT, path / "source", symlinks=True, ignore=SKIPPED)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run([*command, "--wheel-dir", str(path), str(path / "source")], path)
    (found,) = path.glob("*.whl")
    return found


def run(command, folder, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**clean, **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_every_file_is_in_the_wheel(wheel):
    assert wheel.name.startswith(f"eepass-{eepass.__version__}-")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = files_below(ROOT / "eepass")
    assert len(wanted) > 100 and {"eepass/data/smollm2/draft.safetensors"} <= wanted
    assert not wanted - inside
    # nothing under a name that is not ours
    assert {name.split("/")[0] for name in inside} <= {
        "eepass", f"eepass-{eepass.__version__}.dist-info"
    }  # fmt: skip


def files_below(folder):
    return {
        str((Path(path) / name).relative_to(ROOT))
        for path, _, names in os.walk(folder, followlinks=True)
        for name in names
        if "__pycache__" not in path
    }


@pytest.mark.slow
def test_it_runs_outside_the_checkout(wheel, tmp_path):
    run([sys.executable, "-m", "venv", "--without-pip", "clean"], tmp_path)
    python = tmp_path / "clean" / "bin" / "python"
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path)
    # what eepass needs is there already; eepass is not
    (Path(site.strip()) / "needs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index"]
    run([*pip, str(wheel)], tmp_path)
    eepass_command = tmp_path / "clean" / "bin" / "eepass"
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    random_artifact(model).save(tmp_path / "model" / "eepass")
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    found = json.loads(run([eepass_command, "doctor", "--json"], tmp_path, **cache))
    assert found["ready"] and found["eepass"] == eepass.__version__
    assert found["uses"]["operators"]["use"] == "C++ kernels" and found["smollm2"]["artifact"]
    assert found["extras"]["serve"]["for"]

    where, ids = json.loads(run([python, "-c", SAID], tmp_path, **cache).splitlines()[-1])
    assert Path(where).is_relative_to(tmp_path / "clean")
    assert len(ids) == 9 and ids == eepass.transform(model, max_length=64).generate(
        [[5, 9, 44]], 6
    )[0].tolist()  # fmt: skip
    said = run([eepass_command, "generate", "model", "--prompt", "hello", "--dtype", "fp32",
                "--max-new-tokens", "4", "--json", "out.json"], tmp_path, **cache)  # fmt: skip
    assert said.strip() and len(json.loads((tmp_path / "out.json").read_text())["ids"]) <= 4
