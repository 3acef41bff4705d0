"""Our architectures in transformers' Auto classes, without loading transformers before somebody uses it.

`import kdtrain` has to make `AutoModelForSequenceClassification.from_pretrained` know a BiGRU student, yet a wrong key
in a recipe should be told at once and not after the five seconds that transformers and torch take to load. So the
registration waits for the Auto classes to be imported, or happens now if they have been.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

OURS = {
    "transformers.models.auto.configuration_auto": (
        "kdtrain.models.bigru_config",
        "kdtrain.models.pair_config",
    ),
    "transformers.models.auto.modeling_auto": ("kdtrain.models.bigru", "kdtrain.models.pairs"),
}
"""Module with Auto classes, and the modules of ours that add to them when they are imported."""


def register_models() -> None:
    """Register with the Auto classes that are loaded, and with the others as soon as they are."""
    for theirs, ours in OURS.items():
        if theirs in sys.modules:
            _import_all(ours)
        else:
            sys.meta_path.insert(0, _Waiting(theirs, ours))


class _Waiting(MetaPathFinder):
    """Finds one module, once, and lets its own loader do the work."""

    def __init__(self, theirs: str, ours: tuple[str, ...]) -> None:
        self.theirs, self.ours = theirs, ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self.ours)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader, ours: tuple[str, ...]) -> None:
        self.loader, self.ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _import_all(self.ours)


def _import_all(names: tuple[str, ...]) -> None:
    for name in names:
        importlib.import_module(name)
