"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def take_place(scratch: Path, target: Path) -> None:
    """Give the finished folder its name; what was there goes only then."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(scratch, target)
    shutil.rmtree(old, ignore_errors=True)
