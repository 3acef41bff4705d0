"""ATKD (Zhong et al., ACL 2024, arXiv 2402.11890): easy and hard tokens are taught in different ways."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from kdkernels import Decoupled
from kdtrain.methods.base import Method, Needs, Step
from kdtrain.methods.kd import Temperature, Weight
from kdtrain.outputs import IGNORED, Batch, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import MethodOptions, Number


class AdaptiveTeaching(Method):
    """`kd_weight * (easy_share * mean_easy(DKD) + (1 - easy_share) * mean_hard(TKD + DKD)) + ce_weight * CE`.

    TKD is the divergence of the probabilities of target and non-target classes, DKD that among the non-target classes
    (`kdkernels.Decoupled`). The uncertainty of a token is 1 - p_t(label); tokens at or above the median of the whole batch
    are hard. Equations 4 to 6 of the paper, whose lambda is easy_share = 0.2. The weight 1 - p_t(label), which DKD has in a
    KL, is dropped.
    """

    # The median is one of tokens, and the target one with a label.
    tasks = frozenset({"code_lm", "classification"})

    class Options(MethodOptions):
        """Easy and hard tokens, told apart by the teacher's uncertainty."""

        name: Literal["atkd"] = "atkd"
        temperature: Temperature = Field(
            default=1.0,
            description="T that softens both sides; value and gradient are multiplied by T squared",
        )
        easy_share: Annotated[Number, Field(ge=0, le=1)] = Field(
            default=0.2, description="weight of the easy tokens; the hard ones have the remaining weight"
        )
        kd_weight: Weight = Field(default=1.0, description="weight of the divergence")
        ce_weight: Weight = Field(default=0.0, description="weight of the cross entropy with the labels")

    def needs(self) -> Needs:
        """The uncertainty of the whole batch."""
        return Needs(whole_batch=True)

    def weights(self, step: Step) -> dict[str, float]:
        """kd and ce."""
        return {"kd": self.options.kd_weight, "ce": self.options.ce_weight}

    def share(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor]:
        """The teacher's uncertainty at every counted position."""
        (teacher,) = teachers.values()
        counted = (student.labels != IGNORED).flatten()
        return {"uncertainty": uncertainty(student, teacher).flatten()[counted]}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd and ce."""
        (teacher,) = teachers.values()
        everywhere = batch.whole["uncertainty"].values
        threshold = everywhere.median()
        all_hard = int((everywhere >= threshold).sum())
        all_easy = len(everywhere) - all_hard
        hard = uncertainty(student, teacher) >= threshold
        of_hard = (1 - self.options.easy_share) * len(everywhere) / max(all_hard, 1)
        of_easy = self.options.easy_share * len(everywhere) / max(all_easy, 1)
        target = hard * of_hard
        divergence = Decoupled(target=target, non_target=target + ~hard * of_easy)
        return {
            "kd": student.divergence(teacher, divergence, temperature=self.options.temperature),
            "ce": student.cross_entropy(),
        }


def uncertainty(student: Outputs, teacher: TeacherOutputs) -> Tensor:
    """1 - p_t(label) at every position."""
    return 1 - student.statistics(teacher).teacher_target_prob
