"""Segments in front of a teacher that runs here."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdkernels import teacher_cross_term
from kdtrain.data.tokens import TokenRows
from kdtrain.models.heads import Head
from kdtrain.models.language_teacher import LanguageTeacher
from kdtrain.tasks.code_lm.packing import PackedRows
from kdtrain.tasks.code_lm.targets import Target
from kdtrain.teacher_cache.build import Work
from kdtrain.teacher_cache.shard import Ragged

HEAD_TOKENS = 512
"""Tokens whose logits are in memory at a time."""


class LanguageWork(Work):
    """Segments in front of the teacher, for `kdtrain.teacher_cache.build`."""

    def __init__(
        self, teacher: LanguageTeacher, target: Target, segments: TokenRows, device: torch.device
    ) -> None:
        self.teacher, self.target, self.segments, self.device = teacher, target, segments, device
        nn.Module.to(teacher.model, device)

    @property
    def costs(self) -> Tensor:
        """(R,) int64 tokens of each segment."""
        return self.segments.lengths

    def elements(self, name: str) -> Tensor:
        """(R,) int64: every tensor has one element for each token."""
        return self.segments.lengths

    @torch.inference_mode()
    def compute(self, rows: Tensor, names: Sequence[str], indices: Tensor | None = None) -> dict[str, Ragged]:
        """These tensors of these segments, on the host; see `kdtrain.teacher_cache.build.Work`."""
        ids, mask = (tensor.to(self.device) for tensor in self.segments.batch(rows))
        positions = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        hidden = self.teacher.hidden(ids, positions)[0][mask.bool()]
        lengths = self.segments.lengths[rows]
        found = self._targets(hidden, indices)
        return {name: Ragged(found[name].cpu(), lengths) for name in names}

    def _targets(self, hidden: Tensor, indices: Tensor | None) -> dict[str, Tensor]:
        """All tensors of the target for hidden states (tokens, D_t)."""
        if self.target.kind == "hidden":
            return {"hidden": hidden}
        head, shared = self.teacher.head, slice(self.target.spec.vocabulary)
        weight, bias = head.weight[shared], None if head.bias is None else head.bias[shared]
        if self.target.frozen is not None:
            student = self.target.frozen
            found = teacher_cross_term(
                replace(self.teacher.with_hidden(hidden), weight=weight, bias=bias),
                student.weight[shared].to(self.device),
                None if student.bias is None else student.bias[shared].to(self.device),
                temperature=student.temperature,
            )
            return {name: getattr(found, name) for name in ("cross", "bias", "entropy")}
        upcast = Head(weight.float(), None if bias is None else bias.float(), head.softcap, head.scale)
        logprobs, ids = [], []
        for first in range(0, len(hidden), HEAD_TOKENS):
            log_p = upcast.logits(hidden[first : first + HEAD_TOKENS].float()).log_softmax(-1)
            if indices is None:
                top = log_p.topk(self.target.spec.tensors["logprobs"].shape[0], dim=-1)
                logprobs.append(top.values)
                ids.append(top.indices)
            else:
                ids.append(indices[first : first + HEAD_TOKENS].to(self.device).long())
                logprobs.append(log_p.gather(-1, ids[-1]))
        return {"logprobs": torch.cat(logprobs), "indices": torch.cat(ids).int()}


def segments_of(rows: PackedRows) -> tuple[TokenRows, Tensor]:
    """The segments of packed rows in their order, and (rows + 1,) the number of the first one of every row."""
    opens = (rows.positions == 0).nonzero().squeeze(1)
    lengths = torch.diff(opens, append=torch.tensor([len(rows.tokens)]))
    first = torch.searchsorted(opens, rows.starts)
    return TokenRows(rows.tokens, opens, lengths, rows.pad_id), torch.cat([first, torch.tensor([len(opens)])])
