"""`moa statistics`: each adapter reads its own rows, the file lies beside it, merges find it."""

import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa.adapters import read_adapter
from moa.cli import main as moa
from moa.merging import merge
from moa.merging.statistics import STATISTICS_FILE, read_statistics
from moa.model import MoaModel
from moa.tasks import Example, load_task
from moa.training.collect_statistics import main
from moa.training.expert_statistics import tokenised


@pytest.fixture
def folders(adapters, tmp_path):
    """Copies of two adapters of different layers, named after tasks."""
    pairs = zip(("sst2", "squad"), (adapters["cats"], adapters["films"]), strict=True)
    return {task: shutil.copytree(folder, tmp_path / "lora" / task) for task, folder in pairs}


@pytest.fixture
def command(base_folder, folders):
    def make(*more):
        return [
            *("--adapters", *map(str, folders.values()), "--tasks", "sst2", "squad", "--model", str(base_folder)),
            *("--source", "pocket", "--rows", "20", *more),
        ]

    return make


def test_each_file_holds_what_the_adapted_model_reads_on_its_own_rows(command, folders, base_folder, capsys):
    main(command("--fisher", "true"))
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    layers = {module for folder in folders.values() for module in read_adapter(folder).shapes}
    for task, folder in folders.items():
        stored = read_statistics(folder)
        assert set(stored) == layers
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder).eval()
        seen = []
        for example in load_task(task).examples("train", source="pocket", limit=20):
            ids = tokenizer(example.prompt + example.answer + "<eos>", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                hidden = model(ids, output_hidden_states=True).hidden_states[2]
            seen.append(model.get_base_model().model.layers[2].input_layernorm(hidden)[0].detach().double())
        x = torch.cat(seen)
        one = stored["model.layers.2.self_attn.q_proj"]
        assert one.tokens == len(x)
        torch.testing.assert_close(one.gram.double(), x.T @ x / len(x), rtol=1e-3, atol=1e-5)
        assert all(of.fisher.max() > 0 for of in stored.values())
        assert f"{len(layers)} layers, 20 rows, {len(x)} tokens" in capsys.readouterr().out or task == "squad"


def test_merges_find_the_files_and_batches_do_not_matter(command, folders):
    main(command())
    once = {task: read_statistics(folder) for task, folder in folders.items()}
    merged = merge(list(folders.values()), "regmean", rank=4)
    assert 0 < merged.report.facts["predicted_loss"] < 1
    assert not any("without_statistics" in layer.facts for layer in merged.report.layers.values())
    with pytest.raises(ValueError, match="hold no gradients: collect them with --fisher true"):
        merge(list(folders.values()), "fisher")
    grams = {task: {m: of[m].gram.clone() for m in of} for task, of in once.items()}
    main(command("--batch_size", "3", "--overwrite"))
    for task, folder in folders.items():
        for module, of in read_statistics(folder).items():
            torch.testing.assert_close(of.gram, grams[task][module], rtol=1e-3, atol=1e-6)


def test_what_is_there_is_kept_or_refused_or_overwritten(command, folders, capsys, refusal, monkeypatch):
    main(command())
    before = {task: (folder / STATISTICS_FILE).read_bytes() for task, folder in folders.items()}
    with monkeypatch.context() as patch:
        patch.setattr(MoaModel, "from_adapters", lambda *args, **kwargs: pytest.fail("loaded a model"))
        main(command())
        assert capsys.readouterr().out.count("\nkept ") == 2
        said = refusal(main, command("--rows", "10", "--max_length", "50"))
        assert "(its rows, text_sha256, max_length differ): pass --overwrite" in said
    assert all((folder / STATISTICS_FILE).read_bytes() == before[task] for task, folder in folders.items())
    main(command("--rows", "10", "--overwrite"))
    assert read_statistics(folders["squad"]).about["rows"] == 10
    main(command("--overwrite"))
    assert all((folder / STATISTICS_FILE).read_bytes() == before[task] for task, folder in folders.items())


def test_an_adapter_may_be_named_by_task_or_by_one_folder_of_all(command, folders, tmp_path, base_folder):
    rest = ["--model", str(base_folder), "--source", "pocket", "--rows", "4"]
    main(["--adapters", str(tmp_path / "lora"), "--tasks", "squad", *rest])
    assert (folders["squad"] / STATISTICS_FILE).is_file() and not (folders["sst2"] / STATISTICS_FILE).exists()
    moa(["statistics", "--adapters", f"sst2={folders['sst2']}", "--tasks", "sst2", *rest])
    assert read_statistics(folders["sst2"]).about["rows"] == 4


def test_a_mixture_of_adapters_with_statistics_is_made_saved_and_saved_again(command, folders, base_folder, tmp_path):
    main(command())
    model = MoaModel.from_adapters(str(base_folder), folders)
    model.save_pretrained(tmp_path / "moa")
    shutil.copy(folders["sst2"] / STATISTICS_FILE, tmp_path / "moa" / "sst2")
    MoaModel.from_pretrained(None, tmp_path / "moa").save_pretrained(tmp_path / "moa")
    merged = model.merge_adapters("regmean", statistics=list(folders.values()))
    disk = merge(list(folders.values()), "regmean")
    for module, update in disk.modules.items():
        assert torch.equal(update.A, merged.modules[module].A) and torch.equal(update.B, merged.modules[module].B)


def test_a_row_ends_and_is_cut_as_in_training(base_folder):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    example = Example("sst2", "the red cat :", " good", ("good",), (" good",), 0)
    ids, labels = tokenised(tokenizer, example, 100)
    assert tokenizer.decode(ids) == "the red cat : good <eos>"
    assert labels == [-100] * 4 + ids[4:]
    assert tokenised(tokenizer, example, 3) == (ids[:3], labels[:3])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--split", "test"], "--split must be train or validation, got 'test'"),
        (["--tasks", "sst2"], "--adapters names 2, --tasks 1: give each adapter its task"),
        (["--adapters", "nowhere", "elsewhere"], "there is no adapter folder nowhere for 'sst2'"),
        (["--adapters", "nowhere"], "there is no adapter folder nowhere/sst2"),
        (["--adapters", "mnli=x", "squad=y"], "names no task of sst2, squad"),
        (["--fishr", "true"], "did you mean '--fisher'"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_status_two(command, refusal, words, said, folders):
    assert said in refusal(main, command(*words))
    assert not any((folder / STATISTICS_FILE).exists() for folder in folders.values())


def test_one_adapter_for_two_tasks_is_refused(command, refusal, folders):
    same = str(folders["sst2"])
    assert "names one adapter twice" in refusal(main, command("--adapters", same, same))


def test_the_experts_of_a_mixture_are_found_in_its_folder(command, folders, base_folder, tmp_path):
    MoaModel.from_adapters(str(base_folder), folders).save_pretrained(tmp_path / "moa")
    main(command("--adapters", str(tmp_path / "moa")))
    assert all((tmp_path / "moa" / task / STATISTICS_FILE).is_file() for task in folders)


def test_a_mixture_merges_with_the_statistics_beside_its_experts(command, folders, base_folder, tmp_path):
    MoaModel.from_adapters(str(base_folder), folders).save_pretrained(tmp_path / "moa")
    main(command("--adapters", str(tmp_path / "moa")))
    model = MoaModel.from_pretrained(str(base_folder), tmp_path / "moa")
    merged = model.set_fallback("regmean", rank=2)
    expected = merge([tmp_path / "moa" / task for task in folders], "regmean", rank=2)
    assert merged.modules.keys() == expected.modules.keys()
    for name, update in expected.modules.items():
        assert torch.equal(merged.modules[name].A, update.A) and torch.equal(merged.modules[name].B, update.B)
    del model.expert_folders["squad"]
    with pytest.raises(ValueError, match="is in memory, with no file of statistics beside it"):
        model.merge_fallback_again()
