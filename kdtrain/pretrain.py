"""The masked-language-model stage of a teacher that is made here.

Every window of code has one exception name hidden (`except NAME`, `raise NAME(...)`) and 15 % of its other tokens
masked as in RoBERTa. The model predicts the masked tokens, and at the hole and at the first token, from which a
classifier will read, the first sub-token of the hidden name. So the stage learns the language and, from every raise
and every handler, what raises what; the fine-tuning stage then only needs the 20 classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase, RobertaConfig, RobertaForMaskedLM, get_scheduler

from kdtrain.data.handlers import HOLE, Function, masked
from kdtrain.data.tokens import TokenRows, length_grouped_batches, tokenize
from kdtrain.files import atomic_folder
from kdtrain.progress import progress

IGNORED = -100
MASKED_SHARE = 0.15
SAVE_EVERY = 500  # steps


def hidden_name_windows(
    functions: Sequence[Function], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[TokenRows, Tensor]:
    """One window for each handler and for the first `raise` of each function, and the hidden names.

    The names are (rows,) int64, the first sub-token of each. Later `raise` statements mostly repeat the first.
    """
    texts, names = [], []
    for function in functions:
        raises = [hole for hole in function.holes if hole.raised]
        for hole in [hole for hole in function.holes if not hole.raised] + raises[:1]:
            texts.append(masked(function, hole))
            names.append(" " + function.text[hole.start : hole.end].split(".")[-1].strip("( "))
    first = [ids[0] for ids in tokenizer(names, add_special_tokens=False)["input_ids"]]
    return tokenize(texts, tokenizer, max_length, HOLE), torch.tensor(first)


def mask_tokens(
    ids: Tensor, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Corrupt (B, N) token ids as RoBERTa does: of the chosen 15 %, 80 % become <mask>, 10 % a random token.

    Returns the corrupted ids and the labels, -100 where nothing was chosen. Special tokens are never chosen.
    """
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    chosen = (torch.rand(ids.shape, generator=generator) < MASKED_SHARE) & ~special
    labels = torch.where(chosen, ids, IGNORED)
    fate = torch.rand(ids.shape, generator=generator)
    random_ids = torch.randint(len(tokenizer), ids.shape, generator=generator)
    mask_id = tokenizer.get_vocab()[str(tokenizer.mask_token)]
    corrupted = torch.where(chosen & (fate < 0.8), mask_id, ids)
    return torch.where(chosen & (fate >= 0.9), random_ids, corrupted), labels


def pretrain(
    rows: TokenRows,
    names: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    config: RobertaConfig,
    output: Path,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Train a RoBERTa-shaped encoder on hidden names and masked tokens; `output` loads with `AutoModel...`.

    The loss is the mean over masked tokens plus the mean over hidden names. Returns the mean of both, and how
    often the hidden name was guessed right, over the last 500 steps.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = RobertaForMaskedLM(config).eval()  # no dropout: the windows are seen once or twice
    optimizer = torch.optim.AdamW(
        model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = get_scheduler("linear", optimizer, round(0.06 * steps), steps)
    hole = tokenizer.get_vocab()[HOLE]
    recent: list[Tensor] = []
    with progress(steps, "masked language model") as bar:
        for step, index in enumerate(_endless_batches(rows, batch_size, seed, steps), start=1):
            ids, attention_mask = rows.batch(index)
            corrupted, labels = mask_tokens(ids, tokenizer, generator)
            at_name = ids == hole
            at_name[:, 0] = True
            labels = torch.where(at_name, names[index][:, None], labels)
            features = model.roberta(input_ids=corrupted, attention_mask=attention_mask).last_hidden_state
            predicted = labels != IGNORED  # the head runs on these tokens only: it costs as much as a layer
            logits, targets = model.lm_head(features[predicted]), labels[predicted]
            losses = F.cross_entropy(logits, targets, reduction="none")
            is_name = at_name[predicted]
            name_loss, token_loss = losses[is_name].mean(), losses[~is_name].mean()
            (name_loss + token_loss).backward()
            torch.nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            right = (logits[is_name].argmax(-1) == targets[is_name]).float().mean()
            recent = [*recent[1 - SAVE_EVERY :], torch.stack([token_loss, name_loss, right]).detach()]
            if step % 20 == 0:
                token, name, share = torch.stack(recent[-100:]).mean(0).tolist()
                bar.note(f"token loss {token:.3f} name loss {name:.3f} names right {share:.1%}")
            bar.update()
            if step % SAVE_EVERY == 0 or step == steps:
                with atomic_folder(output) as folder:
                    model.save_pretrained(folder)
                    tokenizer.save_pretrained(folder)
    token, name, share = torch.stack(recent).mean(0).tolist()
    return {"token_loss": token, "name_loss": name, "names_right": share}


def _endless_batches(rows: TokenRows, batch_size: int, seed: int, steps: int) -> Iterator[Tensor]:
    done = 0
    for epoch in range(steps):
        for index in length_grouped_batches(rows.lengths, batch_size, seed, epoch):
            if done == steps:
                return
            done += 1
            yield index
