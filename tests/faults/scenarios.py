"""The commands that are hurt. A new one is a function that writes its inputs and names its recipe, and a line in SCENARIOS."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

TOY = "def {name}({key}, d):\n{body}    try:\n        return {call}\n    except __HOLE__:\n        pass\n"
CALLS = ("d[{key}]", "int({key}, 8) + 1", "open({key}).read()")


@dataclass(frozen=True)
class Scenario:
    """A command on inputs of its own."""

    name: str
    words: tuple[str, ...]
    """of the command line; {root} is the folder of the scenario"""
    results: tuple[str, ...]
    """files, as patterns below `output`, that must be the same to the byte after any fault and a second run"""
    inputs: Callable[[Path, Path], None]
    """write the recipe below a folder; the second folder holds what `prepare` made"""
    then: tuple[str, ...] = ()
    """further words of the second run, which has to find all damage"""

    def command(self, root: Path, *, second: bool = False) -> Callable[[], int]:
        """The command in this folder."""
        words = [word.replace("{root}", str(root)) for word in self.words + (self.then if second else ())]

        def run() -> int:
            from kdtrain.cli import main

            return main(words)

        return run

    def result(self, root: Path) -> dict[str, str]:
        """Hashes of the files that count, and of the rows that stores hold, by name."""
        found = {}
        for pattern in self.results:
            for path in sorted((root / "output").glob(pattern)):
                if path.name.startswith("shard-"):  # a resumed build cuts the same rows into other files
                    found.update(stored_rows(path))
                elif path.is_file() and path.name != ".lock":
                    name = str(path.relative_to(root / "output"))
                    found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


def stored_rows(shard: Path) -> dict[str, str]:
    """A hash of every row of a shard in every tensor, by key and tensor."""
    tensors = load_file(shard)
    keys, lengths = tensors.pop("keys"), tensors.pop("lengths")
    del tensors["checksums"]
    sizes = lengths.reshape(len(keys), -1).sum(1).tolist()
    return {
        f"{bytes(key.tolist()).hex()} {name}": hashlib.sha256(
            part.contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, values in tensors.items()
        for key, part in zip(keys, values.split(sizes), strict=True)
    }


def temporaries(root: Path) -> list[Path]:
    """Leftovers of a killed command."""
    return [path for path in root.rglob("*") if path.name.endswith((".tmp", ".old"))]


# ---- inputs: small enough that a whole run takes about a second

ENCODER = {
    "vocab_size": 320,
    "hidden_size": 16,
    "layers": 1,
    "heads": 2,
    "intermediate_size": 32,
    "max_length": 32,
}
DECODER = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32}
TRAINING = {"max_steps": 6, "batch_size": 8, "eval_steps": 2, "logging_steps": 2, "learning_rate": 3e-3}


def toy_rows(folder: Path) -> None:
    """A data set of three classes."""
    folder.mkdir(parents=True)
    for name, count, seed in (("train", 48, 1), ("valid", 12, 2), ("test", 12, 3)):
        generator = random.Random(seed)
        rows = []
        for _ in range(count):
            label = generator.randrange(3)
            word, key = ("".join(generator.choices(letters, k=3)) for letters in ("abcdefgh", "uvwxyz"))
            body = "".join(
                f"    {v} = {key} + 1\n" for v in generator.choices("pqrst", k=generator.randrange(4))
            )
            call = CALLS[label].format(key=key)
            rows.append({"code": TOY.format(name=word, key=key, body=body, call=call), "label": label})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"task": "classification", "name": "toy", "text": "code", "label": "label", "focus": "__HOLE__"}
    classes = ["KeyError", "ValueError", "OSError"]
    (folder / "dataset.json").write_text(json.dumps({**about, "classes": classes}))


def toy_code(folder: Path) -> None:
    """A folder of source code."""
    folder.mkdir(parents=True)
    for i in range(24):
        lines = "".join(f"    a = a + {j} * b\n" for j in range(i % 5))
        (folder / f"m{i}.py").write_text(f"def add_{i}(a, b):\n{lines}    return a\n")


def write_recipe(root: Path, **sections: object) -> None:
    """`recipe.yaml`, whose run goes to `output`."""
    (root / "recipe.yaml").write_text(yaml.safe_dump({**sections, "output": str(root / "output")}))


def classifier(root: Path, shared: Path) -> None:
    """Labels alone."""
    write_recipe(
        root,
        task="classification",
        data={"path": str(shared / "rows")},
        student=ENCODER,
        method={"name": "ft"},
        training=TRAINING,
    )


def distilled_classifier(root: Path, shared: Path) -> None:
    """Soft labels and hidden states of a stored teacher."""
    write_recipe(
        root,
        task="classification",
        data={"path": str(shared / "rows")},
        student=ENCODER,
        teacher={"path": str(shared / "classifier")},
        method={"name": "kd_features"},
        training=TRAINING,
    )


def language_model(root: Path, shared: Path) -> None:
    """A student of a teacher that runs in every step."""
    write_recipe(
        root,
        task="code_lm",
        data={"train": str(shared / "code"), "max_length": 32, "held_out": 0.2},
        student=DECODER,
        teacher={"path": str(shared / "language_model")},
        method={"name": "kd"},
        training=TRAINING,
    )


def stored_language_model(root: Path, shared: Path) -> None:
    """A student of stored top-k entries."""
    language_model(root, shared)
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    recipe["teacher"] |= {"signal": "topk", "top_k": 8}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def encoder(root: Path, shared: Path) -> None:
    """A masked language model."""
    write_recipe(
        root,
        task="masked_lm",
        data={"train": [str(shared / "code")], "held_out": 0.2},
        student=ENCODER,
        training=TRAINING,
    )


TRAINED = ("student/*", "projection.safetensors", "predictions/*")
SCENARIOS = (
    Scenario("train classifier, ft", ("train", "{root}/recipe.yaml"), TRAINED, classifier),
    Scenario("train classifier, kd_features", ("train", "{root}/recipe.yaml"), TRAINED, distilled_classifier),
    Scenario("train language model, kd", ("train", "{root}/recipe.yaml"), TRAINED, language_model),
    Scenario("train language model, topk", ("train", "{root}/recipe.yaml"), TRAINED, stored_language_model),
    Scenario("train masked language model", ("train", "{root}/recipe.yaml"), TRAINED, encoder),
    Scenario(
        "cache classifier",
        ("cache", "{root}/recipe.yaml"),
        ("teacher_cache/**/*",),
        distilled_classifier,
        ("--verify",),
    ),
    Scenario(
        "cache language model",
        ("cache", "{root}/recipe.yaml"),
        ("teacher_cache/**/*",),
        stored_language_model,
        ("--verify",),
    ),
)


def prepare(shared: Path) -> None:
    """Data and teachers that all scenarios read."""
    from kdtrain.cli import main

    toy_rows(shared / "rows")
    toy_code(shared / "code")
    for name, write in (("classifier", classifier), ("language_model", None)):
        root = shared / f"made_{name}"
        root.mkdir()
        if write is not None:
            write(root, shared)
        else:
            tokenizer(shared / "tokenizer", shared / "code")
            write_recipe(
                root,
                task="code_lm",
                data={"train": str(shared / "code"), "max_length": 32, "held_out": 0.2},
                student={**DECODER, "tokenizer": str(shared / "tokenizer")},
                method={"name": "ft"},
                training=TRAINING,
            )
        assert main(["train", str(root / "recipe.yaml")]) == 0
        (root / "output" / "student").rename(shared / name)


def tokenizer(folder: Path, code: Path) -> None:
    """A byte-level BPE of the toy code."""
    from kdtrain.models.tokenizers import train_tokenizer

    texts = [path.read_text() for path in sorted(code.glob("*.py"))]
    made = train_tokenizer(texts, vocab_size=300, max_length=1 << 20)
    made.backend_tokenizer.post_processor = None
    made.save_pretrained(folder)
