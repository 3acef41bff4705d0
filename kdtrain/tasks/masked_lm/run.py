"""One run of a masked language model, from recipe to encoder: prepare everything, train, measure, save."""

import hashlib
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from kdtrain.console import say
from kdtrain.engine.full_state import whole_state
from kdtrain.engine.run_folder import claim
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.metrics import metrics_at
from kdtrain.files import atomic_folder, folder_bytes
from kdtrain.loop import describe_training, train
from kdtrain.models.loading import load_model, load_tokenizer, parameter_count, quiet
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
        identity: dict[str, str | None] = {"data": f"{fingerprint(rows)} {fingerprint(valid)}"}
        finished = claim(folder, recipe, identity)
    if finished:
        summary = MaskedSummary.load(folder)
        say(f"already done: {summary.line()}")
        return summary
    torch.manual_seed(recipe.seed)
    student = build_masked_student(recipe, tokenizer)
    check_masked_head(student)
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
                "fingerprint": identity["data"],
                "rows": {"train": len(rows), "valid": len(valid)},
                "tokens": {"train": int(rows.lengths.sum()), "valid": int(valid.lengths.sum())},
                **corpus.about,
            },
            versions=installed_versions(),
        )
        summary.save(folder)
        say(summary.line())
    accelerator.wait_for_everyone()
    return MaskedSummary.load(folder)


def corpus_tokenizer(recipe: MaskedRecipe, corpus: Corpus) -> PreTrainedTokenizerBase:
    """The finished tokenizer that the recipe names, or one trained on the training code, kept for a resumed run."""
    given = recipe.student.tokenizer or recipe.student.path
    path = Path(recipe.output) / "checkpoints" / "tokenizer"
    if given is None and not path.exists():
        tokenizer = train_tokenizer(
            corpus.texts(),
            vocab_size=recipe.student.vocab_size,
            max_length=recipe.student.max_length,
            focus=corpus.marker,
        )
        with atomic_folder(path) as temporary:
            tokenizer.save_pretrained(temporary)
    field = "student.tokenizer" if recipe.student.tokenizer or given is None else "student.path"
    tokenizer = load_tokenizer(given or str(path), field)
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
