"""What is stored of a teacher for every token: hidden states, top-k entries, or a cross-term with a frozen head."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdtrain.errors import KdtrainError
from kdtrain.models.heads import head_of
from kdtrain.models.language_teacher import LanguageTeacher
from kdtrain.recipe import LanguageRecipe, LanguageTeacherSection
from kdtrain.teacher_cache.store import Element, StoreSpec

Kind = Literal["hidden", "topk", "cross_term"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class FrozenHead:
    """A student's head in the precision of the matmuls of a step, and the temperature of its loss."""

    weight: Tensor
    """(V_s, D_s)"""
    bias: Tensor | None
    temperature: float

    @classmethod
    def of(cls, student: PreTrainedModel, recipe: LanguageRecipe) -> "FrozenHead":
        """The student's head in the precision of training.

        Raises:
            KdtrainError: it is trained, or caps its logits.
        """
        head = head_of(student)
        if head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad):
            raise KdtrainError(
                "teacher.signal cross_term is stored for one head of the student, which training would change; set "
                "student.frozen_head: true (or student.lora_rank), or teacher.signal: hidden"
            )
        if head.softcap is not None:
            raise KdtrainError(
                f"teacher.signal cross_term needs logits that are linear in the hidden states, but the student caps its own "
                f"at {head.softcap}; set teacher.signal: hidden"
            )
        dtype = DTYPES[recipe.training.precision]
        bias = None if head.bias is None else head.bias.detach().to(dtype)
        return cls(head.weight.detach().to(dtype), bias, recipe.temperature)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over its numbers."""
        digest = hashlib.sha256()
        for tensor in (self.weight, self.bias):
            if tensor is not None:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class Target:
    """What is stored of every token."""

    kind: Kind
    spec: StoreSpec
    frozen: FrozenHead | None = None

    @classmethod
    def of(
        cls,
        kind: Kind,
        teacher: LanguageTeacher,
        recipe: LanguageTeacherSection,
        *,
        shared: int | None = None,
        frozen: FrozenHead | None = None,
    ) -> "Target":
        """What the teacher section of a recipe asks for.

        Args:
            shared: ids 0 to shared - 1 mean the same token to student and teacher; None when all do.
            frozen: the student's head, for a cross-term.
        """
        size, width = teacher.head.weight.shape
        shared = size if shared is None else shared
        pinned: dict[str, object] = {} if kind == "hidden" else {"vocabulary": shared}
        if kind == "hidden":
            tensors = {"hidden": Element(recipe.dtype, (width,))}
            pinned["dtype"] = recipe.dtype
        elif frozen is not None:
            tensors = {
                "cross": Element("float32", (frozen.weight.shape[1],)),
                "bias": Element("float32", ()),
                "entropy": Element("float32", ()),
            }
            pinned |= {"student_head": frozen.fingerprint, "temperature": frozen.temperature}
        else:
            top_k = recipe.top_k
            if top_k > shared:
                raise KdtrainError(
                    f"teacher.top_k is {top_k}, but the teacher has {shared} tokens only that the student knows"
                )
            if top_k == shared and recipe.tail == "bucket":
                raise KdtrainError(
                    f"teacher.top_k keeps all {shared} tokens and leaves nothing for teacher.tail bucket; set it to renormalize"
                )
            tensors = {"logprobs": Element("float32", (top_k,)), "indices": Element("int32", (top_k,))}
            pinned["top_k"] = top_k
        spec = StoreSpec(
            teacher=teacher.path,
            teacher_weights=teacher.weights_hash,
            precision=recipe.precision,
            tensors=tensors,
            **pinned,  # type: ignore[arg-type]
        )
        return cls(kind, spec, frozen)

    @classmethod
    def for_run(
        cls,
        kind: Kind,
        teacher: LanguageTeacher,
        student: PreTrainedModel,
        shared: int,
        recipe: LanguageRecipe,
    ) -> "Target":
        """What a run with this student stores of the teacher, with whom it shares ids 0 to shared - 1."""
        rows = head_of(student).weight.shape[0]
        if kind == "cross_term" and rows > shared:
            raise KdtrainError(
                f"the student's head has {rows} rows, of which the teacher shares {shared}; a cross-term would compare over "
                "all of them and not, as the teacher itself would, over the shared ones; set teacher.signal: hidden"
            )
        frozen = FrozenHead.of(student, recipe) if kind == "cross_term" else None
        return cls.of(kind, teacher, recipe.teacher, shared=shared, frozen=frozen)

    @property
    def bytes_per_token(self) -> int:
        """On disk."""
        return sum(element.bytes for element in self.spec.tensors.values())

    def describe(self) -> str:
        """For people."""
        return ", ".join(
            f"{name}: {' '.join([*map(str, element.shape), element.dtype])}"
            for name, element in self.spec.tensors.items()
        )
