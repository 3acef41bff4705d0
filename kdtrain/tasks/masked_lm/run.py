"""One run of a masked language model, from recipe to encoder: prepare everything, train, measure, save."""

import hashlib
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from kdtrain.checksums import check_sealed, seal
from kdtrain.console import say
from kdtrain.engine.full_state import whole_state
from kdtrain.engine.run_folder import claimed
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.metrics import metrics_at
from kdtrain.files import atomic_folder, folder_bytes
from kdtrain.loop import describe_training, train
from kdtrain.models.loading import (
    load_model,
    load_tokenizer,
    parameter_count,
    quiet,
    tokenizer_hash,
    weights_hash,
)
from kdtrain.models.masked_heads import check_masked_head
from kdtrain.models.students import check_positions, roberta_config
from kdtrain.models.tokenizers import train_tokenizer
from kdtrain.plots import learning_curves
from kdtrain.summary import Summary, installed_versions
from kdtrain.tasks.classification.prepare import start_accelerator
from kdtrain.tasks.masked_lm.corpus import Corpus, load_corpus
from kdtrain.tasks.masked_lm.objective import MaskedObjective, masked_metrics
from kdtrain.tasks.masked_lm.recipe import MaskedRecipe
from kdtrain.tasks.masked_lm.rows import Hiding, MaskedRows

TOKENIZER = "checkpoints/tokenizer"
"""Where a run keeps the tokenizer that it trained."""


class MaskedSummary(Summary):
    """The summary of a masked language model; `test` and `valid` hold the held-out metrics."""

    def line(self) -> str:
        """The run in one line."""
        found = self.test
        names = f", exception names {found['names_right']:.1%}" if "names_right" in found else ""
        return (
            f"{self.name}: held-out loss {found['loss']:.4f}, hidden tokens told right {found['accuracy']:.1%}{names}, "
            f"{self.student['parameters']:,} parameters, {self.training['tokens_per_second']:.0f} tokens/s, trained in "
            f"{self.training['seconds']:.0f} s"
        )


def run_masked(recipe: MaskedRecipe) -> MaskedSummary:
    """Train, measure and save one encoder; everything lands in `recipe.output`, the encoder in its `student/`.

    A finished run of the same recipe and code is recognised and given back; an unfinished one goes on exactly where it
    stopped; another run's folder is refused.

    Raises:
        KdtrainError: anything wrong with recipe, code or model, as one sentence.
    """
    folder = Path(recipe.output)
    accelerator = start_accelerator(recipe)
    with accelerator.main_process_first():
        corpus = load_corpus(recipe.data)
        tokenizer = corpus_tokenizer(recipe, corpus)
        rows, valid = (
            corpus.rows(part, tokenizer, recipe.student.max_length) for part in (corpus.train, corpus.valid)
        )
    torch.manual_seed(recipe.seed)
    student = build_masked_student(recipe, tokenizer)
    check_masked_head(student)
    identity: dict[str, str | None] = {
        "data": f"{fingerprint(rows)} {fingerprint(valid)}",
        "weights at student.path": weights_hash(student.base_model) if recipe.student.path else None,
        "student's tokenizer": tokenizer_hash(tokenizer),
    }
    with claimed(folder, recipe, identity, accelerator) as finished:
        if not finished:
            train_and_save(recipe, corpus, tokenizer, student, rows, valid, accelerator)
    summary = MaskedSummary.load(folder)
    if finished:
        say(f"already done: {summary.line()}")
    return summary


def train_and_save(
    recipe: MaskedRecipe,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    student: PreTrainedModel,
    rows: MaskedRows,
    valid: MaskedRows,
    accelerator: Accelerator,
) -> None:
    """The run in its folder, which it holds alone."""
    folder = Path(recipe.output)
    kept = folder / TOKENIZER
    if accelerator.is_main_process and not (recipe.student.tokenizer or recipe.student.path or kept.exists()):
        with atomic_folder(kept) as temporary:
            tokenizer.save_pretrained(temporary)
            seal(temporary)
    mask_id = tokenizer.get_vocab()[str(tokenizer.mask_token)]
    hiding = Hiding(rows.special, mask_id, len(tokenizer), recipe.seed)
    objective = MaskedObjective(student, hiding, names=rows.names is not None)
    position = train(
        recipe,
        objective,
        rows,
        lambda model, accelerator: masked_metrics(model, objective, valid, accelerator),
        folder,
        accelerator,
    )
    state = whole_state(student)
    if accelerator.is_main_process:
        metrics = metrics_at(folder, position.best_step)
        with quiet(), atomic_folder(folder / "student") as temporary:
            student.save_pretrained(temporary, state_dict=state)
            tokenizer.save_pretrained(temporary)
        learning_curves({folder.name: folder}, folder / "plots" / "learning_curve.png")
        summary = MaskedSummary(
            name=folder.name,
            method="masked_lm",
            seed=recipe.seed,
            student={
                "architecture": student.config.model_type,
                "parameters": parameter_count(student),
                "bytes": folder_bytes(folder / "student"),
            },
            test=metrics,
            valid=metrics,
            teacher=None,
            training=describe_training(position, accelerator),
            data={
                "name": ", ".join(recipe.data.train) or "the code installed here",
                "fingerprint": f"{fingerprint(rows)} {fingerprint(valid)}",
                "rows": {"train": len(rows), "valid": len(valid)},
                "tokens": {"train": int(rows.lengths.sum()), "valid": int(valid.lengths.sum())},
                **corpus.about,
            },
            versions=installed_versions(),
        )
        summary.save(folder)
        say(summary.line())
    accelerator.wait_for_everyone()


def corpus_tokenizer(recipe: MaskedRecipe, corpus: Corpus) -> PreTrainedTokenizerBase:
    """The finished tokenizer that the recipe names, or one trained on the training code, kept for a resumed run."""
    given = recipe.student.tokenizer or recipe.student.path
    path = Path(recipe.output) / TOKENIZER
    field = "student.tokenizer" if recipe.student.tokenizer or given is None else "student.path"
    if given is not None:
        tokenizer = load_tokenizer(given, field)
    elif path.exists():
        check_sealed(path, f"delete {path}, and the same command trains this tokenizer again")
        tokenizer = load_tokenizer(str(path), field)
    else:
        # Written nowhere yet: the folder may be another run's. What is saved and loaded is what a resumed run has.
        with tempfile.TemporaryDirectory() as temporary:
            train_tokenizer(
                corpus.texts(),
                vocab_size=recipe.student.vocab_size,
                max_length=recipe.student.max_length,
                focus=corpus.marker,
            ).save_pretrained(temporary)
            tokenizer = load_tokenizer(temporary, field)
    if tokenizer.mask_token is None:
        raise KdtrainError(f"{field}: the tokenizer has no <mask>, which task masked_lm hides tokens with")
    if corpus.marker is not None and corpus.marker not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [corpus.marker]})
    return tokenizer


def build_masked_student(recipe: MaskedRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new encoder with random weights, or the one at `student.path`, under a masked-language-model head."""
    if recipe.student.path is None:
        config = roberta_config(recipe.student, tokenizer)
        return AutoModelForMaskedLM.from_config(config, trust_remote_code=False)
    model = load_model(AutoModelForMaskedLM, recipe.student.path, "student.path", new_head=True)
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    check_positions(model.config, recipe.student)
    return model


def fingerprint(rows: MaskedRows) -> str:
    """A hash of every token and name."""
    digest = hashlib.sha256(rows.rows.tokens.numpy().tobytes())
    digest.update(rows.lengths.numpy().tobytes())
    if rows.names is not None:
        digest.update(rows.names.numpy().tobytes())
    return digest.hexdigest()[:32]
