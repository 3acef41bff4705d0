"""What can be told of a language-model run before any training: one small function a check, each names the way out."""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from kdtrain.doctor import Finding, error, examine, info, refusal, warning
from kdtrain.doctor.memory_plan import ModelShape, plan_step
from kdtrain.errors import KdtrainError
from kdtrain.files import human_bytes
from kdtrain.models.heads import head_of, hidden_states
from kdtrain.outputs import IGNORED, Batch
from kdtrain.recipe import LanguageRecipe
from kdtrain.tasks.code_lm.served import ServedTeacher
from kdtrain.tasks.code_lm.task import CodeLM

CPU = torch.device("cpu")


@dataclass
class LanguageSubject:
    """A recipe and all it names, opened when a check first asks for it."""

    recipe: LanguageRecipe

    @cached_property
    def run(self) -> CodeLM:
        """Data, tokenizer and models; refuses what a run would refuse."""
        with ExitStack() as stack:
            run = stack.enter_context(closing(CodeLM(self.recipe)))
            run.identity()
            stack.pop_all()
        return run

    @property
    def is_silent(self) -> bool:
        """Whether the teacher answers nothing now: it is on servers, and the recipe names none."""
        return self.recipe.teacher.source == "server" and self.recipe.teacher.url is None

    @cached_property
    def sample(self) -> Batch:
        """A few held-out rows."""
        rows = self.run.rows[1]
        return rows.batch(torch.arange(min(4, len(rows))), CPU)


def vocabularies_meet(subject: LanguageSubject) -> Iterator[Finding]:
    """How the heads line up; that the tokens are equal was verified one by one."""
    if subject.run.teacher is None:
        return
    sizes = [head_of(model).weight.shape[0] for model in (subject.run.student, subject.run.teacher.model)]
    vocab_map = subject.run.models.vocab_map
    if vocab_map is None:
        yield info("KD401", f"student and teacher have the same {sizes[0]} tokens, compared one by one")
        return
    assert subject.run.match is not None
    shared = subject.run.match.shared
    yield info(
        "KD402",
        f"the heads have {sizes[0]} (student) and {sizes[1]} (teacher) rows; ids 0 to {shared - 1} are the same tokens, compared "
        "one by one, and the divergence is taken over those; the cross entropy is over all of the student's",
    )


def servers_serve_the_teacher(subject: LanguageSubject) -> Iterator[Finding]:
    """The servers answer what the recipe needs; each thing that is wrong names the flag or the field."""
    run = subject.run
    if not isinstance(run.teacher, ServedTeacher) or not run.learns_from_teacher:
        return
    if subject.is_silent:
        yield info(
            "KD403",
            "the teacher is on servers, and teacher.url names none: only what is stored already can be read",
        )
        return
    for line in run.teacher.check(run.target(run.recipe.teacher.asked)):
        yield info("KD404", line)


def padding_is_told_from_the_end(subject: LanguageSubject) -> Iterator[Finding]:
    """A padding token that is the end-of-text token."""
    tokenizer = subject.run.tokenizer
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield info(
            "KD405",
            f"padding and end of text are one token ({tokenizer.eos_token!r}); here labels never depend on it, elsewhere it "
            "teaches a student not to stop",
        )
    labels = subject.run.rows[0].labels
    if isinstance(tokenizer.eos_token_id, int) and not bool((labels == tokenizer.eos_token_id).any()):
        yield error(
            "KD406",
            "no document ends in a counted end-of-text token, so the student would not learn to stop; look at the completions",
        )


def labels_are_shifted_once(subject: LanguageSubject) -> Iterator[Finding]:
    """The teacher (or a started student) has to find the next token likelier than the one after it, or the same one."""
    run, batch = subject.run, subject.sample
    teacher = run.models.teacher
    if subject.is_silent or (teacher is None and subject.recipe.student.path is None):
        return  # a new student knows nothing yet
    with torch.no_grad():
        if teacher is None:
            hidden, _ = hidden_states(run.student, batch.input_ids, batch.positions)
        else:
            hidden, _ = teacher.hidden(batch.input_ids, batch.positions)
        head = head_of(run.student) if teacher is None else teacher.head
        log_p = head.logits(hidden.to(head.weight.dtype)).float().log_softmax(-1)
    counted = batch.labels != IGNORED
    losses = {}
    last = log_p.shape[-1] - 1  # a label of a student with more rows than the teacher is left to other checks
    for name, labels in (
        ("the next token", batch.labels),
        ("the same token", batch.input_ids),
        ("the token after the next", torch.cat([batch.labels[:, 1:], batch.labels[:, -1:]], dim=1)),
    ):
        inside = counted & (labels != IGNORED)
        chosen = log_p[inside].gather(1, labels[inside].clamp(0, last)[:, None])
        losses[name] = -float(chosen.mean())
    best = min(losses, key=lambda name: losses[name])
    words = ", ".join(f"{name} {value:.2f}" for name, value in losses.items())
    if best == "the next token":
        yield info("KD407", f"labels are shifted once: the cross entropy is {words}")
    else:
        yield warning(
            "KD408",
            f"{best} is likelier than the next one (cross entropy: {words}); is this a causal model of such text?",
        )


def documents_fit(subject: LanguageSubject) -> Iterator[Finding]:
    """How full the rows are, and how many documents go on in another row."""
    rows = subject.run.rows[0]
    full = float(rows.lengths.sum()) / (len(rows) * subject.recipe.data.max_length)
    share = float(rows.counted.sum()) / float(rows.lengths.sum())
    yield info("KD409", f"{len(rows)} rows, {full:.0%} full; {share:.0%} of their tokens are learned from")
    if full < 0.5 and not subject.recipe.data.packing:
        yield warning("KD410", f"rows are {full:.0%} full, the rest is padding; set data.packing: true")
    cut = int((rows.positions == 0).cumsum(0).max() if len(rows.positions) else 0)
    if cut == len(rows) and full > 0.95 and subject.recipe.data.packing:
        yield warning(
            "KD411",
            "almost every row is one cut piece of a longer document, which loses what stands before it; raise data.max_length",
        )


def heads_are_understood(subject: LanguageSubject) -> Iterator[Finding]:
    """Shape and ties of both heads; that they give the models' own logits was verified."""
    models = {"student": subject.run.student}
    if subject.run.teacher is not None and subject.run.teacher.runs_here:
        models["teacher"] = subject.run.teacher.model
    for side, model in models.items():
        head = head_of(model)
        tied = head.weight is model.get_input_embeddings().weight
        extra = [f"softcap {head.softcap}"] if head.softcap is not None else []
        extra += [f"scale {head.scale:g}"] if head.scale != 1.0 else []
        words = ", ".join(["tied to the embeddings" if tied else "not tied", *extra])
        yield info(
            "KD412",
            f"the {side}'s head is {head.weight.shape[0]} x {head.weight.shape[1]}, {words}; it gives the model's own logits",
        )


def first_loss_is_finite(subject: LanguageSubject) -> Iterator[Finding]:
    """The untrained student's loss on held-out rows."""
    if subject.is_silent:
        return
    with torch.no_grad():
        sums = subject.run.models.measure(subject.run.student, subject.sample).sum(0)
    loss, divergence = (float(value / sums[3]) for value in sums[:2])
    if not torch.isfinite(sums).all():
        yield error(
            "KD413",
            f"the first loss is not finite (cross entropy {loss}, divergence {divergence}); a checkpoint is damaged",
        )
    elif subject.run.models.teacher is not None:
        yield info(
            "KD414",
            f"before training: cross entropy {loss:.2f}, divergence from the teacher {divergence:.2f}",
        )


def memory_is_there(subject: LanguageSubject) -> Iterator[Finding]:
    """What one device holds in a step."""
    recipe, run = subject.recipe, subject.run
    student = ModelShape.of(run.student.config)
    teacher = None if run.teacher is None else ModelShape.of(run.teacher.model.config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = plan_step(student, teacher, recipe, 1, sharded=False, device=device)
    words = (
        f"a step holds about {human_bytes(plan.total)} on one device: weights {human_bytes(plan.weights)}, gradients "
        f"{human_bytes(plan.gradients)}, optimizer {human_bytes(plan.optimizer)}, activations {human_bytes(plan.activations)}, masks {human_bytes(plan.masks)}, loss "
        f"{human_bytes(plan.loss)} (with logits it would be {human_bytes(plan.eager_loss)}), teacher {human_bytes(plan.teacher)}"
    )
    if plan.masks > plan.activations + plan.loss:
        yield warning(
            "KD415",
            f"the masks that keep packed documents apart take {human_bytes(plan.masks)} of a step, since they grow with the square "
            f"of data.max_length ({recipe.data.max_length}); set training.gradient_checkpointing: true, or data.packing: false, which "
            "needs none",
        )
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else available_memory()
    if free is not None and plan.total > free:
        more = "raise training.gradient_accumulation_steps, set training.gradient_checkpointing: true, or use more devices (kdtrain doctor --plan)"
        yield error("KD416", f"{words}; {human_bytes(free)} are free: {more}")
    else:
        yield info("KD417", words)


def cache_has_room(subject: LanguageSubject) -> Iterator[Finding]:
    """What the stored signals of the teacher take."""
    run = subject.run
    if run.external is not None:
        yield info("KD418", run.external.words)
    if run.stored is None:
        return
    target, held_out = run.target(run.stored), run.target("hidden")
    tokens, measured = (int(rows.lengths.sum()) for rows in run.rows[:2])
    if run.models.teacher is None:
        measured = 0  # held-out rows are measured without the teacher
    yield info(
        "KD419",
        f"the teacher cache takes {target.bytes_per_token} bytes a token ({target.describe()}), "
        f"{human_bytes(tokens * target.bytes_per_token)} for {tokens} tokens, and {human_bytes(measured * held_out.bytes_per_token)} "
        f"for {measured} held-out tokens ({held_out.describe()})",
    )


CHECKS = (
    servers_serve_the_teacher,
    vocabularies_meet,
    padding_is_told_from_the_end,
    labels_are_shifted_once,
    documents_fit,
    heads_are_understood,
    first_loss_is_finite,
    memory_is_there,
    cache_has_room,
)
"""In the order in which their findings are printed."""


def examine_language(recipe: LanguageRecipe) -> list[Finding]:
    """All findings of one run; where it could not start, only why."""
    subject = LanguageSubject(recipe)
    try:
        with closing(subject.run):
            return list(examine(subject, CHECKS))
    except KdtrainError as reason:
        return [refusal(reason)]


def available_memory() -> int | None:
    """Bytes that the system could still give, where it says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)
