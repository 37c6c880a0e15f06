"""`import qoq` makes transformers know the format, and imports neither transformers nor torch.

transformers keeps quantizers in a registry, `transformers.quantizers.auto`; it has no entry points and no lazy entries.
That module is imported (with torch, seconds) when a user first needs a model, and every way to load one goes through
it. So a finder on `sys.meta_path` waits for exactly this module and registers when it has run; if it has run before,
registration is at once. The finder answers for no other name and stays, so that a failed import can be repeated.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Register now or when transformers' registry is imported; a second call changes nothing."""
    if REGISTRY in sys.modules:
        _register()
    elif _AfterRegistry not in sys.meta_path:
        sys.meta_path.insert(0, _AfterRegistry)  # type: ignore[arg-type]  # a class serves as finder


def _register() -> None:
    from qoq.transformers_plugin import register

    register()


class _AfterRegistry:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # the spec's own loader
        return spec
