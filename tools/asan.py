"""Run the tests of the C++ kernels under AddressSanitizer: ``make asan``.

The kernels are built by a compiler that adds the sanitiser, into a cache of their own.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from eepass.codegen.cpu.building import find_compiler

ROOT = Path(__file__).parent.parent
# loaded first, since python is built without the sanitiser; it looks for the C++ library's way to
# throw when it is loaded itself
PRELOADED = ("libasan.so", "libstdc++.so.6")
FLAGS = "-fsanitize=address -g1 -fno-omit-frame-pointer"


def _library(compiler: str, name: str) -> str:
    command = [compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    compiler = find_compiler()
    preloaded = " ".join(_library(compiler, name) for name in PRELOADED)
    tests = sorted(map(str, (ROOT / "tests" / "codegen").glob("test_*rows.py")))
    with tempfile.TemporaryDirectory() as folder:
        wrapper = Path(folder) / "compiler"
        wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(compiler)} {FLAGS} "$@"\n')
        wrapper.chmod(0o755)
        own = {"CXX": str(wrapper), "XDG_CACHE_HOME": folder}
        build = "from eepass.codegen.cpu.building import build_kernels; print(build_kernels(True))"
        subprocess.run(
            [sys.executable, "-c", build], env={**os.environ, **own}, check=True, cwd=ROOT
        )
        # python frees little at its end
        own |= {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0"}
        run = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *tests]
        return subprocess.run(run, env={**os.environ, **own}, check=False, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
