"""Public names that are imported when they are first used.

Importing torch, transformers and transformer_lens takes seconds; a package that only re-exports must not pay for it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy(
    package: str, names: Mapping[str, str], modules: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Build the module-level `__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: The package's `__name__`.
        names: Public name to the submodule that defines it.
        modules: Submodules that are public themselves.
    """

    def getattr_(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{names[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names, *modules})

    return getattr_, dir_
