"""Files and folders appear whole or not at all, and every stage finds its place."""

import json
import os
import time
from dataclasses import replace

import pytest
from micro import micro_config

from config import Config, RunError, UsageError, to_json
from files import check_writable
from folders import (
    claimed,
    new_ppo_folder,
    new_stage_folder,
    newest_run,
    notice,
    run_of,
    stage_folder,
    starting_model,
    trained_stage,
)
from model import PolicyModel
from sft import new_language_model

pytest_plugins = ["micro"]


def names(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(("named", "told"), [({}, "MODEL"), ({"base_model_name_or_path": "gpt2"}, "gpt2")])
def test_an_adapter_to_go_on_with_needs_its_base_model_named(named, told, tmp_path):
    """Else the demonstration's model would be announced, trained, and then refused."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(named))
    config = Config(task="train", peft_model_path=str(tmp_path))
    with pytest.raises(UsageError, match=rf"--peft_model_path .* is an adapter: .*, --base_model_name {told}$"):
        starting_model(config)
    assert starting_model(replace(config, base_model_name="gpt2")) == "gpt2"
    with pytest.raises(UsageError, match=r"--peft_model_path none is an adapter: .*, --base_model_name MODEL$"):
        starting_model(replace(config, peft_model_path="none"))


def test_stages_live_under_the_name_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = micro_config(task="train")
    assert str(stage_folder(config, "sft")) == "saved_models/tiny/sft"
    assert str(stage_folder(micro_config(dataset_path="data/mine.csv"), "sft")) == "saved_models/tiny-mine/sft"
    assert str(stage_folder(micro_config(preset="", base_model_name="org/gpt"), "reward")) == "saved_models/gpt/reward"
    flare = micro_config(preset="flan-t5-flare", dataset_path="ChanceFocus/flare-ner", run_name="a/{dataset}")
    assert str(stage_folder(flare, "sft")) == "saved_models/a/flare-ner/sft"
    assert str(stage_folder(micro_config(run_name="x-{dataset}"), "sft")) == "saved_models/x-reviews/sft"
    own = micro_config(task="sft", output_dir="elsewhere")
    assert [str(stage_folder(own, stage)) for stage in ("sft", "reward")] == ["elsewhere", "saved_models/tiny/reward"]


def test_a_new_run_takes_the_next_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("ppo", "ppo-2", "ppo-3"):
        folder = new_ppo_folder(micro_config())
        assert str(folder) == f"saved_models/tiny/{expected}"
        folder.mkdir(parents=True)
    (tmp_path / "saved_models/tiny/ppo-2").rmdir()
    assert new_ppo_folder(micro_config()).name == "ppo-2"


def test_an_explicit_folder_must_be_new_or_empty(tmp_path):
    folder = tmp_path / "mine"
    assert new_ppo_folder(micro_config(output_dir=str(folder))) == folder
    folder.mkdir()
    assert new_ppo_folder(micro_config(output_dir=str(folder))) == folder
    (folder / "notes").write_text("")
    with pytest.raises(UsageError, match="mine is not empty"):
        new_ppo_folder(micro_config(output_dir=str(folder)))
    with pytest.raises(UsageError, match="notes is not empty"):
        new_ppo_folder(micro_config(output_dir=str(folder / "notes")))


def test_a_stage_is_never_trained_over_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = micro_config(task="sft")
    assert str(new_stage_folder(config)) == "saved_models/tiny/sft"
    new_stage_folder(config).mkdir(parents=True)
    with pytest.raises(UsageError, match="saved_models/tiny/sft exists already"):
        new_stage_folder(config)


def test_a_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "newer")
    with pytest.raises(UsageError, match="file is not a folder"):
        check_writable(tmp_path / "file" / "new" / "newer")


def test_a_stage_counts_as_trained_only_with_the_settings_of_this_run(tmp_path):
    """Those that shape it: an sft step count matters to the language model, not to the reward model."""
    trained = micro_config()
    folder = tmp_path / "sft"
    assert not trained_stage(trained, str(folder), "sft")
    folder.mkdir()
    (folder / "run_config.json").write_text(to_json(trained))
    assert trained_stage(trained, str(folder), "sft")
    assert trained_stage(micro_config(learning_rate=1.0, reward_steps=9), str(folder), "sft")
    for change in ({"sft_steps": 9}, {"n_layer": 2}, {"dataset_path": "mine.csv"}, {"prompt_column": "review"}):
        with pytest.raises(UsageError, match=f"--{next(iter(change))} "):
            trained_stage(micro_config(**change), str(folder), "sft")
    with pytest.raises(UsageError) as refusal:
        trained_stage(micro_config(n_layer=2, sft_steps=9), str(folder), "sft")
    assert str(refusal.value) == (
        f"{folder} was trained with --n_layer {trained.n_layer} --sft_steps {trained.sft_steps}, and this run asks for "
        "--n_layer 2 --sft_steps 9; give the flags that it has, or a --run_name of its own to this run"
    )


def test_what_answers_are_cut_to_shapes_a_language_model_of_answers_alone(tmp_path):
    for column, is_shaped in (("", False), ("answer", True)):
        (tmp_path / "run_config.json").write_text(to_json(micro_config(completion_column=column)))
        changed = micro_config(completion_column=column, max_new_tokens=9)
        if is_shaped:
            with pytest.raises(UsageError, match="was trained with --max_new_tokens 12, and this run asks for "):
                trained_stage(changed, str(tmp_path), "sft")
        else:
            assert trained_stage(changed, str(tmp_path), "sft")


def test_the_notice_counts_the_parameters_of_a_model_with_all_its_tokens(tokenizer):
    config = micro_config(vocab_size=len(tokenizer), n_layer=3, n_embd=24, context_length=20)
    policy = PolicyModel(new_language_model(config, tokenizer))
    n_parameters = sum(parameter.numel() for parameter in policy.parameters())
    assert f"a language model of at most {n_parameters:,} parameters, trained here" in notice(config)
    assert notice(micro_config(base_model_name="gpt2")) == ""


def test_the_newest_run_is_the_one_whose_policy_was_saved_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no trained run"):
        newest_run("")
    now = time.time()
    for age, name in enumerate(["tiny/ppo-2", "other/ppo", "tiny/ppo"]):
        folder = tmp_path / "saved_models" / name
        folder.mkdir(parents=True)
        (folder / "value_head.safetensors").write_text("")
        os.utime(folder / "value_head.safetensors", (now - age, now - age))
    (tmp_path / "saved_models/tiny/ppo-3").mkdir()  # unfinished: no policy in it yet
    assert str(newest_run("")) == "saved_models/tiny/ppo-2"
    assert str(newest_run("saved_models/tiny/ppo")) == "saved_models/tiny/ppo"
    assert str(newest_run("saved_models/tiny")) == "saved_models/tiny/ppo-2"
    (tmp_path / "sweep/0.02").mkdir(parents=True)
    (tmp_path / "sweep/0.02/value_head.safetensors").touch()
    assert str(newest_run("sweep")) == "sweep/0.02"
    with pytest.raises(UsageError, match=r"--preset gpt2-imdb: .* no trained run"):
        newest_run("", preset="gpt2-imdb")
    with pytest.raises(UsageError, match="ppo-3 holds no trained run"):
        newest_run("saved_models/tiny/ppo-3")
    named = tmp_path / "saved_models/kl=0.3/reviews/ppo"
    named.mkdir(parents=True)
    (named / "value_head.safetensors").touch()
    for name in ("kl=0.3", "kl=0.3/{dataset}"):
        assert str(newest_run("", name)) == "saved_models/kl=0.3/reviews/ppo"
    assert str(newest_run("", preset="tiny")) == "saved_models/tiny/ppo-2"
    with pytest.raises(UsageError, match="--run_name kl: saved_models/ holds no trained run"):
        newest_run("", "kl")


def test_a_named_run_may_have_a_sign_of_equality_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kl=0.3").mkdir()
    assert run_of("kl=0.3") == ("kl=0.3", "kl=0.3")
    assert run_of("a=kl=0.3") == ("a", "kl=0.3")
    assert run_of("sweep/x") == ("x", "sweep/x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"final_dir": "run"}, "--final_dir run holds something else"),
        ({"final_dir": "thing"}, "--final_dir thing holds something else"),
        ({"final_dir": "."}, "--final_dir . holds something else"),
        ({"final_dir": "new", "output_dir": "./new"}, "--final_dir is --output_dir"),
    ],
)
def test_what_is_no_final_policy_does_not_give_way_to_one(change, words, tmp_path, monkeypatch):
    """A run has a manifest, too, and more to lose."""
    monkeypatch.chdir(tmp_path)
    for name in ("run/manifest.json", "run/run_config.json", "thing/x", "final/manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert str(new_ppo_folder(micro_config(final_dir="final"))) == "saved_models/tiny/ppo"
    with pytest.raises(UsageError, match=words):
        new_ppo_folder(micro_config(**change))


def test_a_folder_that_another_run_took_meanwhile_is_left_alone(tmp_path):
    folder = tmp_path / "deep" / "ppo"
    config = micro_config()
    with claimed(folder, config):
        assert names(folder) == {"run_config.json", "NOTICE.txt"}
        assert (folder / "run_config.json").read_text() == to_json(config)
        assert (folder / "NOTICE.txt").read_text() == notice(config) + "\n"
        with pytest.raises(RunError, match="has been taken by another run"), claimed(folder, config):
            pass
    with pytest.raises(RunError, match="has been taken by another run"), claimed(folder, config):
        pass
    (tmp_path / "empty").mkdir()
    with claimed(tmp_path / "empty", micro_config(base_model_name="gpt2")):
        assert names(tmp_path / "empty") == {"run_config.json"}


@pytest.mark.parametrize("change", [{"label_column": "stars"}, {"dataset_split": "test"}, {"base_model_name": "x"}])
def test_a_reward_model_of_other_data_is_not_reused(change, tmp_path):
    (tmp_path / "run_config.json").write_text(to_json(micro_config()))
    assert trained_stage(micro_config(), str(tmp_path), "reward")
    with pytest.raises(UsageError, match=f"--{next(iter(change))} "):
        trained_stage(micro_config(**change), str(tmp_path), "reward")


@pytest.mark.parametrize("change", [{"chat": True}, {"system": "Be brief.", "chat": True}])
def test_how_prompts_become_conversations_is_nothing_to_a_classifier_of_labels(change, tmp_path):
    (tmp_path / "run_config.json").write_text(to_json(micro_config()))
    assert trained_stage(micro_config(**change), str(tmp_path), "reward")
    pairs = {"chosen_column": "better", "rejected_column": "worse"}
    (tmp_path / "run_config.json").write_text(to_json(micro_config(**pairs)))
    with pytest.raises(UsageError, match="was trained with --chat False"):
        trained_stage(micro_config(**pairs, **change), str(tmp_path), "reward")


def test_a_run_that_was_not_finished_is_called_so(tmp_path):
    (tmp_path / "run_config.json").write_text("{}")
    with pytest.raises(UsageError, match="a run that was not finished, and no policy: --task train --resume"):
        newest_run(str(tmp_path))
