"""Training without padding: packed and padding-free batches train what padded ones do."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from moa.training.train_lora import LoraTrainingConfig, main
from moa.training.trainer import LoraTrainer


@pytest.fixture
def command(base_folder, tmp_path):
    def make(output, *more):
        return [
            *("--tasks", "sst2", "--model", str(base_folder), "--source", "pocket", "--attn_implementation", "eager"),
            *("--max_steps", "4", "--train_rows", "32", "--disable_tqdm", "true", "--logging_steps", "1"),
            *("--output_dir", str(tmp_path / output), *more),
        ]

    return make


@pytest.fixture
def train(command, tmp_path):
    """Train with the command line; the adapter's factors, its record, and the loss of every step."""

    def run(output, *more):
        main(command(output, *more))
        folder = tmp_path / output / "sst2"
        state = json.loads(next(folder.glob("checkpoint-*/trainer_state.json")).read_text())
        losses = [step["loss"] for step in state["log_history"] if "loss" in step]
        return load_file(folder / "adapter_model.safetensors"), folder / "moa_training.json", losses

    return run


@pytest.fixture
def trainer(base_folder, tmp_path):
    def make(kind, **config):
        tokenizer = AutoTokenizer.from_pretrained(base_folder)
        args = LoraTrainingConfig(str(tmp_path), report_to=[], **config)
        rows = [{"prompt": "the cat sat", "completion": " good"}, {"prompt": "film", "completion": " bad film ."}]
        from datasets import Dataset

        model = AutoModelForCausalLM.from_pretrained(base_folder)
        return kind(model=model, args=args, train_dataset=Dataset.from_list(rows * 4), processing_class=tokenizer)

    return make


@pytest.fixture
def examples():
    torch.manual_seed(0)
    rows = [torch.randint(3, 20, (length,)).tolist() for length in (9, 4, 6)]
    return [{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in rows]


def collated(examples, **options):
    return DataCollatorForLanguageModeling(pad_token_id=0, **options)(examples)


def test_padding_free_batches_train_the_adapter_that_padded_ones_train(train):
    more = ("--gradient_accumulation_steps", "2", "--activation_checkpointing", "true")
    padded, _, expected = train("padded", *more)
    free, _, losses = train("free", "--padding_free", "true", *more)
    assert losses == pytest.approx(expected, rel=1e-4)
    for name in padded:
        torch.testing.assert_close(free[name], padded[name], atol=2e-4, rtol=1e-3, msg=name)


def test_rows_are_cut_with_padding_and_without(train):
    whole = ("--max_steps", "1", "--padding_free", "true")
    cut = ("--max_length", "24", "--truncation_mode", "keep_end")
    _, _, expected = train("padded", *whole[:2], *cut)
    _, _, losses = train("free", *whole, *cut)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses != pytest.approx(train("whole", *whole)[2], rel=1e-4)


def test_packed_rows_train_and_the_record_says_so(train, command, refusal):
    factors, record, losses = train("packed", "--packing", "true", "--max_length", "128")
    assert all(torch.isfinite(factor).all() for factor in factors.values()) and losses[-1] < losses[0]
    kept = json.loads(record.read_text())
    assert kept["training"]["packing"] == "bfd" and kept["result"]["attention"] == "eager"
    assert "made otherwise (its training differ)" in refusal(main, command("packed", "--max_length", "128"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_loss_of_a_row_without_padding_is_that_of_the_padded_batch_and_of_trl(trainer, examples, attention):
    ours, trls = trainer(LoraTrainer), trainer(SFTTrainer)
    for one in (ours, trls):
        one.model.eval().set_attn_implementation(attention)
    padded, free = collated(examples), collated(examples, padding_free=True)
    expected = ours.compute_loss(ours.model, padded)
    torch.testing.assert_close(ours.compute_loss(ours.model, dict(free)), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(trls.compute_loss(trls.model, dict(free)), expected, atol=1e-6, rtol=1e-6)


def test_a_cache_would_let_a_packed_sequence_see_the_one_before_it(trainer, examples):
    """What the trainer has to prevent, whatever the model's own default is: transformers does not."""
    ours = trainer(LoraTrainer)
    model = ours.model.eval()
    batch = collated(examples, padding_free=True)
    ids = {name: batch[name] for name in ("input_ids", "position_ids")}
    apart = model(input_ids=torch.tensor([examples[1]["input_ids"]])).logits[0]
    second = slice(9, 13)
    torch.testing.assert_close(model(**ids, use_cache=False).logits[0, second], apart, atol=1e-5, rtol=1e-5)
    assert (model(**ids, use_cache=True).logits[0, second] - apart).abs().max() > 0.01
    model.config.use_cache = True
    torch.testing.assert_close(
        ours.compute_loss(model, batch), ours.compute_loss(model, collated(examples)), atol=1e-6, rtol=1e-6
    )


def test_a_packed_row_without_an_answer_costs_nothing_and_is_no_nan(trainer, examples):
    ours = trainer(LoraTrainer)
    silent = [{"input_ids": row["input_ids"], "labels": [-100] * len(row["labels"])} for row in examples]
    loss = ours.compute_loss(ours.model, collated(silent, padding_free=True))
    loss.backward()
    assert loss == 0


def test_an_attention_that_cannot_run_is_refused_before_anything_is_written(command, refusal, tmp_path):
    words = command("out")
    words[words.index("eager")] = "flash_attention_2"
    assert "'flash_attention_2' cannot run here (it needs a GPU, and this is a CPU)" in refusal(main, words)
    assert not (tmp_path / "out").exists()
