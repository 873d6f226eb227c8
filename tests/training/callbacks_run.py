"""One of two processes of tests/training/test_callbacks.py: two trainers with all three callbacks."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig

from moa.model import MoaModel
from moa.training.callbacks import MergeCallback, PushFusedCallback, RoutingCallback
from moa.training.moa_trainer import MoaSFTTrainer

SETTINGS = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 2, "save_steps": 1}
SETTINGS |= {"use_cpu": True, "disable_tqdm": True}


def transformers_trainer(model, rows, output):
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=output, remove_unused_columns=False, **SETTINGS),
        train_dataset=rows,
        data_collator=lambda some: {name: torch.tensor([row[name] for row in some]) for name in some[0]},
    )


def trl_trainer(model, rows, output):
    return MoaSFTTrainer(
        model=model,
        args=SFTConfig(output_dir=output, bf16=False, max_length=None, gradient_checkpointing=True, **SETTINGS),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model.moa_config.base_model),
    )


def main(folder):
    rows = json.loads((folder / "rows.json").read_text())
    for name, make in (("transformers", transformers_trainer), ("trl", trl_trainer)):
        model = MoaModel.from_pretrained(None, folder / "mixture")
        model.set_requires_grad(["cats"])
        trainer = make(model, rows, str(folder / name))
        rank = trainer.args.process_index
        trainer.add_callback(RoutingCallback(trainer))
        trainer.add_callback(MergeCallback("average", lambda _, rank=rank: float(rank), trainer=trainer, when="save"))
        trainer.add_callback(PushFusedCallback(f"tester/two-{name}", "adapter"))
        trainer.train()
        (folder / f"{name}_{rank}.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
