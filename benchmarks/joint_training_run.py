"""One way to train the adapters of joint_training.py, in a process of its own; prints what it took as JSON."""

from __future__ import annotations

import argparse
import platform
import random
import resource
import sys
import time
from typing import Any

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "qwen2-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "qwen2-1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}
ANSWER = 16
SEED = 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in one way, and leave the adapters in the folder."""
    import torch

    from moa.attention import attention_of

    model, rows = base_model(arguments), task_rows(arguments)
    cuda = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if cuda else resident()
    if cuda:  # it was made in float32, which is no part of the training
        torch.cuda.reset_peak_memory_stats()
    watch = stopwatch(time.perf_counter if cuda else time.process_time, cuda)
    train = train_alone if arguments.way == "alone" else train_jointly
    train(arguments, model, rows, watch)
    peak = torch.cuda.max_memory_allocated() if cuda else resident()
    return {
        "seconds": watch.seconds,
        "tokens": sum(sum(map(len, of_task["input_ids"][arguments.batch :])) for of_task in rows.values()),
        "megabytes": (peak - before) / 2**20,
        "layers": model.config.num_hidden_layers,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "attention": attention_of(model),
    }


def train_alone(arguments: argparse.Namespace, model: Any, rows: dict[str, Any], watch: Any) -> None:
    from transformers import set_seed

    from moa.training.trainer import LoraTrainer

    for name, of_task in rows.items():
        set_seed(SEED)
        trainer = LoraTrainer(
            model,
            settings(arguments),
            train_dataset=of_task,
            processing_class=tokenizer(),
            peft_config=lora_config(arguments),
            callbacks=[watch],
        )
        trainer.train()
        trainer.model.save_pretrained(arguments.folder / "alone" / name)
        trainer.model.unload()


def train_jointly(arguments: argparse.Namespace, model: Any, rows: dict[str, Any], watch: Any) -> None:
    from moa.training.joint_trainer import JointTrainer
    from moa.training.lora import add_adapters

    training = settings(arguments)
    trainer = JointTrainer(
        add_adapters(model, dict.fromkeys(rows, lora_config(arguments)), SEED),
        training,
        datasets=rows,
        learning_rates=dict.fromkeys(rows, training.learning_rate),
        batch_size=arguments.batch * (arguments.tasks if arguments.way == "joint, wide" else 1),
        processing_class=tokenizer(),
        callbacks=[watch],
    )
    trainer.train()
    trainer.model.save_pretrained(arguments.folder / arguments.way)


def base_model(arguments: argparse.Namespace) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from moa.attention import set_attention

    cuda = torch.cuda.is_available()
    shape = dict(SHAPES[arguments.shape])
    shape["num_hidden_layers"] = arguments.layers or (
        shape["num_hidden_layers"] if cuda else min(4, shape["num_hidden_layers"])
    )
    torch.manual_seed(SEED)
    config = Qwen2Config(vocab_size=151_936, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    with torch.device("cuda" if cuda else "cpu"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16 if cuda else torch.float32).eval()
    if arguments.padding_free:
        set_attention(model, packing=True)
    return model


def task_rows(arguments: argparse.Namespace) -> dict[str, Any]:
    """Random tokens: rows of task i of n have about 1/4 + 3/4 i/(n - 1) of --tokens, give or take --spread."""
    from datasets import Dataset

    draw = random.Random(SEED)
    rows = {}
    for task in range(arguments.tasks):
        middle = arguments.tokens * (0.25 + 0.75 * task / max(1, arguments.tasks - 1))
        drawn = [draw.uniform(-1, 1) * arguments.spread for _ in range((arguments.steps + 1) * arguments.batch)]
        lengths = [max(ANSWER + 1, round(middle * (1 + share))) for share in drawn]
        ids = [[draw.randrange(3, 1000) for _ in range(length)] for length in lengths]
        labels = [[-100] * (len(row) - ANSWER) + row[-ANSWER:] for row in ids]
        rows[f"task{task}"] = Dataset.from_dict({"input_ids": ids, "labels": labels})
    return rows


def settings(arguments: argparse.Namespace) -> Any:
    from moa.training.train_lora import LoraTrainingConfig

    return LoraTrainingConfig(
        output_dir=str(arguments.folder / "scratch"),
        per_device_train_batch_size=arguments.batch,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        padding_free=arguments.padding_free,
        pad_to_multiple_of=arguments.pad_to_multiple_of or None,
        seed=SEED,
    )


def lora_config(arguments: argparse.Namespace) -> Any:
    from peft import LoraConfig

    targets = "all-linear" if arguments.all_linear else ["q_proj", "k_proj", "v_proj", "o_proj"]
    return LoraConfig(task_type="CAUSAL_LM", r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules=targets)


def tokenizer() -> Any:
    """TRL asks for one, although the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def stopwatch(clock: Any, cuda: bool) -> Any:
    """Adds up the steps of a run but the first, which warms up."""
    import torch
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        seconds = 0.0

        def now(self) -> float:
            if cuda:
                torch.cuda.synchronize()
            return clock()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = self.now()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > 1:
                self.seconds += self.now() - self.started

    return Stopwatch()


def resident() -> int:
    """Most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
