"""Models from elsewhere, the stage before PPO for them, and which policy is kept and where."""

import json
import re
import shlex
from collections import Counter

import pytest
import torch
from helpers import assert_all_moved, read_log, read_stats
from micro import PPO, QUESTIONS, assert_refused, flags, question_flags, run_main
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from arguments import parse_args
from evaluation import evaluate_policy
from loading import load_policy, load_tokenizer
from prompts import load_prompts

pytest_plugins = ["micro"]
pytestmark = pytest.mark.usefixtures("no_figures")


def assert_rewarded_by_the_function(rows: list[dict]) -> None:
    """The reward of every logged response, counted anew, is the function's on the prompt's own row of the data."""
    answers = {row["question"]: row["answer"].lower() for row in QUESTIONS}
    assert list(rows[0]) == ["step", "query", "response", "reward", "reward_reward_fn"]
    for row in rows:
        assert float(row["reward"]) == float(row["reward_reward_fn"]) == row["response"].count(answers[row["query"]])
    assert len({row["reward"] for row in rows}) > 1


def test_an_encoder_decoder_trains_on_a_plain_function(t5_folder, questions, capsys):
    """No classifier is trained beside it, no notice is printed, and the command that it prints works in a shell."""
    assert run_main("--task", "train", *question_flags(t5_folder)) == 0
    output = capsys.readouterr().out
    (run,) = questions.glob("saved_models/*/*")
    assert run.name == "ppo"
    assert "teaching demonstration" not in output and "reward model:" not in output
    assert_all_moved(t5_folder, run, AutoModelForSeq2SeqLM)
    assert_rewarded_by_the_function(read_log(run))
    *_, arguments = re.search("now try: (python) (main.py) (.*)", output).groups()
    *_, prompt = shlex.split(arguments)
    assert prompt in {row["question"] for row in QUESTIONS}
    assert run_main(*shlex.split(arguments)) == 0
    assert capsys.readouterr().out.startswith(prompt)


def test_a_causal_model_trains_on_a_plain_function(chain, questions, capsys):
    """The chain's language model as any other: a folder with a model in Hugging Face format."""
    start = chain.root / "saved_models/tiny/sft"
    assert run_main("--task", "train", *question_flags(start)) == 0
    (run,) = questions.glob("saved_models/*/*")
    assert run.name == "ppo"
    assert "reward model:" not in capsys.readouterr().out
    assert_all_moved(start, run, AutoModelForCausalLM)
    assert_rewarded_by_the_function(read_log(run))


def test_a_reward_model_named_by_the_user_may_come_from_other_data(workplace, questions, capsys):
    """The settings of a stage must agree with this run's only where the stage is this run's own."""
    own = str(workplace / "saved_models/tiny/reward")
    arguments = [*question_flags(workplace / "saved_models/tiny/sft"), "--reward_fn", "", "--reward_model_path", own]
    assert run_main("--task", "train", "--dry_run", *arguments) == 0
    assert len(re.findall(r"reward_model -?\d+\.\d{3}$", capsys.readouterr().out, re.MULTILINE)) == 3


def test_the_sft_stage_comes_first_where_that_is_asked_for(t5_folder, questions, capsys):
    """An encoder-decoder is taught the answers, then trained by PPO from there; a second run finds the stage done."""
    arguments = [*question_flags(t5_folder), "--sft_first", "--sft_steps", "3", "--completion_column", "answer"]
    assert run_main("--task", "train", *arguments) == 0
    output = capsys.readouterr().out
    assert "language model: held-out perplexity" in output and "/sft: " in output
    policy, stage = sorted(questions.glob("saved_models/*/*"))
    assert (policy.name, stage.name) == ("ppo", "sft")
    assert_all_moved(t5_folder, stage, AutoModelForSeq2SeqLM)
    assert_all_moved(stage, policy, AutoModelForSeq2SeqLM)
    assert run_main("--task", "train", *arguments) == 0
    output = capsys.readouterr().out
    assert "held-out perplexity" not in output and "/sft: " in output
    again = policy.with_name("ppo-2") / "model.safetensors"
    assert again.read_bytes() == (policy / "model.safetensors").read_bytes()


def test_the_best_policy_by_held_out_reward_is_kept_and_judged_on_other_prompts(workplace, monkeypatch, capsys):
    """Rewards .2, .5 and .3 on the validation prompts: the second policy is saved, and reported on test prompts."""
    script, asked, weights = iter([0.2, 0.5, 0.3]), [], []

    def scripted(policy, *others, **named):
        *_, prompts, _ = others
        asked.append([prompt.text for prompt in prompts])
        weights.append({name: weight.detach().cpu().clone() for name, weight in policy.state_dict().items()})
        rows, reward = evaluate_policy(policy, *others, **named), next(script, None)
        return rows if reward is None else [row | {"reward": reward} for row in rows]

    monkeypatch.setattr("run.evaluate_policy", scripted)
    assert run_main("--task", "train", *flags(n_updates=5, eval_every=2, save_every=5, output_dir="best")) == 0
    folder = workplace / "best"
    noted = [row.get("eval_reward") for row in read_stats(folder)]
    assert noted == [None, pytest.approx(0.2), None, 0.5, pytest.approx(0.3)]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_5"]
    assert "the policy of update 3 is kept, with a reward of 0.500 on validation prompts" in capsys.readouterr().out
    config = parse_args(["--task", "train", *flags()])
    tokenizer = load_tokenizer(str(folder))
    validation, test = ([p.text for p in load_prompts(config, tokenizer, part, 4)] for part in ("validation", "test"))
    assert asked == [validation] * 3 + [test] * 2 and not set(validation) & set(test)
    saved = load_policy(config, str(folder), torch.device("cpu")).state_dict()
    assert saved.keys() == weights[1].keys() and {"value_head.weight", "value_head.bias"} < saved.keys()
    start = load_policy(config, "saved_models/tiny/sft", torch.device("cpu")).state_dict()
    assert all(torch.equal(weights[3][name], weight) for name, weight in start.items())  # what is reported as `before`
    for name, weight in saved.items():  # the value head's as well as the policy's
        assert torch.equal(weight, weights[1][name]) and torch.equal(weight, weights[4][name])
        assert not torch.equal(weight, weights[2][name])


def test_every_update_has_prompts_of_its_own(workplace):
    """Enough are loaded for all of them, not for the first rollout alone."""
    assert run_main("--task", "train", *flags(n_updates=3, output_dir="run")) == 0
    assert len({row["query"] for row in read_log(workplace / "run")}) > 8


def test_a_run_of_epochs_goes_over_all_prompts_so_often(t5_folder, questions):
    """Sixteen prompts in rollouts of four: one and a half passes are six updates, and the learning rate falls with
    them."""
    rows = [{"question": f"What is {n}?", "answer": str(n)} for n in range(20)]
    (questions / "numbered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ["--dataset_path", "numbered.jsonl", "--n_updates", "1", "--epochs", "1.5", "--output_dir", "run"]
    assert run_main("--task", "train", *question_flags(t5_folder), *changes) == 0
    asked = Counter(row["query"] for row in read_log(questions / "run"))
    assert len(asked) == 16 and set(asked.values()) == {1, 2} and asked.total() == 24
    rates = [row["learning_rate"] for row in read_stats(questions / "run")]
    assert rates == pytest.approx([1e-3 * k / 6 for k in (6, 5, 4, 3, 2, 1)], abs=1e-9)


def test_the_newest_policy_is_also_put_where_final_dir_says(workplace, capsys):
    """In place of the one before it; a folder of something else is refused before work starts."""
    policies = []
    for seed, name in ((1, "ppo-2"), (2, "ppo-3")):
        assert run_main("--task", "train", *flags(final_dir="final", seed=seed)) == 0
        policies.append((workplace / "final/model.safetensors").read_bytes())
        assert policies[-1] == (workplace / PPO.with_name(name) / "model.safetensors").read_bytes()
    assert policies[0] != policies[1]
    assert "AutoModelForCausalLM" in json.loads((workplace / "final/manifest.json").read_text())["loads_with"]
    (workplace / "other").mkdir()
    (workplace / "other/thing").write_text("mine")
    capsys.readouterr()
    assert_refused(capsys, workplace, ["--task", "train", *flags(final_dir="other")], "--final_dir other holds")


def test_a_model_made_here_needs_no_look_at_another_before_its_stage(workplace):
    assert run_main("--task", "train", "--sft_first", *flags(run_name="again", n_updates=1)) == 0
