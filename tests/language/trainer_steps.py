"""Two optimizer steps of KDTrainer on rows made here; as a program under torchrun, on all its processes.

python -m tests.language.trainer_steps FOLDER KIND...

A folder for zero3 holds the models: `student`, which is then loaded in parts, and `teacher`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from kdtrain.engine.full_state import whole_state
from kdtrain.errors import KdtrainError
from kdtrain.hf_trainer import KDConfig, KDTrainer, open_teacher
from kdtrain.models.heads import decoder_layers
from kdtrain.outputs import IGNORED
from tests.language.conftest import VOCABULARY, tiny

ROWS_OF_A_STEP = 8


def tokens(rows: int = 32, masked: int = 0) -> Dataset:
    """Rows of 24 tokens, the first `masked` of which do not count."""
    ids = torch.randint(3, VOCABULARY, (rows, 24), generator=torch.Generator().manual_seed(1)).tolist()
    labels = [[IGNORED] * (masked + i % 5) + row[masked + i % 5 :] for i, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


class ShardedKDTrainer(KDTrainer):
    """accelerate knows FSDP2 on every device but the CPU, where it would run DDP in silence; here it does not."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
        )
        self.is_fsdp_enabled = True


KINDS: dict[str, tuple[type[KDTrainer], int]] = {
    "ddp": (KDTrainer, 0),
    "fsdp2": (ShardedKDTrainer, 0),
    "zero2": (KDTrainer, 2),
    "zero3": (KDTrainer, 3),
}
"""the class, and DeepSpeed's stage"""


def deepspeed(stage: int) -> dict[str, Any] | None:
    """A configuration as people have it, for a stage above 0."""
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": {"stage": stage}} | dict.fromkeys(automatic, "auto") if stage else None


def steps(
    folder: Path, *, processes: int = 1, accumulation: int = 1, name: str = "ddp"
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Losses of two steps, metrics of 7 held-out rows, and the student's weights (on the first process)."""
    kind, stage = KINDS[name]
    student, teacher = tiny("llama"), tiny("qwen3", 1, hidden_size=48)
    arguments = KDConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=ROWS_OF_A_STEP // (accumulation * processes),
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        deepspeed=deepspeed(stage),
        ce_weight=0.3,
    )
    if stage == 3:
        student = AutoModelForCausalLM.from_pretrained(folder / "student")
        assert student.lm_head.weight.numel() == 0, "each process has a part"
        with pytest.raises(KdtrainError, match="ZeRO 3 has cut the teacher"):
            open_teacher(student, "fp32")
    trainer = kind(
        student,
        str(folder / "teacher") if stage == 3 else teacher,
        args=arguments,
        train_dataset=tokens(16, 4),
        eval_dataset=tokens(7, 4),
    )
    if name in ("fsdp2", "zero3"):
        sharded = next(decoder_layers(trainer.known.model).parameters())
        assert isinstance(sharded, DTensor), "the teacher's layers are sharded"
    trainer.train()
    metrics = trainer.evaluate()
    found = {
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "norms": [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line],
        "metrics": [metrics[f"eval_{name}"] for name in ("loss", "divergence", "agreement")],
    }
    return found, whole_state(student)


def main() -> None:
    """The same on every process, in the kinds that are named; the first process writes what came out."""
    folder, count = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    for name in sys.argv[2:]:
        found, weights = steps(folder, processes=count, name=name)
        if distributed.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(found))
            whole = {key: value.contiguous() for key, value in weights.items()}
            save_file(whole, folder / f"{name}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
