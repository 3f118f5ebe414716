"""A folder for the length of a campaign; the packed programs of its models go there too."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

_CACHE = "PELLUCID_CACHE"


class Scratch:
    """There until it is closed. `has_cache`: the cache of models and programs lies in it."""

    def __init__(self, name: str, *, has_cache: bool = True) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"pellucid-{name}-"))
        self._has_cache, self._before = has_cache, os.environ.get(_CACHE)
        if has_cache:
            os.environ[_CACHE] = str(self.folder / "cache")

    def tiny_model(self, name: str = "tiny", **settings: Any) -> Path:
        """A tiny model in it; see `build_tiny_model`."""
        from kit.tiny_model import build_tiny_model

        return build_tiny_model(self.folder / name, **settings)

    def close(self) -> None:
        """Removes the folder; the cache is again where it was."""
        if self._has_cache:
            if self._before is None:
                os.environ.pop(_CACHE, None)
            else:
                os.environ[_CACHE] = self._before
        shutil.rmtree(self.folder, ignore_errors=True)
