"""The student's own tokenizer: a byte-level BPE trained on the task's training code and nothing else."""

from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdtrain.checksums import check_sealed, seal
from kdtrain.files import atomic_folder
from kdtrain.models.loading import load_tokenizer

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
"""RoBERTa's special tokens in RoBERTa's order, so that <s> is 0, <pad> is 1 and </s> is 2."""


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, max_length: int, focus: str | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (pairs seen at least twice) and wrap it for transformers.

    Args:
        texts: training code. The focus marker is taken out of it: it is one token of its own and no material for merges.
        vocab_size: upper bound; a small corpus may end in fewer tokens.
        max_length: what the tokenizer reports as its longest input.
        focus: marker added as one special token.
    """
    special = SPECIAL_TOKENS + ([focus] if focus else [])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (part for text in texts for part in (text.split(focus) if focus else [text])), trainer
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        cls_token="<s>",
        sep_token="</s>",
        extra_special_tokens=[focus] if focus else [],
        model_max_length=max_length,
    )


def stored_tokenizer(
    path: Path, train: Callable[[], PreTrainedTokenizerFast], field: str
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder of its own, trained and saved there first where there is none.

    Raises:
        KdtrainError: one of its files is damaged.
    """
    if not path.exists():
        tokenizer = train()
        with atomic_folder(path) as temporary:
            tokenizer.save_pretrained(temporary)
            seal(temporary)
    check_sealed(path, f"delete {path}, and the same command trains this tokenizer again")
    return load_tokenizer(str(path), field)
