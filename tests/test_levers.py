"""The stages before PPO take what makes a large model fit, as PPO does: passes of few rows, adapters, few bits, mixed
precision, activation checkpointing; and what one stage leaves is what the next one goes on from.
"""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from helpers import assert_close
from micro import assert_refused, run_main
from safetensors.torch import load_file, save_file
from tiny_models import PAD, letter_tokenizer, randomise, tiny_gpt2, tiny_llama, tiny_policy, tiny_t5
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

import classifier
import sft
from classifier import classifier_batch, new_classifier, pair_loss, pairs_in_passes
from config import Config, UsageError
from fitting import IGNORED, add_gradient, in_passes, own_loss, part_of, whole
from loading import load_policy, new_policy
from reward import check_weights
from reward_model import load_reward_model, own_reading, text_logits
from sft import Example, language_batch

pytest_plugins = ["micro"]
peft = pytest.importorskip("peft")
CPU = torch.device("cpu")
LETTERS = "abcdefghi"

# ----------------------------------------------------------------------------------------------------------------
# A step in several passes
# ----------------------------------------------------------------------------------------------------------------

EXAMPLES = [  # of one to seven tokens to be learned; of the second, a causal model predicts none where it has no prompt
    Example([5, 6, 7], [8, 1]),
    Example([9], [1]),
    Example([5], [9, 9, 3, 2, 4, 5, 1]),
    Example([4, 5, 6, 7, 8], [2, 2, 1]),
    Example([3, 3], [6, 1]),
]


def gradients(model: nn.Module, batch: dict, **how) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    settings = {"loss_of": own_loss, "passes_of": whole, "mixed_precision": False}
    loss = add_gradient(model, batch, **(settings | how))
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_passes_add_up(model: nn.Module, batch: dict, passes_of, loss_of=own_loss, atol: float = 1e-12) -> None:
    """To the gradient and the loss of all rows at once, in float64."""
    expected_loss, expected = gradients(model, batch, loss_of=loss_of)
    assert len(passes_of(batch)) > 1
    loss, found = gradients(model, batch, loss_of=loss_of, passes_of=passes_of)
    assert loss == pytest.approx(expected_loss, abs=atol)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], atol=atol)


@pytest.mark.parametrize("most_rows", [1, 2, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_step_of_texts_in_passes_has_the_gradient_of_the_whole(family, most_rows):
    """By the number of tokens that each pass predicts; by a mean of the passes' means it would be another."""
    model = tiny_policy(family).language_model.double().train()
    batch = language_batch(EXAMPLES, PAD, model.config.is_encoder_decoder, CPU)
    rounding = 1e-12 if family == "t5" else 1e-6  # transformers takes a causal model's loss in float32
    assert_passes_add_up(model, batch, partial(in_passes, most_rows=most_rows), atol=rounding)
    _, right = gradients(model, batch)
    means = [gradients(model, part)[1] for part in in_passes(batch, most_rows)]
    name = next(iter(right))
    wrong = sum(part[name] for part in means) / len(means)
    assert (wrong - right[name]).abs().max() > 1e-3 * right[name].abs().max()


def test_a_pass_that_predicts_nothing_adds_nothing():
    """A causal model's first token is predicted by none: alone in a pass, its mean would be no number."""
    model = tiny_policy("gpt2").language_model.double().train()
    batch = language_batch([Example([], [1]), Example([5], [9, 9, 1])], PAD, False, CPU)
    assert_passes_add_up(model, batch, partial(in_passes, most_rows=1), atol=1e-6)


def test_a_pass_has_no_padding_that_no_row_of_it_needs():
    batch = language_batch(EXAMPLES, PAD, False, CPU)
    first, last = in_passes(batch, 3)
    assert first["input_ids"].shape == (3, 8) and last["input_ids"].shape == (2, 8)
    last = part_of(batch, [4])
    assert last["input_ids"].tolist() == [[3, 3, 6, 1]] and last["attention_mask"].tolist() == [[1] * 4]
    assert last["labels"].tolist() == [[IGNORED, IGNORED, 6, 1]]
    both = part_of(language_batch(EXAMPLES, PAD, True, CPU), [2])
    assert both["input_ids"].tolist() == [[5]] and both["labels"].tolist() == [[9, 9, 3, 2, 4, 5, 1]]
    assert in_passes(batch, 5) == [batch]  # that very batch, so that its bytes are as ever


def tiny_head(n_labels: int) -> nn.Module:
    settings = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "num_labels": n_labels}
    settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": PAD}
    config = transformers.GPT2Config(vocab_size=11, **settings)
    config.problem_type = "single_label_classification" if n_labels > 1 else None
    return randomise(transformers.GPT2ForSequenceClassification(config)).double().train()


TEXTS = [[5, 6, 7], [9], [5, 9, 9, 3], [4, 5, 6, 7, 8, 2], [3, 3], [8, 7]]


@pytest.mark.parametrize("most_rows", [1, 4])
def test_a_step_of_classes_in_passes_has_the_gradient_of_the_whole(most_rows):
    """Four texts, then two: they count as four and two."""
    batch = classifier_batch(TEXTS, [0, 1, 2, 1, 0, 2], PAD, CPU)
    assert_passes_add_up(tiny_head(3), batch, partial(in_passes, most_rows=most_rows))


@pytest.mark.parametrize("most_rows", [1, 2, 4])
def test_a_step_of_pairs_in_passes_has_the_gradient_of_the_whole(most_rows):
    """Three pairs: one a pass, or two and then one; a pair's texts are never apart."""
    batch = classifier_batch(TEXTS, [0] * 6, PAD, CPU)
    assert_passes_add_up(tiny_head(1), batch, partial(pairs_in_passes, most_rows=most_rows), loss_of=pair_loss)


# ----------------------------------------------------------------------------------------------------------------
# Whole stages
# ----------------------------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: str) -> None:
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with models, texts to go on from, with classes, answers and pairs, and a reward."""
    monkeypatch.chdir(tmp_path)
    save(tiny_gpt2(n_embd=64), "GPT2")
    save(tiny_llama(hidden_size=64), "LLAMA")
    save(tiny_t5(d_model=64, d_kv=32), "T5")
    rows = []
    for n in range(60):
        text = LETTERS[n % 9] * (1 + n % 3) + LETTERS[n % 7]
        answers = {"answer": LETTERS[n % 4] * 2, "chosen": LETTERS[n % 5], "rejected": "i"}
        rows.append({"text": text, "label": n % 2} | answers)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("r.py").write_text("def reward(prompts, responses, rows):\n    return [len(text) for text in responses]\n")
    return tmp_path


def command(task: str, base: str, *more: str, **settings) -> list[str]:
    """The same flags for every task: three steps of five texts, in passes of two."""
    small = {"sft_steps": 3, "sft_batch_size": 5, "reward_steps": 3, "reward_batch_size": 5, "mini_batch_size": 2}
    small |= {"n_updates": 2, "batch_size": 4, "eval_samples": 4, "max_new_tokens": 6, "context_length": 16}
    rates = {"sft_learning_rate": 0.02, "reward_learning_rate": 0.02, "learning_rate": 0.02}
    named = {"task": task, "base_model_name": base, "dataset_path": "rows.jsonl", "run_name": "x", "device": "cpu"}
    flags = [str(part) for name, value in (small | rates | named | settings).items() for part in (f"--{name}", value)]
    completions = ["--completion_column", "answer"] if base == "T5" else []
    return [*flags, *completions, *more]


def policy_logprobs(policy) -> torch.Tensor:
    ids = torch.tensor([[2, 3, 4], [5, 6, 7]])
    side = torch.tensor([[3, 4, 5, 1], [2, 2, 2, 1]])
    with torch.no_grad():
        return policy.eval().score(ids, ids > 0, side, side > 0).logprobs


BITS = {"float32": [], "8 bits": ["--load_in_8bit"], "4 bits": ["--load_in_4bit"], "bfloat16": ["--dtype", "bfloat16"]}


@pytest.mark.parametrize(
    ("base", "weights"), [("LLAMA", "float32"), ("GPT2", "8 bits"), ("T5", "4 bits"), ("LLAMA", "bfloat16")]
)
def test_ppo_goes_on_with_the_adapter_that_sft_has_trained(base, weights, place, capsys):
    """That very adapter, with its rank, and no second one on it, though the flags are the same; the reference is a
    frozen copy of it; what is saved at the end is it again, on the same base weights."""
    flags = ["--lora_r", "3", *BITS[weights]]
    before = Path(base, "model.safetensors").read_bytes()
    assert run_main(*command("sft", base, *flags)) == 0
    stage = Path("saved_models/x/sft")
    assert not (stage / "model.safetensors").exists() and (stage / "tokenizer.json").exists()
    trained = load_file(stage / "adapter_model.safetensors")
    assert all(weight.abs().max() > 0 and weight.dtype == torch.float32 for weight in trained.values())
    manifest = json.loads((stage / "manifest.json").read_text())
    names = {"transformers": transformers, "peft": peft, "FOLDER": str(stage)}
    assert isinstance(eval(manifest["loads_with"], names), peft.PeftModel)

    config = Config(**json.loads((stage / "run_config.json").read_text()) | {"task": "train"})
    policy = new_policy(config, str(stage), CPU)
    own = {name: p for name, p in policy.language_model.named_parameters() if p.requires_grad}
    assert {name.replace(".default", "") for name in own} == set(trained)
    assert all(torch.equal(p, trained[name.replace(".default", "")]) for name, p in own.items())

    Path("out").mkdir()
    capsys.readouterr()
    assert run_main(*command("train", base, *flags, output_dir="out/ppo", reward_fn="r.py:reward")) == 0
    said = capsys.readouterr()
    assert "note: --lora_r has no effect: what it starts from is an adapter" in said.err
    assert "KL to the reference = 0" in said.out
    result = load_file("out/ppo/adapter_model.safetensors")
    assert result.keys() == trained.keys() and any(not torch.equal(result[name], trained[name]) for name in trained)
    settings = json.loads(Path("out/ppo/adapter_config.json").read_text())
    assert settings["r"] == 3 and settings["base_model_name_or_path"] == str(place / base)
    assert json.loads(Path("out/ppo/stage.json").read_text())["starts_from"]["path"] == "saved_models/x/sft"
    assert Path(base, "model.safetensors").read_bytes() == before


def test_sft_goes_on_with_an_adapter_that_is_named_and_so_does_ppo(place):
    """--peft_model_path in every command: what sft has made of it is not laid on it once more."""
    assert run_main(*command("sft", "LLAMA", "--lora_r", "2", output_dir="ADAPTER")) == 0
    named = ["--peft_model_path", "ADAPTER"]
    assert run_main(*command("sft", "LLAMA", *named)) == 0
    first, second = (load_file(f"{path}/adapter_model.safetensors") for path in ("ADAPTER", "saved_models/x/sft"))
    assert first.keys() == second.keys() and not any(torch.equal(first[name], second[name]) for name in first)
    assert run_main(*command("train", "LLAMA", *named, reward_fn="r.py:reward", output_dir="ppo")) == 0
    assert load_file("ppo/adapter_model.safetensors").keys() == first.keys()
    assert run_main("--task", "evaluate", "--output_dir", "ppo", "--eval_samples", "4") == 0
    comparison = json.loads(Path("ppo/results/comparison.json").read_text())["splits"]["test"]["figures"]
    assert comparison["before"]["kl"] == pytest.approx(0, abs=1e-5)


def test_weights_in_few_bits_need_no_flag_for_an_adapter_that_is_there(place):
    flags = ["--load_in_8bit", "--sft_steps", "1"]
    assert run_main(*command("sft", "GPT2", "--lora_r", "2", *flags)) == 0
    settings = {"task": "train", "base_model_name": "GPT2", "run_name": "x", "load_in_8bit": True}
    assert Config(**settings).starts_from_adapter
    with pytest.raises(UsageError, match="freeze the weights"):
        Config(**settings | {"run_name": "y"})


def test_a_folder_with_an_adapter_is_what_sft_can_start_from(place):
    assert run_main(*command("sft", "GPT2", "--lora_r", "2", output_dir="ADAPTER")) == 0
    assert run_main(*command("sft", "ADAPTER", output_dir="more")) == 0
    settings = json.loads(Path("more/adapter_config.json").read_text())
    assert settings["r"] == 2 and settings["base_model_name_or_path"] == str(place / "GPT2")


def test_sft_saves_the_whole_model_with_merge(place):
    """The model that was trained, for transformers alone."""
    for name, more in (("adapter", []), ("merged", ["--merge"])):
        assert run_main(*command("sft", "GPT2", "--lora_r", "2", *more, output_dir=name)) == 0
    policies = [load_policy(Config(), path, CPU) for path in ("adapter", "merged", "GPT2")]
    adapted, merged, base = map(policy_logprobs, policies)
    assert not hasattr(policies[1].language_model, "peft_config")
    assert_close(merged, adapted, atol=1e-4)
    assert (merged - base).abs().max() > 0.05
    manifest = json.loads(Path("merged/manifest.json").read_text())
    assert manifest["loads_with"] == "transformers.AutoModelForCausalLM.from_pretrained(FOLDER)"


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """One for every time that a layer of a Llama is computed in train mode: whether its products are in bfloat16."""
    seen = []
    real = LlamaMLP.forward

    def noting(self, states):
        if self.training:
            seen.append(real(self, states).dtype == torch.bfloat16)
        return real(self, states)

    monkeypatch.setattr(LlamaMLP, "forward", noting)
    return seen


@pytest.mark.parametrize(
    ("more", "n_calls", "apart"),
    [
        (["--mini_batch_size", "5"], 6, 1e-5),
        (["--mini_batch_size", "5", "--gradient_checkpointing"], 12, 1e-5),
        (["--mini_batch_size", "5", "--mixed_precision", "bf16"], 6, 0.01),
    ],
)
@pytest.mark.parametrize("task", ["sft", "reward"])
def test_a_lever_changes_how_a_stage_computes_and_not_what_it_learns(task, more, n_calls, apart, place, calls):
    """Three steps through two layers: in three passes each, else in one, whose activations are computed twice, or whose
    products are in bfloat16. The weights move by 0.02 a step."""
    assert run_main(*command(task, "LLAMA", output_dir="plain")) == 0
    assert calls == [False] * 18
    calls.clear()
    assert run_main(*command(task, "LLAMA", *more, output_dir="other")) == 0
    assert calls == ["bf16" in more] * n_calls
    plain, other = (load_file(f"{name}/model.safetensors") for name in ("plain", "other"))
    gaps = torch.cat([(plain[name] - other[name]).abs().flatten() for name in plain])
    assert gaps.mean() < apart


# ----------------------------------------------------------------------------------------------------------------
# Reward models under an adapter
# ----------------------------------------------------------------------------------------------------------------


def bert(folder: str) -> None:
    """An encoder without a pooler in its files, as a masked language model has none."""
    settings = {"vocab_size": 11, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": PAD}
    save(randomise(transformers.BertForMaskedLM(transformers.BertConfig(**settings))), folder)


def train_reward(*flags: str, monkeypatch, **settings) -> list[float]:
    """Train a reward model by a command; what it gave for some texts at the end of its training."""
    scored = []
    real = classifier.save_stage

    def noting(folder, stage, model, tokenizer, *others, **named):
        reader = copy.deepcopy(tokenizer)
        reader.model_max_length = 16
        scored.extend(text_logits(model, reader, TRIED)[:, -1].tolist())
        real(folder, stage, model, tokenizer, *others, **named)

    monkeypatch.setattr(classifier, "save_stage", noting)
    assert run_main(*command("reward", *flags, **settings)) == 0
    return scored


TRIED = ["abc", "i", "hhgg", "abcdefghiabc"]


@pytest.mark.parametrize(
    ("base", "weights"),
    [("LLAMA", "float32"), ("GPT2", "8 bits"), ("BERT", "8 bits"), ("LLAMA", "4 bits"), ("BERT", "bfloat16")],
)
def test_a_reward_model_under_an_adapter_scores_as_it_did(base, weights, place, monkeypatch):
    """Loaded again from its folder, by name: whole where nothing is rounded by that, else as adapter and head on base
    weights of as many bits. Trunk and base stay as they were; head and adapter are trained."""
    bert("BERT")
    before = Path(base, "model.safetensors").read_bytes()
    scored = train_reward(base, "--lora_r", "3", *BITS[weights], monkeypatch=monkeypatch)
    folder = Path("saved_models/x/reward")
    is_whole = weights == "float32"
    assert (folder / "model.safetensors").exists() == is_whole
    assert (folder / "adapter_model.safetensors").exists() != is_whole
    again = load_reward_model(Config(), str(folder), CPU)(TRIED)
    assert_close(again, scored, atol=1e-5)
    assert again.std() > 0.01
    check_weights(Config(task="train", reward_model_path=str(folder)))  # as the start of a run does
    saved = json.loads((folder / "config.json").read_text())
    assert [name for name in saved["architectures"] if name.endswith("ForSequenceClassification")]
    assert saved["label2id"] == {"NEGATIVE": 0, "POSITIVE": 1}
    if not is_whole:
        weights_saved = load_file(folder / "adapter_model.safetensors")
        head = "score" if base != "BERT" else "classifier"
        assert any(f".{head}." in name for name in weights_saved)
        assert {weight.dtype for weight in weights_saved.values()} == {torch.float32}
        assert all(weight.abs().max() > 0 for weight in weights_saved.values())
    assert Path(base, "model.safetensors").read_bytes() == before


def test_a_reward_model_of_pairs_under_an_adapter_scores_as_it_did(place, monkeypatch):
    """Its folder says what stands between prompt and answer."""
    sft.new_tokenizer(["abcdefghi"], 300, 48).save_pretrained("PAIRS")
    tiny_gpt2(n_embd=64, vocab_size=300).save_pretrained("PAIRS")
    pairs = ["--lora_r", "3", "--load_in_8bit", "--chosen_column", "chosen"]
    scored = train_reward("PAIRS", *pairs, monkeypatch=monkeypatch)
    folder = "saved_models/x/reward"
    assert_close(load_reward_model(Config(), folder, CPU)(TRIED), scored, atol=1e-5)
    assert own_reading(Config(), folder, "").write(["a"], ["b"], [{}]) == ["a\nb"]


def test_plain_peft_loads_a_reward_model_as_its_manifest_says(place, monkeypatch):
    scored = train_reward("LLAMA", "--lora_r", "3", "--dtype", "bfloat16", monkeypatch=monkeypatch)
    folder = Path("saved_models/x/reward")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "config=" in manifest["loads_with"]  # else the head would have other labels
    assert "config=" in (folder / "README.md").read_text().split("## How to load it")[1]
    assert manifest["base_weights"] == {"dtype": "bfloat16", "load_in_8bit": False, "load_in_4bit": False}
    names = {"transformers": transformers, "peft": peft, "FOLDER": str(folder)}
    plain = eval(manifest["loads_with"], names).eval()
    assert plain.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    assert_close(text_logits(plain, letter_tokenizer(), TRIED)[:, -1], scored, atol=0.1)  # on weights in float32


def test_a_reward_model_goes_on_from_the_adapter_of_sft(place, monkeypatch):
    """The trunk is the base under sft's adapter, which is trained further: before any step it reads as sft's model."""
    assert run_main(*command("sft", "LLAMA", "--lora_r", "3")) == 0
    stage = "saved_models/x/sft"
    names = {0: "NEGATIVE", 1: "POSITIVE"}
    model = new_classifier(Config(task="reward"), stage, names, PAD, CPU).eval()
    policy = load_policy(Config(), stage, CPU).eval()
    ids = torch.tensor([[2, 3, 4, 5]])
    states = [
        each(input_ids=ids, output_hidden_states=True).hidden_states[-1] for each in (model, policy.language_model)
    ]
    assert_close(states[0], states[1], atol=1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "score" in name for name in trained) and any("score" in name for name in trained)

    scored = train_reward("LLAMA", "--lora_r", "3", monkeypatch=monkeypatch)
    assert_close(load_reward_model(Config(), "saved_models/x/reward", CPU)(TRIED), scored, atol=1e-5)
    assert run_main(*command("train", "LLAMA", "--lora_r", "3", output_dir="ppo")) == 0


def test_what_is_trained_of_a_classifier_under_an_adapter_is_in_float32_and_has_gradients_alone(place):
    bert("BERT")
    config = Config(task="reward", base_model_name="BERT", lora_r=2, dtype="bfloat16")
    model = new_classifier(config, "BERT", {0: "a", 1: "b"}, PAD, CPU)
    _, found = gradients(model, classifier_batch(TEXTS, [0, 1] * 3, PAD, CPU))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys() and {p.dtype for p in trained.values()} == {torch.float32}
    parts = {part for name in trained for part in ("lora_", "pooler", "classifier") if part in name}
    assert parts == {"lora_", "pooler", "classifier"}
    assert next(model.base_model.model.bert.embeddings.parameters()).dtype == torch.bfloat16


def test_a_classifier_of_a_model_made_from_nothing_is_trained_whole(place):
    bert("BERT")
    model = new_classifier(Config(task="train", lora_r=2), "BERT", {0: "a", 1: "b"}, PAD, CPU)
    assert all(parameter.requires_grad for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------------
# Refusals
# ----------------------------------------------------------------------------------------------------------------


def test_an_adapter_that_is_folded_in_already_is_not_gone_on_with(place, capsys):
    assert run_main(*command("sft", "GPT2", "--lora_r", "2", "--output_dir", "A")) == 0
    flags = ["--peft_model_path", "A", "--merge"]
    assert run_main(*command("sft", "GPT2", *flags)) == 0
    with pytest.raises(UsageError, match="--peft_model_path A is folded into saved_models/x/sft already"):
        new_policy(Config(base_model_name="GPT2", peft_model_path="A"), "saved_models/x/sft", CPU)


@pytest.mark.parametrize("found", ["x", None, [], {"dtype": 3, "load_in_8bit": "yes"}])
def test_a_manifest_that_says_no_kind_of_weights_is_read_as_float32(found, place, monkeypatch):
    train_reward("GPT2", "--lora_r", "2", "--dtype", "bfloat16", monkeypatch=monkeypatch)
    file = Path("saved_models/x/reward/manifest.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_weights": found}))
    assert len(load_reward_model(Config(), "saved_models/x/reward", CPU)(TRIED)) == len(TRIED)


@pytest.mark.parametrize("task", ["sft", "reward"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--load_in_8bit"], "--load_in_8bit and --load_in_4bit freeze the weights: add --lora_r"),
        (["--dtype", "bfloat16"], "--dtype bfloat16 would round most of Adam's small steps away"),
        (["--peft_model_path", "nothing"], "--peft_model_path nothing"),
    ],
)
def test_a_stage_refuses_what_could_not_be_trained(task, flags, words, place, capsys):
    assert_refused(capsys, place, command(task, "GPT2", *flags), words)


def test_a_merge_that_would_round_the_adapter_away_is_refused(place, capsys):
    flags = ["--lora_r", "2", "--load_in_4bit", "--merge"]
    assert_refused(capsys, place, command("sft", "GPT2", *flags), "--merge would round the adapter away")


def test_an_adapter_of_a_classifier_is_no_language_model_and_the_other_way_round(place, monkeypatch):
    train_reward("GPT2", "--lora_r", "2", "--dtype", "bfloat16", monkeypatch=monkeypatch, output_dir="REWARD")
    with pytest.raises(UsageError, match="REWARD is an adapter of a classifier, expected one of a language model"):
        sft.run_sft(Config(task="sft", base_model_name="REWARD", dataset_path="rows.jsonl", output_dir="out"))
    assert run_main(*command("sft", "GPT2", "--lora_r", "2")) == 0
    Path("saved_models/x/sft/config.json").write_text(Path("REWARD/config.json").read_text())
    with pytest.raises(UsageError, match="is an adapter of a language model, expected one of a classifier"):
        load_reward_model(Config(), "saved_models/x/sft", CPU)


def test_a_reward_models_adapter_without_its_head_is_refused(place, monkeypatch):
    train_reward("GPT2", "--lora_r", "2", "--dtype", "bfloat16", monkeypatch=monkeypatch)
    file = "saved_models/x/reward/adapter_model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if "score" not in name}, file)
    with pytest.raises(UsageError, match="--reward_model_path saved_models/x/reward is an adapter that does not fit"):
        load_reward_model(Config(), "saved_models/x/reward", CPU)


def test_few_bits_are_judged_where_weights_are_trained_and_not_where_a_run_is_used(tmp_path, monkeypatch):
    """A run that went on from an adapter has no flag of one; nor is an adapter that lies about a start from nothing."""
    monkeypatch.chdir(tmp_path)
    asked = {"task": "generate", "base_model_name": "moved", "load_in_8bit": True, "output_dir": "run"}
    with pytest.raises(UsageError, match="freeze the weights"):  # of a run of all weights, as ever
        Config(**asked)
    Path("run").mkdir()
    Path("run/adapter_config.json").write_text("{}")
    assert Config(**asked).load_in_8bit
    Path("adapter_config.json").write_text("{}")
    assert not Config(task="sft").starts_from_adapter
    with pytest.raises(UsageError, match="freeze the weights"):
        Config(task="sft", load_in_8bit=True)
