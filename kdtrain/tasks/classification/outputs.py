"""How a classifier and its stored teacher become outputs: logits of every row, states of sentences or of tokens."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdkernels import TeacherLogits
from kdtrain.models.loading import sentence_states
from kdtrain.outputs import Batch, Layers, LogitOutputs, TeacherOutputs


class Classifiers:
    """The models of a classification run. Teachers are stored: they read other tokens than the student."""

    teachers: Mapping[str, Any] = {}
    dropout = True

    def student_outputs(self, student: nn.Module, batch: Batch, layers: Layers) -> LogitOutputs:
        """The student on one micro-batch; the texts of a pair follow each other in its states."""
        output = student(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            output_hidden_states=bool(layers.all_states),
        )
        states: dict[int, Tensor] = {}
        if layers.states:
            found = sentence_states(output, layers.states)
            states = {layer: found[:, i].float() for i, layer in enumerate(layers.states)}
        assert batch.attention_mask is not None
        return LogitOutputs(
            logits=output.logits.float(),
            labels=batch.labels,
            token_weight=batch.token_weight,
            states=states,
            texts=texts_of(batch),
            tokens={layer: output.hidden_states[layer].float() for layer in layers.tokens},
            token_mask=batch.attention_mask.flatten(0, -2).bool(),
        )

    def teacher_outputs(self, name: str, batch: Batch, layers: Layers) -> TeacherOutputs:
        """The stored outputs of a teacher; `states` holds `layers.all_states` in this order."""
        stored = batch.stored[name]
        found, mask = stored.get("states"), stored.get("mask")
        places = {layer: i for i, layer in enumerate(layers.all_states)}
        states: dict[int, Tensor] = {}
        tokens: dict[int, Tensor] = {}
        if found is not None:
            first = found if mask is None else found[:, :, 0]
            states = {layer: first[:, places[layer]] for layer in layers.states}
            tokens = {layer: found[:, places[layer]] for layer in layers.tokens}
        return TeacherOutputs(
            target=TeacherLogits(stored["logits"]),
            states=states,
            texts=texts_of(batch),
            tokens=tokens,
            token_mask=mask,
        )

    def measure(self, student: nn.Module, batch: Batch) -> Tensor:
        """(B, C) float32: the logits."""
        return self.student_outputs(student, batch, Layers()).logits

    def count(self, batch: Batch) -> int:
        """Rows, labelled or not."""
        return len(batch.labels)


def texts_of(batch: Batch) -> int:
    """Texts of a row: 1, or 2 for pairs."""
    return batch.input_ids.shape[1] if batch.input_ids.ndim == 3 else 1
