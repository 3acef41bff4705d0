"""The table, pictures and completions of the language-model demo."""

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import torch
from matplotlib.ticker import EngFormatter
from transformers import PreTrainedTokenizerBase

from kdtrain.evaluation.metrics import read_metrics
from kdtrain.files import human_bytes, write_atomic, write_json
from kdtrain.models.language_teacher import load_causal
from kdtrain.models.loading import load_tokenizer
from kdtrain.plots import legend_beside, plt, save_figure
from kdtrain.summary import Summary, installed_versions

NEW_TOKENS = 32


def write_language_report(output: Path, summaries: Mapping[str, Summary], prompts: Sequence[str]) -> str:
    """Write report.md, report.json and learning_curves.png; give the Markdown."""
    data = next(iter(summaries.values())).data
    versions = installed_versions()
    lines = [
        f"# A language model of Python code, {date.today().isoformat()}",
        "",
        f"{data['tokens']['train']:,} training tokens and {data['tokens']['valid']:,} held-out ones; "
        f"{torch.get_num_threads()} threads, torch {versions['torch']}. One seed: differences of the size of chance are not "
        "told from others here. Divergence: forward KL at temperature 1, in nats a token.",
        "",
        "| model | parameters | steps | held-out loss | perplexity | same best token as teacher | divergence from teacher "
        "| tokens/s | peak memory | trained in |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(name, summary) for name, summary in summaries.items()),
        "",
        "## Completions",
        "",
        f"The likeliest {NEW_TOKENS} tokens behind the beginnings of held-out functions.",
        *_completions(output, summaries, prompts),
        "",
        f"Picture: {output / 'learning_curves.png'}. Students to load with AutoModelForCausalLM: {output / 'runs'}/*/student",
    ]
    learning_picture({name: output / "runs" / one.name for name, one in summaries.items()}, output)
    write_json(
        output / "report.json",
        {
            "models": {
                name: {"student": one.student, "valid": one.valid, "training": one.training}
                for name, one in summaries.items()
            },
            "data": data,
            "versions": versions,
        },
    )
    text = "\n".join(lines) + "\n"
    write_atomic(output / "report.md", text)
    return text


def _row(name: str, summary: Summary) -> str:
    found, training = summary.valid, summary.training
    cells = [
        name,
        f"{summary.student['parameters'] / 1e6:.2f} M",
        str(training["steps"]),
        f"{found['loss']:.3f}",
        f"{found['perplexity']:.1f}",
        f"{found['agreement']:.1%}" if "agreement" in found else "",
        f"{found['divergence']:.3f}" if "divergence" in found else "",
        f"{training['tokens_per_second']:.0f}",
        human_bytes(training["peak_memory_bytes"]),
        f"{training['seconds']:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def _completions(output: Path, summaries: Mapping[str, Summary], prompts: Sequence[str]) -> list[str]:
    models = {
        name: load_causal(str(output / "runs" / one.name / "student"), "student").eval()
        for name, one in summaries.items()
    }
    tokenizer = load_tokenizer(str(output / "tokenizer"), "student.tokenizer")
    lines = []
    for prompt in prompts:
        lines += ["", "```python", prompt.rstrip("\n"), "```", ""]
        for name, model in models.items():
            lines.append(f"- {name}: `{complete(model, tokenizer, prompt)}`")
    return lines


@torch.inference_mode()
def complete(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The likeliest tokens behind a prompt, in one line."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    longest = int(model.config.max_position_embeddings) - NEW_TOKENS  # type: ignore[union-attr]
    ids = ids[:, -longest:]
    made = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    text = str(tokenizer.decode(made[0, ids.shape[1] :].tolist()))
    return text.replace("\n", "⏎").replace("`", "'")


def learning_picture(runs: Mapping[str, Path], output: Path) -> None:
    """Training loss and held-out loss over tokens, one line a run."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
    for name, folder in runs.items():
        lines = read_metrics(folder)
        steps = {line["step"]: line["tokens"] for line in lines if "tokens" in line}
        training = [(line["tokens"], line["loss"]) for line in lines if "loss" in line]
        valid = [
            (steps[line["step"]], line["valid/loss"])
            for line in lines
            if line["step"] in steps and "valid/loss" in line
        ]
        left.plot(*zip(*training, strict=True), label=name) if training else None
        right.plot(*zip(*valid, strict=True), marker="o", label=name) if valid else None
    left.set(xlabel="tokens", ylabel="training loss (each its own)")
    right.set(xlabel="tokens", ylabel="held-out cross entropy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend_beside(figure, right)
    save_figure(figure, output / "learning_curves.png")
