"""The doctor's findings and the plan's bytes, against runs that are wrong in one known way and a measured peak."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from kdtrain.cli import main
from kdtrain.doctor.code_lm import LanguageSubject, examine_language
from kdtrain.doctor.memory_plan import ModelShape, plan_step
from kdtrain.engine.layers import recompute_layers
from kdtrain.methods import method_options
from kdtrain.models.heads import head_of
from kdtrain.outputs import Batch
from kdtrain.recipe import (
    LanguageDataSection,
    LanguageRecipe,
    LanguageStudentSection,
    LanguageTeacherSection,
    LanguageTraining,
    save_recipe,
)
from kdtrain.tasks.recipes import load_recipe
from tests.language.conftest import objective_of


def findings(recipe: LanguageRecipe) -> dict[str, str]:
    """Text and level of everything the doctor says."""
    return {finding.text: finding.level for finding in examine_language(recipe)}


def said(found: dict[str, str], words: str) -> str:
    """The level of the one finding with these words."""
    levels = [level for text, level in found.items() if words in text]
    assert len(levels) == 1, (words, found)
    return levels[0]


def test_a_sound_run(
    language_distillation: LanguageRecipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = findings(language_distillation)
    assert set(found.values()) == {"info"}
    assert said(found, "the same 286 tokens, compared one by one") == "info"
    assert said(found, "labels are shifted once") == "info"
    assert said(found, "the student's head is 286 x 16, tied to the embeddings") == "info"
    assert said(found, "a step holds about") == "info"
    save_recipe(language_distillation, tmp_path / "recipe.yaml")
    assert main(["doctor", str(tmp_path / "recipe.yaml")]) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out


def test_wrong_runs(language_distillation: LanguageRecipe, language_teacher: Path, tmp_path: Path) -> None:
    """Another tokenizer, a teacher that knows nothing, padding by hand, a cache and its cost, padded heads."""
    recipe = language_distillation
    lost = recipe.replaced(teacher=recipe.teacher.replaced(path="/nowhere"))
    assert findings(lost) == {"teacher.path: there is no folder /nowhere": "error"}
    loose = recipe.replaced(
        data=recipe.data.replaced(packing=False, max_length=128),
        student=recipe.student.replaced(tokenizer=str(language_teacher)),
        teacher=recipe.teacher.replaced(path=None),  # it reads 64 tokens only
        method=method_options("ft"),
    )
    assert said(findings(loose), "the rest is padding; set data.packing: true") == "warning"
    cached = recipe.replaced(
        method=method_options("kd", temperature=1.0, ce_weight=0.5),
        teacher=recipe.teacher.replaced(signal="hidden", cache=str(tmp_path / "cache")),
    )
    assert said(findings(cached), "the teacher cache takes 64 bytes a token") == "info"
    kept = cached.replaced(teacher=cached.teacher.replaced(signal="topk", top_k=4))
    tokens = LanguageSubject(kept).run.rows[1].lengths.sum()
    assert said(findings(kept), f"for {tokens} held-out tokens (hidden: 32 bfloat16)") == "info"
    # Labels alone store nothing, whatever the signal asks for.
    alone = cached.replaced(
        method=method_options("ft"),
        teacher=cached.teacher.replaced(signal="cross_term"),
    )
    assert set(findings(alone).values()) == {"info"} and "cache" not in str(findings(alone))
    model = AutoModelForCausalLM.from_pretrained(language_teacher)
    with torch.no_grad():  # every token now stands for its neighbour
        table = head_of(model).weight
        table.copy_(table.roll(1, 0))
    model.save_pretrained(tmp_path / "confused")
    PreTrainedTokenizerFast.from_pretrained(language_teacher).save_pretrained(tmp_path / "confused")
    confused = recipe.replaced(teacher=recipe.teacher.replaced(path=str(tmp_path / "confused")))
    assert said(findings(confused), "is likelier than the next one") == "warning"


def test_padded_head_of_the_teacher(
    language_distillation: LanguageRecipe, language_teacher: Path, tmp_path: Path
) -> None:
    """A teacher whose head has more rows than the student's: told, and trained over the shared tokens."""
    model = AutoModelForCausalLM.from_pretrained(language_teacher)
    model.resize_token_embeddings(300, mean_resizing=False)
    model.save_pretrained(tmp_path / "padded")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(language_teacher)
    tokenizer.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = language_distillation.replaced(
        student=language_distillation.student.replaced(tokenizer=str(tmp_path / "tokenizer")),
        teacher=LanguageTeacherSection(path=str(tmp_path / "padded")),
    )
    found = findings(recipe)
    assert (
        said(found, "the heads have 286 (student) and 300 (teacher) rows; ids 0 to 285 are the same tokens")
        == "info"
    )
    assert said(found, "before training: cross entropy") == "info"


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages made under it that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage() not in self.seen:
                storage = value.untyped_storage()
                size = storage.nbytes()
                self.seen.add(storage)
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.forget, size)
        return result

    def forget(self, size: int) -> None:
        """A storage is gone."""
        self.alive -= size


def measured_and_planned(
    configs: list[LlamaConfig], lengths: list[int], rows: int, *, checkpointing: bool = False, steps: int = 2
) -> tuple[int, int]:
    """Peak bytes of real steps, weights included, over rows of documents of the given lengths; and the plan's total."""
    student, teacher = (AutoModelForCausalLM.from_config(config) for config in configs)
    if checkpointing:
        recompute_layers(student)
    objective = objective_of(student, method_options("kd", temperature=1.0, ce_weight=0.5), teacher).train()
    ids = torch.randint(configs[0].vocab_size, (rows, sum(lengths)))
    places = torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1)
    batch = Batch(ids, ids.roll(-1, 1), torch.arange(rows), position_ids=places)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    with PeakMemory() as memory:
        for _ in range(steps):
            loss, _ = objective(batch, ids.numel())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
    shapes = [ModelShape.of(config) for config in configs]
    recipe = LanguageRecipe(
        method=(method_options("kd", temperature=1.0, ce_weight=0.5),),
        data=LanguageDataSection(train="-", max_length=sum(lengths), packing=len(lengths) > 1),
        teacher=LanguageTeacherSection(path="-"),
        training=LanguageTraining(batch_size=rows, gradient_checkpointing=checkpointing),
    )
    plan = plan_step(shapes[0], shapes[1], recipe, 1, sharded=False, device="cpu")
    return memory.peak + 4 * (shapes[0].parameters + shapes[1].parameters), plan.total


def small_llama(vocabulary: int, width: int, layers: int, length: int = 256, heads: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=3 * width,
        max_position_embeddings=length,
    )


# The head alone, layers alone, both, masks of packed documents kept and recomputed: each is the largest part of one.
@pytest.mark.parametrize(
    ("vocabulary", "width", "layers", "lengths", "checkpointing"),
    [
        (16000, 64, 2, [256], False),
        (600, 128, 6, [256], False),
        (6000, 64, 4, [256], False),
        (600, 32, 4, [700, 324], False),
        (600, 32, 3, [1000, 536], True),
    ],
)
def test_plan_is_near_the_measured_peak(
    vocabulary: int, width: int, layers: int, lengths: list[int], checkpointing: bool
) -> None:
    """Everything but the weights themselves, which are counted exactly: within 20 %."""
    configs = [small_llama(vocabulary, d, layers, sum(lengths)) for d in (width, 2 * width)]
    measured, planned = measured_and_planned(configs, lengths, rows=4, checkpointing=checkpointing)
    assert planned == pytest.approx(measured, rel=0.2)


def test_a_step_of_32k_tokens() -> None:
    """One row of 32,768 tokens through chunked loss and recomputed layers: as planned, a tenth of its logits, no masks."""
    length, vocabulary = 32768, 4000
    configs = [small_llama(vocabulary, d, 1, length, heads=1) for d in (32, 48)]
    measured, planned = measured_and_planned(configs, [length], rows=1, checkpointing=True, steps=1)
    assert planned == pytest.approx(measured, rel=0.2)
    assert measured < 0.1 * (5 * 4 * length * vocabulary), "logits, log-probabilities and a gradient"


def test_plan_of_many_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards shrink with the devices, buffers of the loss do not grow with the batch; the command prints it."""
    for name, width in (("student", 64), ("teacher", 128)):
        LlamaConfig(
            vocab_size=1000, hidden_size=width, num_hidden_layers=4, intermediate_size=256
        ).save_pretrained(tmp_path / name)
    recipe = LanguageRecipe(
        method=(method_options("kd", temperature=1.0, ce_weight=0.5),),
        data=LanguageDataSection(train="-", max_length=512),
        student=LanguageStudentSection(path=str(tmp_path / "student")),
        teacher=LanguageTeacherSection(path=str(tmp_path / "teacher"), precision="bf16"),
        training=LanguageTraining(batch_size=256, precision="bf16"),
    )
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert main(["doctor", str(tmp_path / "recipe.yaml"), "--plan"]) == 0
    out = capsys.readouterr().out
    assert "| 8 | 16384 |" in out and "| 256 | 512 |" in out
    assert "| 1024 | training.batch_size 256 is less than a row for each |" in out
    shapes = [ModelShape.of(LlamaConfig.from_pretrained(tmp_path / name)) for name in ("student", "teacher")]
    few, many = (plan_step(shapes[0], shapes[1], recipe, count, sharded=True) for count in (8, 64))
    assert many.optimizer * 8 == few.optimizer and many.sent == few.sent
    assert many.loss < few.eager_loss
    odd = recipe.replaced(training=recipe.training.replaced(batch_size=13))
    plan = plan_step(shapes[0], shapes[1], odd, 8, sharded=True)
    assert plan.tokens == 2 * 512, "five of the eight take two rows"


def test_shipped_recipe_and_configurations_are_read() -> None:
    """accelerate takes the files of recipes/accelerate, and the recipe is complete."""
    folder = Path(__file__).parents[2] / "recipes"
    recipe = load_recipe(folder / "code-lm-kd.yaml")
    assert recipe.training.batch_size % (8 * recipe.training.gradient_accumulation_steps) == 0
    assert load_config_from_file(str(folder / "accelerate" / "ddp.yaml")).distributed_type == "MULTI_GPU"
    config: Any = load_config_from_file(str(folder / "accelerate" / "fsdp2.yaml"))
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
