"""A cache of a test's own, in which what a start made is kept for the next."""

import shutil

from eepass.codegen.cpu.building import build_kernels


def keep_in(folder, patch):
    """Until ``patch`` is undone, the cache is in ``folder``; it has the kernels that are built."""
    library = build_kernels()
    patch.setenv("XDG_CACHE_HOME", str(folder))
    patch.setattr("eepass.kept.splits.KEPT", "kept")
    (folder / "eepass").mkdir()
    shutil.copy(library, folder / "eepass")
    return folder / "eepass"
