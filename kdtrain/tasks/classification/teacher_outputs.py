"""What a classifier says of rows, computed now or read from the teacher store."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdtrain.errors import KdtrainError
from kdtrain.models.loading import sentence_states, sequence_states, shape_of
from kdtrain.models.teachers import Teacher
from kdtrain.tasks.classification.pairs import PairRows, Rows, tokenize_split
from kdtrain.tasks.classification.rows import TextRows
from kdtrain.teacher_cache.build import Prepare, Work, build
from kdtrain.teacher_cache.shard import Ragged, keys_of
from kdtrain.teacher_cache.store import Element, Store, StoreSpec


@dataclass(frozen=True)
class Outputs:
    """The teacher's outputs for some rows, on the host."""

    logits: Tensor
    """(B, C) float32"""
    states: Tensor | None = None
    """(B, P, L, D) float32, or (tokens, L, D) with `lengths`"""
    lengths: Tensor | None = None
    """(B, P) int64"""


@torch.inference_mode()
def teacher_outputs(
    teacher: Teacher,
    rows: Rows,
    index: Tensor,
    layers: tuple[int, ...],
    device: torch.device,
    *,
    sequences: bool = False,
) -> Outputs:
    """Class logits of the given rows and, with `layers`, states of first tokens or of all.

    States of all tokens leave out the inserted ones, which the student does not have.
    """
    input_ids, mask = rows.batch(index)
    output = teacher.model(
        input_ids=input_ids.to(device), attention_mask=mask.to(device), output_hidden_states=bool(layers)
    )
    logits = teacher.class_logits(output.logits.float()).cpu()
    if not bool(logits.isfinite().all()):
        raise KdtrainError(
            f"the teacher {teacher.path} computed logits that are NaN or infinite; check its weights, precision and attention mask"
        )
    if not layers:
        return Outputs(logits)
    if not sequences:
        states = sentence_states(output, layers).float().cpu()
        return Outputs(logits, states.unflatten(0, (len(index), -1)))
    kept = mask.flatten(0, -2).bool()
    # Inserted tokens would shift all others against the student's.
    kept[:, 1 : 1 + len(teacher.insert)] = False
    states = sequence_states(output, layers).transpose(1, 2)[kept.to(device)].float().cpu()
    return Outputs(logits, states, kept.sum(dim=-1).reshape(len(index), -1))


def store_spec(
    teacher: Teacher, *, focus: str | None, dtype: str, layers: Sequence[int] = (), sequences: bool = False
) -> StoreSpec:
    """What the store holds of this teacher: logits, sentence states of `layers` and, with `sequences`, those of every token."""
    shape = shape_of(teacher.model.config)
    for layer in layers:
        if layer > shape.layers:
            raise KdtrainError(
                f"teacher layer {layer} was asked for, but {teacher.path} has {shape.layers} layers"
            )
    if sequences and not shape.embeddings:
        raise KdtrainError(
            f"whole sequences can be stored of a Transformer teacher only, and {teacher.path} is a BiGRU"
        )
    state = Element(dtype, (shape.width,))
    kinds = ("states", "tokens") if sequences else ("states",)
    return StoreSpec(
        teacher=teacher.path,
        teacher_weights=teacher.weights_hash(),
        tokenizer=teacher.tokenizer_hash(),
        outputs=teacher.outputs_hash(),
        max_length=teacher.max_length,
        focus=focus,
        dtype=dtype,
        classes=teacher.classes,
        tensors={
            "logits": Element("float32", (teacher.classes,)),
            **{f"{kind}.{layer}": state for kind in kinds for layer in sorted(set(layers))},
        },
    )


class ClassifierWork(Work):
    """Rows in the teacher's tokens, for `kdtrain.teacher_cache.build`."""

    def __init__(self, teacher: Teacher, rows: Rows, device: torch.device) -> None:
        self.teacher, self.rows, self.device = teacher, rows, device
        nn.Module.to(teacher.model, device)

    @property
    def costs(self) -> Tensor:
        """(R,) int64 tokens of each row."""
        return self.rows.lengths

    def elements(self, name: str) -> Tensor:
        """(R,) int64 elements of each row in tensor `name`."""
        pairs = self.rows if isinstance(self.rows, PairRows) else None
        count = len(self.rows)
        if name == "logits":
            return torch.ones(count, dtype=torch.int64)
        if name.startswith("states."):
            return torch.full((count,), 1 if pairs is None else 2)
        inserted = len(self.teacher.insert)
        if pairs is None:
            return self.rows.lengths - inserted
        return (pairs.texts.lengths[pairs.index] - inserted).sum(1)

    def compute(self, rows: Tensor, names: Sequence[str], indices: Tensor | None = None) -> dict[str, Ragged]:
        """These tensors of these rows, on the host."""
        layers = tuple(sorted({int(name.partition(".")[2]) for name in names if name != "logits"}))
        sequences = any(name.startswith("tokens.") for name in names)
        found = teacher_outputs(self.teacher, self.rows, rows, layers, self.device, sequences=sequences)
        out = {"logits": Ragged(found.logits, torch.ones(len(rows), dtype=torch.int64))}
        if found.states is not None:
            lengths = found.lengths
            sentences = found.states.flatten(0, 1) if lengths is None else found.states
            if lengths is not None:
                out |= {
                    f"tokens.{layer}": Ragged(found.states[:, i], _by_text(lengths))
                    for i, layer in enumerate(layers)
                }
                ends = lengths.flatten().cumsum(0)
                sentences = found.states[ends - lengths.flatten()]
            ones = _by_text(torch.ones(len(rows), len(sentences) // len(rows), dtype=torch.int64))
            out |= {f"states.{layer}": Ragged(sentences[:, i], ones) for i, layer in enumerate(layers)}
        return {name: out[name] for name in names}


def _by_text(lengths: Tensor) -> Tensor:
    """(B,) of rows of one text, (B, 2) of pairs."""
    return lengths.squeeze(1) if lengths.shape[1] == 1 else lengths


def prepare_work(teacher: Teacher, rows: TextRows, focus: str | None, device: torch.device) -> Prepare:
    """Tokenize those of `rows` that have to be computed."""

    def prepare(numbers: np.ndarray) -> ClassifierWork:
        chosen = rows.select(numbers.tolist())
        tokens = tokenize_split(chosen, teacher.tokenizer, teacher.max_length, focus, teacher.insert)
        return ClassifierWork(teacher, tokens, device)

    return prepare


def filled_store(
    folder: Path,
    spec: StoreSpec,
    keys: Sequence[str],
    prepare: Prepare,
    accelerator: Accelerator,
    *,
    batch_tokens: int,
) -> Store:
    """The store at `folder` with all that the spec names of these rows: what was missing has been computed.

    Raises:
        KdtrainError: the store is another teacher's, there is too little room, or another run writes there now.
    """
    store = Store.open(folder, spec)
    build(store, keys_of(keys), prepare, accelerator, batch_tokens=batch_tokens)
    return store


class TeacherRows:
    """Stored outputs of the rows of one split, by row number. P texts in a row: 1, or 2 for pairs."""

    def __init__(
        self, store: Store, rows: TextRows, layers: Sequence[int] = (), *, sequences: bool = False
    ) -> None:
        self.names = [f"{'tokens' if sequences else 'states'}.{layer}" for layer in layers]
        self.stored = store.rows(keys_of(rows.keys()), ["logits", *self.names])
        self.logits = self.stored.batch(range(len(rows)), ["logits"])["logits"].values
        """(rows, C) float32"""

    def states(self, rows: Tensor) -> Tensor:
        """(B * P, L, D_t) float32, the sentence states of the given row numbers."""
        found = self.stored.batch(rows, self.names)
        return torch.stack([found[name].values for name in self.names], dim=1).float()

    def sequences(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(B * P, L, N, D_t) float32, every token, and the mask (B * P, N) bool of what is not padding."""
        found = self.stored.batch(rows, self.names)
        lengths = found[self.names[0]].lengths.flatten()
        states = torch.stack([found[name].values for name in self.names], dim=1).float()
        padded = nn.utils.rnn.pad_sequence(list(states.split(lengths.tolist())), batch_first=True)
        return padded.transpose(1, 2), torch.arange(padded.shape[1]) < lengths[:, None]
