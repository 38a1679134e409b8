"""Models that cannot be loaded, or do not go together, are refused in one sentence before any stage is trained."""

import shutil
from pathlib import Path

import pytest
from micro import assert_refused, flags
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

pytest_plugins = ["micro"]


def test_a_folder_that_is_no_model_is_refused(workplace, capsys):
    (workplace / "notes").mkdir()
    for flag in ("--base_model_name", "--reward_model_path"):
        words = f"{flag} notes is a folder without a usable model: "
        assert_refused(capsys, workplace, ["--task", "train", *flags(), flag, "notes"], words)


def test_damaged_weights_are_refused(workplace, capsys):
    (workplace / "saved_models/tiny/sft/model.safetensors").write_bytes(b"damaged")
    words = "saved_models/tiny/sft is a folder without a usable model: Error while deserializing header"
    no_reward_model = ["--reward_weights", "repetition=-1"]  # whose own start would not be what it was
    assert_refused(capsys, workplace, ["--task", "train", *flags(), *no_reward_model], words)


def test_a_reward_label_that_does_not_exist_is_refused_with_those_that_do(workplace, capsys):
    arguments = ["--task", "train", "--reward_label", "NEUTRAL", *flags()]
    assert_refused(capsys, workplace, arguments, "'NEUTRAL'", "0 (NEGATIVE), 1 (POSITIVE)")
    arguments = ["--task", "train", "--reward_label", "Negatve", *flags()]
    assert_refused(capsys, workplace, arguments, "did you mean negative?")


@pytest.fixture
def zoo(workplace, capsys) -> Path:
    """Beside the chain's models some that do not go together, by the names that the mistakes below use."""
    import peft  # once micro has told the Hub's library to stay offline

    tokenizer = AutoTokenizer.from_pretrained("saved_models/tiny/sft")
    size = {"n_positions": 48, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    plain = {"vocab_size": len(tokenizer), "n_embd": 16} | size
    for name, model in {
        "three": GPT2ForSequenceClassification(GPT2Config(**plain, num_labels=3)),
        "wide": GPT2LMHeadModel(GPT2Config(**plain | {"n_embd": 32})),
        "short classifier": GPT2ForSequenceClassification(GPT2Config(**plain | {"vocab_size": len(tokenizer) - 7})),
        "short": GPT2LMHeadModel(GPT2Config(**plain | {"vocab_size": len(tokenizer) - 7})),
        "endless": GPT2LMHeadModel(GPT2Config(**plain)),
    }.items():
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token=tokenizer.pad_token)
    endless.save_pretrained("endless")
    peft.get_peft_model(GPT2LMHeadModel.from_pretrained("wide"), peft.LoraConfig(r=2)).save_pretrained("adapter")
    capsys.readouterr()
    return workplace


FROZEN = "--load_in_8bit and --load_in_4bit freeze the weights: add --lora_r or --peft_model_path"
UNFIT = {
    "no label of three": (["--reward_model_path", "three"], "--reward_label must name one of", "2 (LABEL_2)"),
    "label of three": (["--reward_model_path", "three", "--reward_label", "LABEL_3"], "'LABEL_3'", "2 (LABEL_2)"),
    "no classifier": (
        ["--reward_model_path", "wide", "--reward_label", "0"],
        "--reward_model_path wide is a language model (GPT2LMHeadModel)",
    ),
    "short classifier": (["--reward_model_path", "short classifier"], "short classifier", "300 tokens", "embeds 293"),
    "adapter": (
        ["--base_model_name", "endless", "--peft_model_path", "adapter"],
        "its tokenizer has no end-of-sequence",
    ),
    "adapter of wide": (["--base_model_name", "SFT", "--peft_model_path", "adapter"], "an adapter of wide, not of "),
    "no adapter": (["--base_model_name", "SFT", "--peft_model_path", "three"], "three lacks adapter_config.json or"),
    "short": (["--base_model_name", "short"], "--base_model_name short", "300 tokens", "embeds 293"),
    "endless": (["--base_model_name", "endless"], "--base_model_name endless", "no end-of-sequence token"),
    "8 bits": (["--base_model_name", "SFT", "--load_in_8bit"], FROZEN),
    "4 bits": (["--base_model_name", "SFT", "--load_in_4bit"], FROZEN),
    "merge": (["--base_model_name", "SFT", "--lora_r", "2", "--load_in_4bit", "--merge"], "--merge would round"),
}


@pytest.mark.parametrize("mistake", UNFIT)
def test_models_that_do_not_go_together_are_refused(mistake, zoo, capsys):
    """Beside a reward model that would do, where the mistake is not in that."""
    arguments, *words = UNFIT[mistake]
    named = [argument.replace("SFT", "saved_models/tiny/sft") for argument in arguments]
    reward = [] if "--reward_model_path" in named else ["--reward_model_path", "saved_models/tiny/reward"]
    assert_refused(capsys, zoo, ["--task", "train", *flags(), *named, *reward], *words)


def test_a_mistake_in_the_reward_is_seen_before_the_stages_are_trained(zoo, capsys):
    shutil.rmtree("saved_models")
    arguments = ["--task", "train", *flags(), "--reward_model_path"]
    assert_refused(capsys, zoo, [*arguments, "three"], "--reward_label must name one of")
    assert_refused(capsys, zoo, [*arguments, "nowhere/at/all"], "--reward_model_path nowhere/at/all is no folder")
