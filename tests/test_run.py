"""What surrounds the loop: every update is logged, alarms are raised once, and what must end a run ends it."""

import itertools
import statistics
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import assert_close, read_log, read_stats
from test_train import QUERIES, count_a, fixed_for, prompts_of, settings, weights
from tiny_models import tiny_gpt2

import report
import run
import train
from checkpoint import newest_checkpoint
from config import Config, RunError
from files import read_rows
from model import PolicyModel
from train import new_state

# The four prompts of test_train.py in batches of four, so that every update has each of them.
SMALL = {"batch_size": 4, "mini_batch_size": 4}


def run_all(folder: Path, config: Config, policy: PolicyModel | None = None, n_prompts: int = 4, term=count_a) -> list:
    """`run_updates` on letters; the rows of training_stats.jsonl."""
    policy = policy or PolicyModel(tiny_gpt2())
    prompts = prompts_of((QUERIES * n_prompts)[:n_prompts])
    prompts = run.Prompts(train=prompts, validation=prompts, held_out=prompts)
    fixed = fixed_for(policy, letter=term)
    folder.mkdir(exist_ok=True)
    run.run_updates(new_state(policy, config), fixed, prompts, config, folder, run.what_it_began_with(fixed, config))
    return read_stats(folder)


def test_a_run_logs_every_response(tmp_path):
    rows = run_all(tmp_path, settings(n_updates=2, **SMALL))
    logged = read_log(tmp_path)
    assert list(logged[0]) == ["step", "query", "response", "reward", "reward_letter"]
    assert [row["step"] for row in logged] == ["0"] * 4 + ["1"] * 4
    for number in (0, 1):
        own = [row for row in logged if row["step"] == str(number)]
        assert sorted(row["query"] for row in own) == ["aai", "cf", "dbgah", "e"]
        for row in own:
            assert float(row["reward"]) == float(row["reward_letter"]) == row["response"].count("a")
        assert_close(rows[number]["reward"], statistics.mean(float(row["reward"]) for row in own))


def test_a_run_logs_every_update_with_its_learning_rate_and_its_timing(tmp_path):
    rows = run_all(tmp_path, settings(n_updates=4, learning_rate=1e-3, **SMALL))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["learning_rate"] for row in rows] == [1e-3, 0.75e-3, 0.5e-3, 0.25e-3]
    timings = read_rows(tmp_path / "timings.jsonl")
    assert [timing["step"] for timing in timings] == [0, 1, 2, 3]
    assert all(timing["seconds_rollout"] > 0 and timing["seconds_update"] > 0 for timing in timings)


@pytest.mark.parametrize("static", [False, True])
def test_a_run_ends_where_a_static_cache_no_longer_holds_the_policy(static, tmp_path, monkeypatch):
    """At once, with its state saved. Without one a gap that grows is told of, later on."""
    real, calls = train.respond, []

    def stale(*arguments):
        calls.append(1)
        drawn = real(*arguments)
        return drawn._replace(logprobs=drawn.logprobs + 0.5 * (len(calls) == 2) * drawn.mask)

    monkeypatch.setattr(train, "respond", stale)
    config = settings(n_updates=3, static_cache=static, **SMALL)
    words = r"at update 1 .* differ by 0\.5 nats a token, and 0\.5 at most: what"
    with pytest.raises(RunError, match=words) if static else nullcontext():
        run_all(tmp_path, config)
    assert len(read_stats(tmp_path)) == (2 if static else 3)
    assert newest_checkpoint(tmp_path).name.endswith("_2" if static else "_3")


def test_two_equal_runs_are_equal(tmp_path):
    """Same seeds, same weights and log; the timings are kept apart."""
    logs = []
    for name in ("one", "two"):
        policy = PolicyModel(tiny_gpt2())
        logs.append((run_all(tmp_path / name, settings(n_updates=3, learning_rate=1e-3), policy), weights(policy)))
    assert logs[0][0] == logs[1][0]
    assert torch.equal(logs[0][1], logs[1][1])
    assert not torch.equal(logs[0][1], weights(PolicyModel(tiny_gpt2())))


def test_a_run_evaluates_every_few_updates_and_after_the_last_one():
    config = Config(eval_every=2, n_updates=5)
    assert [n for n in range(1, 6) if run.is_time_to_evaluate(config, n)] == [2, 4, 5]
    assert not any(run.is_time_to_evaluate(Config(n_updates=5), n) for n in range(1, 6))


def test_a_first_evaluation_that_is_no_number_gives_way_to_the_next(tmp_path, monkeypatch):
    script = iter([float("nan"), 0.2])
    monkeypatch.setattr(run, "evaluate_policy", lambda *_: [{"reward": next(script)}])
    config = settings(n_updates=2, eval_every=1, **SMALL)
    policy = PolicyModel(tiny_gpt2())
    state, fixed, prompts = new_state(policy, config), fixed_for(policy), prompts_of(QUERIES)
    began = run.what_it_began_with(fixed, config)
    run.run_updates(state, fixed, run.Prompts(prompts, prompts, prompts), config, tmp_path, began)
    assert (state.best.reward, state.best.update) == (0.2, 1)


def test_the_best_policy_so_far_is_noted_with_its_update_and_weights(tmp_path, monkeypatch):
    """Rewards .2, .5, .5 and .3: the second, not the third."""
    script = iter([0.2, 0.5, 0.5, 0.3])
    monkeypatch.setattr(run, "evaluate_policy", lambda *_: [{"reward": next(script)}])
    config = settings(n_updates=4, learning_rate=1e-3, eval_every=1, **SMALL)
    policy = PolicyModel(tiny_gpt2())
    state, fixed, prompts = new_state(policy, config), fixed_for(policy), prompts_of(QUERIES)
    began = run.what_it_began_with(fixed, config)
    run.run_updates(state, fixed, run.Prompts(prompts, prompts, prompts), config, tmp_path, began)
    assert (state.best.reward, state.best.update) == (0.5, 1)
    ended = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    again = PolicyModel(tiny_gpt2())
    half = new_state(again, config)
    updates = run.train(half, fixed_for(again), prompts, config)
    next(updates), next(updates)
    for name, parameter in again.named_parameters():
        assert torch.equal(state.best.weights[name], parameter)
        assert not torch.equal(state.best.weights[name], ended[name])


def test_an_alarm_is_logged_at_every_update_and_printed_at_its_first(tmp_path, monkeypatch, capsys):
    """Two kinds, of which one comes and goes: the log has both wherever they are, and the bar says each once."""
    script = [{}, {"length": "too short"}, {}, {"length": "shorter", "ended": "cut"}, {"ended": "cut off"}]
    seen = []

    def alarms(history: list[dict], batch_size: int) -> dict[str, str]:
        seen.append([row["step"] for row in history])
        assert batch_size == 4
        assert {
            "reward",
            "variance",
            "response_length",
            "distinct_bigrams",
            "ended",
            "ref_perplexity",
            "kl_k1",
            "explained_variance",
            "value_loss",
        } <= history[-1].keys()
        return script[len(history) - 1]

    monkeypatch.setattr(report, "alarms", alarms)
    rows = run_all(tmp_path, settings(n_updates=5, **SMALL))
    assert [row["alarms"] for row in rows] == [[], ["too short"], [], ["shorter", "cut"], ["cut off"]]
    assert seen == [list(range(n)) for n in (1, 2, 3, 4, 5)]
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    assert said == ["alarm at update 1: too short", "alarm at update 3: cut", "alarm at the end: cut off"]


def few_letters(prompts, responses, rows) -> torch.Tensor:
    return -torch.tensor([float(len(response)) for response in responses])


def test_a_policy_that_falls_silent_for_its_reward_is_told_on(tmp_path, monkeypatch, capsys):
    """A point lost for every letter and no price of KL: a letter or none is left of five, and the alarm says so."""
    options = {"learning_rate": 3e-3, "ppo_epochs": 4, "batch_size": 32, "mini_batch_size": 16, "max_grad_norm": 1}
    monkeypatch.setattr(report, "WINDOW", 64)
    config = settings(n_updates=8, kl_coef=0.0, **options)
    rows = run_all(tmp_path, config, n_prompts=32, term=few_letters)
    lengths = [row["response_length"] for row in rows]
    latest = [(a + b) / 2 for a, b in itertools.pairwise(lengths)]
    alarmed = [row["step"] for row in rows if any("mean length in tokens" in text for text in row["alarms"])]
    assert alarmed == [step for step in range(3, 8) if latest[step - 1] < latest[0] / 2] != []
    said = capsys.readouterr().out
    assert said.count("the mean length in tokens went from") == 2  # then, and at the end
    assert f"alarm at update {alarmed[0]}: the reward rose from" in said


def test_the_same_reward_at_a_price_of_kl_raises_no_alarm(tmp_path, monkeypatch, capsys):
    options = {"learning_rate": 3e-3, "ppo_epochs": 4, "batch_size": 32, "mini_batch_size": 16, "max_grad_norm": 1}
    monkeypatch.setattr(report, "WINDOW", 64)
    config = settings(n_updates=8, kl_coef=20.0, **options)
    rows = run_all(tmp_path, config, n_prompts=32, term=few_letters)
    assert [row["alarms"] for row in rows] == [[]] * 8
    assert rows[-1]["reward"] > rows[0]["reward"]
    assert "alarm" not in capsys.readouterr().out
