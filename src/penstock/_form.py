"""Choose between the compiled and the interpreted form of the core.

``make`` compiles the hot modules with mypyc, next to their sources; Python prefers the compiled file. That is a trap
for whoever edits a source and sees no effect. So: if any source is newer than its compiled file, or if
``PENSTOCK_INTERPRETED`` is set, every module is loaded from source.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, SourceFileLoader


def choose(init_file: str) -> str:
    """Return the form in use, after making sure that imports below this package follow it."""
    root = os.path.dirname(os.path.abspath(init_file))
    compiled, stale = _inspect(root)
    if not compiled:
        return "interpreted"
    if not stale and not os.environ.get("PENSTOCK_INTERPRETED"):
        return "compiled"

    def source_only(path: str) -> FileFinder:
        if not os.path.abspath(path).startswith(root):
            raise ImportError
        return FileFinder(path, (SourceFileLoader, SOURCE_SUFFIXES))

    sys.path_hooks.insert(0, source_only)
    for path in [p for p in sys.path_importer_cache if p.startswith(root)]:
        del sys.path_importer_cache[path]
    return "interpreted"


def _inspect(root: str) -> tuple[bool, bool]:
    """Is there a compiled module, and is any older than its source?"""
    compiled = stale = False
    for folder in (entry.path for entry in os.scandir(root) if entry.is_dir()):
        binaries = [e for e in os.scandir(folder) if e.name.endswith((".so", ".pyd"))]
        for binary in binaries:
            compiled = True
            source = os.path.join(folder, binary.name.split(".", 1)[0] + ".py")
            if not os.path.exists(source) or os.path.getmtime(source) > binary.stat().st_mtime:
                stale = True
    return compiled, stale
