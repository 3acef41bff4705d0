"""The checks of a classification run, in one table."""

from kdtrain.doctor import Finding, data_checks, examine, method_checks, refusal, teacher_checks
from kdtrain.doctor.subject import Subject
from kdtrain.errors import KdtrainError
from kdtrain.recipe import ClassificationRecipe
from kdtrain.tasks.base import SharedInputs

CHECKS = (
    method_checks.what_is_trained,
    data_checks.classes_are_there,
    data_checks.test_rows_are_new,
    data_checks.rows_are_cut,
    data_checks.focus_is_there,
    teacher_checks.teacher_knows_the_task,
    teacher_checks.teacher_answers_alike,
    method_checks.loss_ignores_padding,
    method_checks.correlation_has_a_gradient,
    method_checks.batch_is_large_enough,
    method_checks.gradient_is_clipped,
    method_checks.soft_labels_weigh_something,
    method_checks.layers_meet,
    method_checks.tokens_meet,
    data_checks.best_is_what_counts,
    teacher_checks.cache_fits,
)
"""In the order in which their findings are printed."""


def examine_recipe(recipe: ClassificationRecipe, shared: SharedInputs | None = None) -> list[Finding]:
    """All findings of one run; without data, or without what its method needs, only why.

    `shared` of earlier examinations save opening things again.
    """
    subject = Subject(recipe, shared or SharedInputs())
    try:
        _ = subject.data, subject.teacher, subject.methods
    except KdtrainError as reason:
        return [refusal(reason)]
    return list(examine(subject, CHECKS))
