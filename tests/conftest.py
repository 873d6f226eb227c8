"""Tiny random models, tokenizers and adapters that every test can have in milliseconds."""

import importlib.util
import os
from pathlib import Path

# The Hub of all tests is a double on this machine; huggingface_hub reads its address once, when it is imported.
spec = importlib.util.spec_from_file_location("hub_double", Path(__file__).parent / "hub_double.py")
hub_double = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub_double)
HUB = hub_double.HubDouble(upload_mode="lfs", token="hf_test").start()
os.environ.update(
    HF_ENDPOINT=HUB.url,
    HF_TOKEN="hf_test",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # these matrices are too small to share
WORDS = "the a one two red blue cat dog sat ran good bad film review answer question yes no positive negative : . ? ,"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("MOA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def refusal(capsys):
    """What a command line answers to bad input: status 2, and one sentence on stderr, which is returned."""

    def refused(main, words):
        with pytest.raises(SystemExit) as stop:
            main(words)
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and last.startswith("error: ")
        return last

    return refused


@pytest.fixture
def hub():
    """The double of the Hub, and the requests that this test has made of it."""
    HUB.log.clear()
    return HUB


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A saved Llama of four layers with random weights, its tokenizer beside it."""
    torch.manual_seed(0)
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base():
    """A Llama of two layers that lives in memory only; copy it before you change it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def base_model(base_folder):
    return AutoModelForCausalLM.from_pretrained(base_folder).eval()


@pytest.fixture(scope="session")
def make_adapter(base_folder):
    """Write a LoRA adapter with random factors, as a user of PEFT would have trained one."""

    def make(path, *, seed=0, **config):
        torch.manual_seed(seed)
        config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base_folder), LoraConfig(task_type="CAUSAL_LM", **config)
        )
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def adapters(make_adapter, tmp_path_factory):
    """Three adapters of different ranks, scalings and target modules."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "cats": make_adapter(folder / "cats", seed=1),
        "dogs": make_adapter(
            folder / "dogs", seed=2, r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "o_proj"]
        ),
        "films": make_adapter(
            folder / "films",
            seed=3,
            r=8,
            target_modules=["q_proj", "k_proj", "down_proj"],
            rank_pattern={"k_proj": 3},
        ),
    }
