"""Fine-tuning: the labels alone. What every distilled student is compared with."""

from torch import Tensor

from kdtrain.tasks.classification.objective import Batch, Method, label_cross_entropy


class FineTuning(Method):
    """`ce_weight * CE`; needs no teacher."""

    needs_teacher = False

    def terms(self, logits: Tensor, states: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        """ce."""
        return {"ce": label_cross_entropy(logits, batch.labels)}
