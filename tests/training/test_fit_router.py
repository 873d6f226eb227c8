"""Fitting a router: what is compared, what it is fitted to, what is told, and what a killed fit leaves."""

import json
from dataclasses import asdict
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from moa.model import MoaModel
from moa.tasks import load_task
from moa.tasks.pocket import pocket_rows
from moa.training.adapter_losses import losses_of_experts
from moa.training.fit_router import main
from moa.training.label_noise import find_label_noise
from moa.training.prompt_features import PromptFeatures
from moa.training.router_choice import Candidate, Judged, Split, best_of, compare, unbeatable
from moa.training.router_doubt import Strangeness
from moa.training.router_fit import RouterFit, places_of_answers
from moa.training.router_options import RouterChoices
from moa.training.router_trainer import RouterTrainer

NAMES = ("sst2", "squad", "piqa")


@pytest.fixture
def mixture(base_folder, adapters, tmp_path):
    """A saved mixture without a router."""
    model = MoaModel.from_adapters(str(base_folder), dict(zip(NAMES, adapters.values(), strict=True)))
    model.moa_config.scores = {"moa: share": 0.4, "merge:svd: share": 0.3}
    model.save_pretrained(tmp_path / "moa")
    return tmp_path / "moa"


@pytest.fixture
def command(mixture):
    def make(*more, plain=False):
        return [
            *(str(mixture), "--train_rows", "24", "--validation_rows", "8", "--num_train_epochs", "3"),
            *(
                "--plain_prompts",
                "true" if plain else "false",
                "--disable_tqdm",
                "true",
                *(() if "--data_dir" in more else ("--source", "pocket")),
                *more,
            ),
        ]

    return make


ONE = ("--layers", "1", "--poolings", "mean", "--heads", "linear")


@pytest.fixture
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


def tokenized(model, prompt):
    return dict(AutoTokenizer.from_pretrained(model.get_base_model().name_or_path)(prompt, return_tensors="pt"))


def reported(mixture):
    return json.loads((mixture / "router_fit" / "router_report.json").read_text())


def router_of(mixture):
    return load_file(mixture / "moa_router.safetensors")


def share_of_own(model, tokenizer):
    """How many of the held-out prompts the model routes to their own expert."""
    right = []
    for place, name in enumerate(NAMES):
        prompts = [one.prompt for one in load_task(name).examples("validation", source="pocket", limit=8)]
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        right += [chosen == place for chosen in model.route(batch["input_ids"], batch["attention_mask"]).experts]
    return sum(right) / len(right)


def test_every_layer_pooling_and_head_is_compared_and_the_best_is_saved(
    command, mixture, tokenizer, capsys, monkeypatch
):
    for module in ("router_choice", "router_fit"):  # these prompts are so easy that the first router would do
        monkeypatch.setattr(f"moa.training.{module}.unbeatable", lambda judged: False)
    main(command())
    found = reported(mixture)
    asked = {(one["layer"], one["pooling"], one["head"]) for one in found["compared"]}
    fixed = set(product((1, 2), ("mean", "last"), ("centroid", "linear", "mlp")))
    layers = {layer for layer, pooling, _ in asked if pooling == "attention"}
    assert len(layers) == 1
    assert asked == fixed | {(layer, "attention", head) for layer in layers for head in ("linear", "mlp")}
    best = max(one["accuracy"] for one in found["compared"])
    loaded = MoaModel.from_pretrained(None, mixture)
    config, chosen = loaded.moa_config, found["chosen"]
    assert (config.router.layer, config.router.pooling, config.router.head) == tuple(chosen.values())
    assert found["accuracy"] == best == config.scores["router accuracy on held-out prompts"]
    assert share_of_own(loaded, tokenizer) == pytest.approx(found["accuracy"])
    assert config.router.experts == list(NAMES) and config.router.base_sha256 and config.router.tokenizer_sha256
    assert "moa: share" not in config.scores and config.scores["merge:svd: share"] == 0.3
    said = capsys.readouterr().out
    assert "chosen" in said and "95 % interval" in said and "squad" in said


def test_a_comparison_ends_with_the_first_router_that_none_could_beat():
    class Told:
        """Features that are the answer at layer 2, and nothing at layer 1."""

        def pooled(self, layer, pooling):
            return F.one_hot(torch.arange(12) % 3, 3).float() * (layer == 2)

    split = Split(Told(), F.one_hot(torch.arange(12) % 3, 3).float())
    candidates = [Candidate(layer, "mean", head) for layer in (3, 2, 1) for head in ("centroid",)]
    judged = compare(candidates, split, split, 8, TrainingArguments(output_dir="unused", use_cpu=True))
    assert [one.candidate.layer for one in judged] == [1, 2]
    assert best_of(judged) is judged[-1] and unbeatable(judged[-1]) and not unbeatable(judged[0])


def test_features_are_read_once_and_only_of_layers_that_are_new(base_model, tokenizer, monkeypatch):
    prompts = ["the red cat sat .", "one dog ran", "a film"]
    first = PromptFeatures(base_model, tokenizer, prompts, batch_size=2)
    assert first.read([1, 2]) == 3 and first.read([2]) == 0
    again = PromptFeatures(base_model, tokenizer, prompts, batch_size=3)
    assert again.read([1, 2]) == 0 and again.read([1, 3]) == 3
    for layer in (1, 2, 3):
        for index, prompt in enumerate(prompts):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            states = base_model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
            torch.testing.assert_close(first.pooled(layer, "mean")[index], states.mean(dim=0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(first.pooled(layer, "last")[index], states[-1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(first.states(layer)[index], states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompts", [["one dog ran", "", "a film"], ["one dog ran", " "], ["", ""]])
def test_a_prompt_without_a_token_has_no_features(base_model, tokenizer, prompts):
    place = next(place for place, prompt in enumerate(prompts) if not prompt.strip())
    with pytest.raises(ValueError, match=f"prompt {place} of {len(prompts)}, '.?', has none: leave it out"):
        PromptFeatures(base_model, tokenizer, prompts)


@pytest.mark.parametrize("objective, pooling", [("task", "attention"), ("language_model", "mean")])
def test_a_killed_fit_resumes_to_the_same_router(command, mixture, monkeypatch, objective, pooling):
    words = command(*ONE, "--poolings", pooling, "--objective", objective, "--language_model_epochs", "3")
    main(words)
    whole = router_of(mixture)
    original, steps = RouterTrainer.training_step, []

    def watched(self, *args, **kwargs):
        if self.args.save_strategy != "no":
            if "--resume_from_checkpoint" in words:
                steps.append(self.state.global_step)
            elif self.state.global_step > self.state.max_steps // 2:
                raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RouterTrainer, "training_step", watched)
    with pytest.raises(SystemExit):
        main([*words, "--overwrite"])
    assert not (mixture / "router_fit" / "router_report.json").exists()
    words.append("--resume_from_checkpoint")
    main(words)
    assert steps[0] > 0
    resumed = router_of(mixture)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert MoaModel.from_pretrained(None, mixture).moa_config.router.objective == objective


def test_a_fit_is_kept_and_another_is_asked_for(command, mixture, refusal, capsys):
    main(command(*ONE))
    before = router_of(mixture)
    main(command(*ONE))
    assert "kept the router" in capsys.readouterr().out
    assert "--overwrite" in refusal(main, command(*ONE, "--heads", "centroid"))
    assert all(torch.equal(before[name], tensor) for name, tensor in router_of(mixture).items())
    main(command(*ONE, "--heads", "centroid", "--overwrite"))
    assert MoaModel.from_pretrained(None, mixture).moa_config.router.head == "centroid"


def test_a_fit_that_is_refused_leaves_the_report_of_the_one_that_it_was_to_replace(command, mixture, refusal, capsys):
    main(command(*ONE))
    before = {file: file.read_bytes() for file in (mixture / "router_fit").iterdir() if file.is_file()}
    assert "cannot read layer 9" in refusal(main, command(*ONE, "--layers", "9", "--overwrite"))
    assert {file: file.read_bytes() for file in (mixture / "router_fit").iterdir() if file.is_file()} == before
    main(command(*ONE))
    assert "kept the router" in capsys.readouterr().out


def test_losses_of_experts_are_those_of_each_adapter_alone(mixture, tokenizer, adapters, base_folder):
    from peft import PeftModel

    from moa.answer_rows import tokenised

    model = MoaModel.from_pretrained(None, mixture)
    examples = load_task("sst2").examples("train", source="pocket", limit=3)
    examples += load_task("piqa").examples("train", source="pocket", limit=2)
    rows = [tokenised(tokenizer, example, 0) for example in examples]
    found = losses_of_experts(model, rows, padding=tokenizer.pad_token_id, batch_size=4)
    for column, path in enumerate(adapters.values()):
        alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), path).eval()
        for place, row in enumerate(rows):
            labels = torch.tensor([[-100] * (len(row.ids) - row.answer) + row.ids[-row.answer :]])
            with torch.no_grad():
                loss = alone(input_ids=torch.tensor([row.ids]), labels=labels).loss
            torch.testing.assert_close(found[place, column], loss, rtol=1e-4, atol=1e-4)


def test_utility_sends_prompts_to_the_expert_that_answers_best(command, mixture):
    main(command(*ONE, "--objective", "utility", "--num_train_epochs", "30"))
    loss = reported(mixture)["answer_loss"]
    assert loss["best"] <= loss["router"] < loss["own"]  # these random adapters know nothing of their tasks


def test_the_language_model_objective_learns_weights_that_answer_better(command, mixture):
    losses = []
    original = RouterTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        found = original(self, model, inputs, *args, **kwargs)
        if self.mixture is not None and model.training:
            losses.append(found.item())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RouterTrainer, "compute_loss", watched)
        words = ("--objective", "language_model", "--language_model_epochs", "4", "--language_model_batch_size", "24")
        main(command(*ONE, *words))
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.fixture
def one_example(tmp_path):
    """Three tasks of the user's own; one of them has a single row."""
    for name, generator, count in (("sst2", "sentiment", 1), ("squad", "qa", 12), ("piqa", "commonsense", 12)):
        for split in ("train", "validation"):
            file = tmp_path / "data" / name / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in pocket_rows(generator, split)[:count]))
    return tmp_path / "data"


def test_a_row_without_a_text_is_refused_before_anything_is_fitted(command, mixture, one_example, refusal):
    file = one_example / "sst2" / "train.jsonl"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sentence": " "}))
    said = refusal(main, command(*ONE, "--data_dir", str(one_example)))
    assert "train.jsonl, line 1: no text in 'sentence'" in said and not (mixture / "router_fit").exists()


def test_a_task_with_one_example_works_and_says_what_rests_on_it(command, mixture, one_example, capsys):
    main(command(*ONE, "--data_dir", str(one_example)))
    said = capsys.readouterr().out
    assert "sst2 has one training prompt: whether its label is right could not be checked" in said
    assert "sst2 has 1 held-out prompt: its accuracy says almost nothing" in said
    low, high = reported(mixture)["experts"]["sst2"]["interval"]
    assert high - low > 0.5


def test_labels_that_are_wrong_are_found_and_said():
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(40)
    features = torch.randn(120, 8) + 6 * torch.nn.functional.one_hot(labels, 8)
    labels[5], labels[70] = 0, 2
    noise = find_label_noise(features, labels, NAMES)
    assert noise.suspects == {"sst2": [5], "piqa": [70]} and noise.share == 2 / 120
    assert find_label_noise(features, torch.cat([labels[:-1], torch.tensor([3])]), [*NAMES, "lone"]).unchecked == [
        "lone"
    ]
    assert find_label_noise(features[:2], torch.tensor([0, 1]), NAMES[:2]).checked == 0


def judged(accuracy, losses, candidate):
    right = torch.arange(len(losses)) < accuracy * len(losses)
    return Judged(candidate, right.long(), right, torch.tensor(losses), 1.0)


def test_accuracy_then_likelihood_then_cost_choose():
    cheap, simple, dear = Candidate(1, "mean", "linear"), Candidate(1, "mean", "centroid"), Candidate(2, "last", "mlp")
    alike = [judged(1.0, [0.1, 0.4, 0.2, 0.3], dear), judged(1.0, [0.4, 0.1, 0.3, 0.3], cheap)]
    assert best_of(alike).candidate == cheap
    assert best_of([*alike, judged(1.0, [0.4, 0.1, 0.3, 0.3], simple)]).candidate == simple
    assert best_of([alike[0], judged(1.0, [0.5, 0.8, 0.6, 0.7], cheap)]).candidate == dear
    many = [0.1, 0.4] * 20
    assert best_of([judged(1.0, many, cheap), judged(0.975, many, simple)]).candidate == simple  # one of 40 is luck
    assert best_of([judged(1.0, many, cheap), judged(0.75, many, simple)]).candidate == cheap


def test_a_linear_router_is_as_accurate_as_sklearns(command, mixture, tokenizer):
    main(command(*ONE, "--num_train_epochs", "30"))
    model = MoaModel.from_pretrained(None, mixture)
    splits = []
    for split, limit in (("train", 24), ("validation", 8)):
        prompts = [[one.prompt for one in load_task(n).examples(split, source="pocket", limit=limit)] for n in NAMES]
        labels = [place for place, of_one in enumerate(prompts) for _ in of_one]
        with model.using_base():
            found = PromptFeatures(model.get_base_model(), tokenizer, sum(prompts, [])).pooled(1, "mean")
        splits.append((model.moa_router.standardised(found).numpy(), labels))
    expected = LogisticRegression(max_iter=1000).fit(*splits[0]).score(*splits[1])
    assert reported(mixture)["accuracy"] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layers", "9"], "the router cannot read layer 9: this model has layers 1 to 4"),
        (["--poolings", "max"], "--poolings max does not exist: choose from mean, last, attention"),
        (["--heads", "tree"], "--heads tree does not exist"),
        (["--objective", "luck"], "--objective luck does not exist: choose from task, utility, language_model"),
        (["--tau", "0"], "--tau must be above 0, got 0"),
        (["--heads", "centroid", "--objective", "language_model"], "nothing that --objective language_model could"),
        (["--heads", "centroid", "--poolings", "attention"], "has a query to train"),
        (["--tasks", "sst2"], "at least two tasks"),
        (["--tasks", "sst2", "mnli"], "the mixture's experts are sst2, squad, piqa, the tasks sst2, mnli"),
        (["--mixture", "nowhere"], "nowhere is no folder of a saved mixture"),
    ],
)
def test_bad_input_is_one_sentence_and_status_two(command, mixture, refusal, words, said):
    before = (mixture / "moa_config.json").read_bytes()
    assert said in refusal(main, command(*words))
    assert (mixture / "moa_config.json").read_bytes() == before


def test_what_the_router_doubts_is_measured_on_held_out_prompts_and_saved(command, mixture, capsys):
    main(command(*ONE, "--ood_rate", "0.2", "--coverage", "0.8"))
    model, found = MoaModel.from_pretrained(None, mixture), reported(mixture)
    router, limits = model.moa_config.router, model.moa_config.router.abstention
    assert (limits.score, limits.rate, router.conformal.coverage) == ("both", 0.2, 0.8)
    assert asdict(limits) == found["abstention"] and asdict(router.calibration) == found["calibration"]
    strange = []
    for name in NAMES:
        for example in load_task(name).examples("validation", source="pocket", limit=8, seed=42):
            strange.append(float(model.route(**tokenized(model, example.prompt)).strangeness))
    assert limits.base_above >= limits.merged_above == 1
    beyond = sum(one > 1 + 1e-3 for one in strange)
    assert 1 <= beyond <= 2  # of 24 held-out prompts either score lets 1 pass, 24 - ceil(25 * 0.9)
    said = " ".join(capsys.readouterr().out.split())
    assert "expected calibration error" in said and "run the merged adapter" in said and "(AUROC)" in said
    card = (mixture / "README.md").read_text()
    assert "When it does not know" in card and f"{limits.merged_above:.4g}" in card


def test_too_few_held_out_prompts_for_the_rate_are_told(command, mixture, capsys):
    main(command(*ONE))
    limits = MoaModel.from_pretrained(None, mixture).moa_config.router.abstention
    assert limits.rate == pytest.approx(2 / 25)  # the smallest that 24 prompts can promise of either of two scores
    assert "24 held-out prompts promise no smaller share" in " ".join(capsys.readouterr().out.split())


def test_nothing_is_too_strange_for_a_router_that_was_told_so(command, mixture, tokenizer):
    main(command(*ONE, "--ood", "none"))
    model = MoaModel.from_pretrained(None, mixture)
    assert model.moa_config.router.abstention is None and model.moa_router.detector is not None
    assert model.route(**tokenized(model, "the cat sat")).fallback is None


def test_thresholds_for_what_a_task_left_out_would_look_like():
    found = Strangeness(own=torch.arange(1.0, 100), left_out=torch.arange(51.0, 150))
    assert found.auroc == pytest.approx(roc_auc_score([0] * 99 + [1] * 99, [*range(1, 100), *range(51, 150)]))
    limits = found.limits("energy", 0.1)
    assert (limits.merged_above, limits.base_above) == (90, 140)
    nearer = Strangeness(own=torch.arange(1.0, 100), left_out=torch.arange(1.0, 100) / 2).limits("energy", 0.1)
    assert nearer.base_above == nearer.merged_above == 90


@pytest.mark.parametrize(
    "words, said",
    [
        (("--ood", "entropy"), "--ood entropy does not exist: choose from both, mahalanobis, energy, none"),
        (("--ood_rate", "0"), "--ood_rate must lie between 0 and 1, got 0"),
        (("--coverage", "1"), "--coverage must lie between 0 and 1, got 1"),
    ],
)
def test_impossible_doubts_are_refused(command, refusal, words, said):
    assert said in refusal(main, command(*words))


def test_layers_may_be_routed_apart(command, mixture, tokenizer, base_folder):
    main(command("--granularity", "layer", "--layers", "1", "2", "3", "--poolings", "mean", "--heads", "linear"))
    model = MoaModel.from_pretrained(str(base_folder), mixture)
    found = reported(mixture)
    depths = {one["layer"] for one in found["depths"]}
    assert depths == {1, 2, 3} - {found["chosen"]["layer"]} == set(model.moa_config.router.depths)
    weights = model.route(**tokenized(model, "a red cat sat")).weights
    assert weights.shape == (1, len(model.route_state.layers), len(NAMES))
    for one in found["depths"]:  # each is as good as it says, on the prompts that it says so of
        prompts = [
            (place, example.prompt)
            for place, name in enumerate(NAMES)
            for example in load_task(name).examples("validation", source="pocket", limit=8)
        ]
        batch = tokenizer([prompt for _, prompt in prompts], return_tensors="pt", padding=True)
        with torch.no_grad():
            features = model.features(batch["input_ids"], batch["attention_mask"], layer=one["layer"])
            chosen = model.moa_router.others[str(one["layer"])](features).argmax(dim=-1)
        right = chosen == torch.tensor([place for place, _ in prompts])
        assert one["accuracy"] == pytest.approx(right.float().mean().item(), abs=1e-6)


def test_a_refit_may_go_back_to_one_route_for_all_layers(command, mixture, base_folder):
    main(command("--granularity", "layer", "--layers", "1", "2", "--poolings", "mean", "--heads", "linear"))
    main(command(*ONE, "--overwrite", "true"))
    model = MoaModel.from_pretrained(str(base_folder), mixture)
    assert model.moa_config.granularity == "sequence" and model.moa_config.router.depths == []


def test_routers_at_depths_are_not_fitted_through_the_language_model(command, refusal):
    words = command("--granularity", "layer", "--objective", "language_model")
    assert "is fitted to --objective task or utility" in refusal(main, words)


def test_several_depths_need_several_layers(command, refusal):
    assert "name two layers or more in --layers" in refusal(main, command("--granularity", "layer", "--layers", "2"))


def test_a_router_knows_prompts_without_their_templates_too(command, mixture, tokenizer, base_folder, monkeypatch):
    read = []
    original = PromptFeatures.__init__
    monkeypatch.setattr(
        PromptFeatures, "__init__", lambda self, *given: read.append(given[2]) or original(self, *given)
    )
    main(command(*ONE, plain=True))
    found, tasks = reported(mixture), [load_task(name) for name in NAMES]
    plain = [task.plain() for task in tasks]
    expected = [
        [
            example.prompt
            for form in (tasks, plain)
            for task in form
            for example in task.examples(split, source="pocket", limit=limit, seed=42)
        ]
        for split, limit in (("train", 24), ("validation", 8))
    ]
    assert read == expected
    assert (found["n"], found["plain"]["n"]) == (24, 24)
    model = MoaModel.from_pretrained(str(base_folder), mixture)
    assert model.moa_config.router.plain_prompts
    for share, prompts in ((found, read[1][:24]), (found["plain"], read[1][24:])):
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        chosen = model.route(batch["input_ids"], batch["attention_mask"]).experts
        assert share["accuracy"] == sum(one == place // 8 for place, one in enumerate(chosen)) / 24


def test_a_prompt_without_its_template_has_the_answers_of_the_one_with_it(command, mixture, monkeypatch):
    fits, asked = [], []

    def known(model, rows, **options):
        asked.append(len(rows))
        return torch.arange(3.0 * len(rows)).view(-1, 3).cos()

    run = RouterFit.run
    monkeypatch.setattr("moa.training.router_fit.losses_of_experts", known)
    monkeypatch.setattr(RouterFit, "run", lambda self, *given: fits.append(self) or run(self, *given))
    main(command(*ONE, "--objective", "utility", "--tau", "0.5", plain=True))
    assert asked == [72, 24]
    targets = torch.softmax(-2 * torch.arange(72.0).view(-1, 3).cos(), dim=-1)
    torch.testing.assert_close(fits[0].unseen.targets, targets.repeat(2, 1))
    assert (reported(mixture)["n"], reported(mixture)["plain"]["n"]) == (24, 24)


def test_answers_are_found_where_some_tasks_have_no_template():
    assert places_of_answers([["a", "b"], ["c"], ["d", "e"]], [["a", "b"], [], ["d", "e"]]) == [*range(5), 0, 1, 3, 4]
    assert places_of_answers([["a"], ["b"]], []) == [0, 1]


def test_answers_are_learned_from_prompts_as_the_adapters_know_them():
    assert not RouterChoices(objective="language_model").reads_plain_prompts


def test_a_fit_says_how_the_mixture_routes_from_then_on(command, mixture, capsys, refusal):
    before = (mixture / "moa_config.json").read_bytes()
    assert "routing 'luck' does not exist" in refusal(main, command(*ONE, "--routing", "luck"))
    assert "top_k=9 is out of range" in refusal(main, command(*ONE, "--routing", "top_k", "--top_k", "9"))
    assert (mixture / "moa_config.json").read_bytes() == before
    capsys.readouterr()
    main(command(*ONE, "--routing", "conformal", "--coverage", "0.9"))
    config = MoaModel.from_pretrained(None, mixture).moa_config
    assert (config.routing, config.router.conformal.coverage) == ("conformal", 0.9)
    said = " ".join(capsys.readouterr().out.split())
    assert f"for 90 % with the right expert in the mix, takes experts of {config.router.floor:.3f}" in said
    assert ("never two" in said) == (config.router.floor > 0.5)


def test_what_is_refused_leaves_no_run_in_the_way_of_the_next(command, mixture, refusal):
    assert "layers 1 to 4" in refusal(main, command("--layers", "1", "9"))
    main(command(*ONE))
    assert reported(mixture)["chosen"]["layer"] == 1


def test_another_dtype_is_another_run(command, mixture, refusal):
    main(command(*ONE, "--dtype", "float32"))
    assert "made otherwise (its dtype differ)" in refusal(main, command(*ONE, "--dtype", "bfloat16"))


def test_a_router_that_diverges_is_left_out_and_refused_where_it_is_the_only_one(command, mixture, refusal):
    hopeless = ("--learning_rate", "1e30", "--layers", "1", "--poolings", "mean")
    before = (mixture / "moa_config.json").read_bytes()
    with pytest.warns(UserWarning, match=r"the linear router \(mean, layer 1\) diverged: it is left out"):
        assert "diverged: lower --learning_rate" in refusal(main, command(*hopeless, "--heads", "linear"))
    assert (mixture / "moa_config.json").read_bytes() == before
    main(command(*hopeless, "--heads", "linear", "centroid", "--overwrite", "true"))
    assert json.loads((mixture / "moa_config.json").read_text())["router"]["head"] == "centroid"
