"""The methods, one file each; a new one is a file and a row in this table."""

from collections.abc import Mapping, Sequence
from typing import Any

from kdtrain.errors import KdtrainError
from kdtrain.methods.at import AttentionTransfer
from kdtrain.methods.atkd import AdaptiveTeaching
from kdtrain.methods.base import Method, Step, has_hook
from kdtrain.methods.ckd import ContextualDistillation
from kdtrain.methods.comparative import ComparativeDistillation
from kdtrain.methods.continuation import AnnealingDistillation, ContinuationDistillation
from kdtrain.methods.dist import CorrelationDistillation
from kdtrain.methods.distillm import SkewedDistillation
from kdtrain.methods.dml import MutualLearning
from kdtrain.methods.dpk import DynamicPrior
from kdtrain.methods.dynamic_selection import DynamicSelection
from kdtrain.methods.dynamic_teachers import DynamicTeachers
from kdtrain.methods.dynamic_weights import DynamicWeights
from kdtrain.methods.fitnets import Hints
from kdtrain.methods.fsp import SolutionFlow
from kdtrain.methods.ft import FineTuning
from kdtrain.methods.gkd import GeneralizedDistillation
from kdtrain.methods.kd import LogitDistillation
from kdtrain.methods.kd_features import FeatureDistillation
from kdtrain.methods.mokd import MultiObjective
from kdtrain.methods.one import NativeEnsemble
from kdtrain.methods.pkd import PatientDistillation
from kdtrain.methods.pkt import ProbabilisticTransfer
from kdtrain.methods.relations import RelationDistillation
from kdtrain.methods.rkd import RelationalDistillation
from kdtrain.methods.routed import RoutedTeachers
from kdtrain.methods.sp import SimilarityPreserving
from kdtrain.methods.speculative_kd import SpeculativeDistillation
from kdtrain.models.loading import Shape
from kdtrain.recipe.base import MethodOptions, parse_method

METHODS: dict[str, type[Method]] = {
    "ft": FineTuning,
    "kd": LogitDistillation,
    "kd_features": FeatureDistillation,
    "dist": CorrelationDistillation,
    "pkd": PatientDistillation,
    "ckd": ContextualDistillation,
    "relations": RelationDistillation,
    "fitnets": Hints,
    "rkd": RelationalDistillation,
    "sp": SimilarityPreserving,
    "pkt": ProbabilisticTransfer,
    "comparative": ComparativeDistillation,
    "continuation": ContinuationDistillation,
    "annealing": AnnealingDistillation,
    "dynamic_selection": DynamicSelection,
    "dynamic_weights": DynamicWeights,
    "atkd": AdaptiveTeaching,
    "mokd": MultiObjective,
    "routed": RoutedTeachers,
    "dynamic_teachers": DynamicTeachers,
    "at": AttentionTransfer,
    "fsp": SolutionFlow,
    "dml": MutualLearning,
    "one": NativeEnsemble,
    "dpk": DynamicPrior,
    "gkd": GeneralizedDistillation,
    "distillm": SkewedDistillation,
    "speculative_kd": SpeculativeDistillation,
}

OPTIONS: dict[str, type[MethodOptions]] = {name: kind.Options for name, kind in METHODS.items()}
"""The recipe's `method:` section by `name`."""


def method_options(name: str, **fields: Any) -> MethodOptions:
    """Options of one method, as `{name: ..., field: ...}` in a recipe.

    Raises:
        KdtrainError: no such method, or wrong options.
    """
    return parse_method({"name": name, **fields}, OPTIONS)


def method_class(name: str) -> type[Method]:
    """The class of a recipe's `method.name`."""
    if name not in METHODS:
        raise KdtrainError(f"method.name must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def check_methods(options: Sequence[MethodOptions], task: str) -> None:
    """Refuse what can be told from a recipe alone, before anything is loaded.

    Raises:
        KdtrainError: a method that the task cannot serve, two that make batches, or one that combines gradients beside others.
    """
    kinds = [method_class(one.name) for one in options]
    for one, kind in zip(options, kinds, strict=True):
        if task not in kind.tasks:
            raise KdtrainError(
                f"method {one.name} is for task {' or '.join(sorted(kind.tasks))}, got task: {task}; choose another method.name"
            )
    for hook, verb in (("make_batch", "make batches"), ("select", "select rows")):
        names = [one.name for one, kind in zip(options, kinds, strict=True) if has_hook(kind, hook)]
        if len(names) > 1:
            raise KdtrainError(
                f"the methods {' and '.join(names)} both {verb}, and only one may; leave one of them out"
            )
    combining = [one.name for one, kind in zip(options, kinds, strict=True) if kind.gradient_groups]
    if combining and len(kinds) > 1:
        raise KdtrainError(
            f"method {combining[0]} combines the gradients of its own terms and cannot be used beside another method; leave "
            f"{next(one.name for one in options if one.name != combining[0] or len(combining) > 1)} out"
        )


def build_methods(
    options: Sequence[MethodOptions], task: str, student: Shape, teachers: Mapping[str, Shape]
) -> list[Method]:
    """The methods of a recipe, told the shapes of the models.

    Raises:
        KdtrainError: as `check_methods`; or a method reads a teacher that the recipe does not name.
    """
    check_methods(options, task)
    methods = []
    for one in options:
        kind = method_class(one.name)
        names = kind.teachers_of(one)
        missing = [name for name in names if name not in teachers]
        if missing:
            raise KdtrainError(
                f"method {one.name} needs a teacher; set {missing[0]}.path to a folder or hub id"
            )
        methods.append(kind(one, student, {name: teachers[name] for name in names}))
        check_weights(methods[-1])
    return methods


def check_weights(method: Method) -> None:
    """Refuse a method whose terms weigh nothing in the first step, the last and the one between."""
    if any(any(method.weights(Step(number, 3)).values()) for number in range(3)):
        return
    fields = [f"method.{name}" for name in type(method.options).model_fields if name.endswith("_weight")]
    raise KdtrainError(
        f"every weight of method {method.options.name} is 0 in every step, so nothing would be learned; set "
        f"{' or '.join(name for name in fields if not name.startswith('method.last_'))} above 0"
    )
