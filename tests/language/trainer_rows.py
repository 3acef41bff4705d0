"""KDTrainer measures seven rows, as a program under torchrun, with what collators and data sets do to them.

python -m tests.language.trainer_rows FOLDER
"""

import json
import sys
from pathlib import Path

from torch import distributed
from transformers import DataCollatorWithFlattening

from kdtrain.errors import KdtrainError
from kdtrain.hf_trainer import KDConfig, KDTrainer
from tests.language.conftest import tiny
from tests.language.trainer_steps import tokens


def measured(folder: Path, *, rows: int = 7, flat: bool = False, streamed: bool = False) -> float | str:
    """The divergence over all rows, or why there is none."""
    data = tokens(rows)
    trainer = KDTrainer(
        tiny("llama"),
        tiny("qwen3", 1),
        args=KDConfig(output_dir=str(folder), use_cpu=True, report_to=[], per_device_eval_batch_size=2),
        eval_dataset=data.to_iterable_dataset() if streamed else data,
        data_collator=DataCollatorWithFlattening() if flat else None,
    )
    try:
        return trainer.evaluate()["eval_divergence"]
    except KdtrainError as error:
        return str(error)


def main() -> None:
    """The first process writes what came out."""
    folder = Path(sys.argv[1])
    found = {
        "streamed": measured(folder, streamed=True),
        "flat": measured(folder, rows=8, flat=True),
        "flat and odd": measured(folder, flat=True),
    }
    if distributed.get_rank() == 0:
        (folder / "rows.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
