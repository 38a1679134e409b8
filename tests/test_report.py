"""What a run says before it starts, the invariants that it checks on its own data, and its log rows."""

import csv
import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from micro import micro_config

import report
from checkpoint import notice
from config import RunError
from evaluation import diversity
from generate import Sample
from model import PolicyModel, frozen_copy
from ppo import Rollout
from report import LIMITS, alarms, bar_numbers, check_invariants, memory_estimate, rollout_stats
from sft import new_language_model
from train import Models, collect_rollout, load_prompts

pytest_plugins = ["micro"]


def new_policy(tokenizer, **settings) -> PolicyModel:
    torch.manual_seed(0)
    policy = PolicyModel(new_language_model(micro_config(**settings), tokenizer)).eval()
    with torch.no_grad():
        policy.language_model.transformer.wte.weight.mul_(3)  # far from uniform
    return policy


# ----------------------------------------------------------------------------------------------------------------
# Before the run
# ----------------------------------------------------------------------------------------------------------------


def estimate(monkeypatch, tokenizer, **settings) -> tuple[int, int]:
    """Bytes of weights and their like, and of a forward pass, as the estimate prints them."""
    monkeypatch.setattr(report, "gigabytes", lambda n_bytes: f"<{n_bytes:.0f}>")
    config = micro_config(**settings)
    language_model = new_language_model(config, tokenizer).to(getattr(torch, config.dtype))
    text = memory_estimate(config, PolicyModel(language_model))
    static, forward = map(int, re.findall(r"<(\d+)>", text))
    return static, forward


def test_the_memory_estimate_by_hand(monkeypatch, tokenizer):
    """Weights, reference, gradients and two moments; 18 floats a token, layer and unit; three tensors of logits."""
    parameters = sum(p.numel() for p in new_policy(tokenizer).parameters())
    logits = 3 * 4 * 2 * 12 * len(tokenizer)
    assert estimate(monkeypatch, tokenizer) == (5 * 4 * parameters, 18 * 4 * 2 * (12 + 12) * 1 * 16 + logits)


@pytest.mark.parametrize(
    ("change", "static", "forward"),
    [
        ({"mini_batch_size": 4}, "same", "more"),
        ({"max_new_tokens": 24}, "same", "more"),
        ({"max_prompt_length": 24}, "same", "more"),
        ({"gradient_checkpointing": True}, "same", "less"),
        ({"n_layer": 2}, "more", "more"),
        ({"n_embd": 32}, "more", "more"),
        ({"dtype": "bfloat16", "task": "generate"}, "less", "less"),
        ({"ppo_epochs": 9}, "same", "same"),
    ],
)
def test_the_memory_estimate_moves_with_the_settings(change, static, forward, monkeypatch, tokenizer):
    before, after = estimate(monkeypatch, tokenizer), estimate(monkeypatch, tokenizer, **change)
    words = ["more" if b > a else "less" if b < a else "same" for a, b in zip(before, after, strict=True)]
    assert words == [static, forward]


def test_gigabytes_are_thousands_of_millions():
    assert report.gigabytes(1_234_567_890) == "1.23 GB"


def test_the_notice_is_for_models_trained_from_scratch():
    text = notice(micro_config())
    for words in ("teaching demonstration", "8,897 parameters", "generated movie reviews", "--preset gpt2-imdb"):
        assert words in text
    assert "on data/mine.csv." in notice(micro_config(dataset_path="data/mine.csv"))
    assert notice(micro_config(base_model_name="gpt2")) == ""


# ----------------------------------------------------------------------------------------------------------------
# Invariants
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tokenizer):
    """A policy, its rollout and its samples before any update; the rows differ in length."""
    policy = new_policy(tokenizer)
    with torch.no_grad():
        policy.language_model.transformer.wte.weight[tokenizer.eos_token_id] *= 3
    terms = {"zero": lambda prompts, responses, rows: torch.zeros(len(responses))}
    config = micro_config(batch_size=8)
    prompts = load_prompts(config, tokenizer, "train", 8)
    models = Models(policy, frozen_copy(policy), tokenizer, terms)
    collected = collect_rollout(models, prompts, config, 0.05, torch.Generator().manual_seed(0))
    assert not collected.rollout.mask.all()
    return policy, collected.rollout, collected.sampled


def nudge(logprobs: torch.Tensor, by: float) -> torch.Tensor:
    """The first token of the last row a little more probable."""
    logprobs = logprobs.clone()
    logprobs[-1, 0] += by
    return logprobs


def test_an_untouched_policy_passes(start):
    check_invariants(*start, micro_config())


@pytest.mark.parametrize("by", [0.01, -0.01, math.nan])
def test_sampling_that_disagrees_with_scoring_is_diagnosed(by, start):
    policy, rollout, sampled = start
    wrong = Sample(sampled.response_ids, sampled.mask, nudge(sampled.logprobs, by))
    with pytest.raises(RunError, match="sampling and scoring disagree by"):
        check_invariants(policy, rollout, wrong, micro_config())
    with pytest.raises(RunError, match="sampling and scoring disagree by"):
        check_invariants(policy, replace(rollout, logprobs=nudge(rollout.logprobs, by)), sampled, micro_config())


@pytest.mark.parametrize("by", [0.01, -0.01])
def test_scoring_that_does_not_repeat_is_diagnosed(by, start):
    """Sampling and the first scoring agree, and a second one does not."""
    policy, rollout, sampled = start
    rollout = replace(rollout, logprobs=nudge(rollout.logprobs, by), ref_logprobs=nudge(rollout.ref_logprobs, by))
    sampled = Sample(sampled.response_ids, sampled.mask, nudge(sampled.logprobs, by))
    with pytest.raises(RunError, match=r"the importance ratio is .* before any update, not 1"):
        check_invariants(policy, rollout, sampled, micro_config(batch_size=8, mini_batch_size=8))


@pytest.mark.parametrize("by", [0.01, -0.01, math.nan])
def test_a_reference_with_other_weights_is_diagnosed(by, start):
    policy, rollout, sampled = start
    with pytest.raises(RunError, match="policy and reference differ by"):
        check_invariants(
            policy, replace(rollout, ref_logprobs=nudge(rollout.ref_logprobs, by)), sampled, micro_config()
        )


def test_dropout_is_diagnosed_where_it_is_on(start):
    """Only in training mode, and only with a probability above 0."""
    policy, rollout, sampled = start
    policy.language_model.transformer.drop = torch.nn.Dropout(0.1)
    check_invariants(policy.eval(), rollout, sampled, micro_config())
    with pytest.raises(RunError, match=r"dropout is on in language_model\.transformer\.drop"):
        check_invariants(policy.train(), rollout, sampled, micro_config())
    policy.language_model.transformer.drop.p = 0.0
    check_invariants(policy, rollout, sampled, micro_config())


def test_another_temperature_in_scoring_is_noticed(start):
    with pytest.raises(RunError, match="the importance ratio is"):
        check_invariants(*start, micro_config(temperature=0.7))


def test_what_stands_beyond_the_mask_is_not_checked(start):
    policy, rollout, sampled = start

    def spoil(logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.masked_fill(~rollout.mask, math.nan)

    rollout = replace(rollout, logprobs=spoil(rollout.logprobs), ref_logprobs=spoil(rollout.ref_logprobs))
    check_invariants(policy, rollout, Sample(*sampled[:2], spoil(sampled.logprobs)), micro_config())


# ----------------------------------------------------------------------------------------------------------------
# Log rows
# ----------------------------------------------------------------------------------------------------------------


def test_the_statistics_of_a_rollout_by_hand():
    """Two responses, of three tokens and of one; whatever stands beyond the mask would spoil every figure."""
    x = math.nan
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rollout = Rollout(
        query_ids=torch.zeros(2, 1, dtype=torch.long),
        query_mask=torch.ones(2, 1, dtype=torch.bool),
        response_ids=torch.zeros(2, 3, dtype=torch.long),
        mask=mask,
        logprobs=torch.tensor([[-1.0, -2.0, -1.0], [-0.5, x, x]]),
        ref_logprobs=torch.tensor([[-1.5, -1.0, -1.0], [-1.0, x, x]]),
        values=torch.tensor([[1.0, 2.0, 3.0], [2.0, x, x]]),
        scores=torch.tensor([0.5, 1.5]),
        kl=torch.tensor([[0.1, 0.2, 0.0], [0.5, 0.0, 0.0]]),
        rewards=torch.zeros(2, 3),
        advantages=torch.zeros(2, 3),
        returns=torch.tensor([[2.0, 2.0, 4.0], [0.0, x, x]]),
    )
    responses = ["good  film good\nFilm", " bad"]
    stats = rollout_stats(rollout, {"fn": torch.tensor([3.0, 5.0])}, torch.tensor([1.0, 2.0]), responses)
    k3 = (math.exp(-0.5) - 0.5) + (math.exp(1.0) - 2.0) + (math.exp(-0.5) - 0.5)
    expected = {
        "reward": 1.5,
        "variance": 0.25,
        "reward_fn": 4.0,
        "score": 1.0,
        "kl": 0.4,
        "kl_k1": 0.0,
        "kl_k3": k3 / 2,
    }
    expected |= {"value": 2.0, "return": 2.0, "response_length": 2.0}
    expected |= {"distinct_bigrams": 2 / 3, "ref_perplexity": math.exp(4.5 / 4)}  # good film, film good, good film
    # returns 2 2 4 0 have variance 2, and returns - values 1 0 1 -2 have 1.5
    assert stats == pytest.approx(expected | {"explained_variance": 0.25}, abs=1e-5)


def test_the_progress_bar_shows_five_numbers():
    stats = {"reward": 1.234, "kl_k1": -0.01, "entropy": 2.5, "response_length": 11.6, "ended": 0.25, "loss": 1.0}
    expected = {"reward": "1.23", "kl": "-0.01", "entropy": "2.50", "length": "12", "eos": "25%"}
    assert bar_numbers(stats) == expected


# ----------------------------------------------------------------------------------------------------------------
# Alarms
# ----------------------------------------------------------------------------------------------------------------


def log_row(**changes) -> dict[str, float]:
    healthy = {
        "reward": 0.5,
        "variance": 0.0,
        "response_length": 20.0,
        "distinct_bigrams": 0.5,
        "ended": 0.75,
        "ref_perplexity": 8.0,
    }
    return healthy | changes


# Two rollouts whose mean is the healthy row, so that neither of them alone is the start.
BEGINNING = [
    log_row(reward=0.4, response_length=22.0, distinct_bigrams=0.75, ended=1.0, ref_perplexity=12.0),
    log_row(reward=0.6, response_length=18.0, distinct_bigrams=0.25, ended=0.5, ref_perplexity=4.0),
]


def raised(*latest: dict) -> dict[str, str]:
    """The alarms when two rollouts of 64 responses are compared with the beginning's two."""
    return alarms([*BEGINNING, *latest], 64)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("response_length", [10.0, 20.0, 40.0], [9.9, 1.0, 40.1]),  # 50 and 200 % of 20 tokens
        ("distinct_bigrams", [0.31, 1.0], [0.29, 0.0]),  # 60 % of .5
        ("ended", [0.56, 1.0], [0.54, 0.0]),  # .75 less 20 points
        ("ref_perplexity", [4.0, 8.0, 16.0], [3.9, 16.1]),  # 50 and 200 % of 8
    ],
)
def test_an_alarm_is_raised_just_outside_its_bounds(name, inside, outside):
    for value in inside:
        assert raised(*[log_row(reward=0.52, **{name: value})] * 2) == {}
    for value in outside:
        assert list(raised(*[log_row(reward=0.52, **{name: value})] * 2)) == [name]


def test_an_alarm_says_in_words_what_happened():
    latest = log_row(reward=0.7, response_length=2.0, ended=0.5), log_row(reward=1.1, response_length=0.0, ended=0.0)
    assert raised(*latest) == {
        "response_length": "the reward rose from 0.5 to 0.9 while the mean length in tokens went from 20 to 1; "
        "expected 50 to 200 % of the start",
        "ended": "the reward rose from 0.5 to 0.9 while the share of responses with EOS went from 0.75 to 0.25; "
        "expected at most 20 points under the start",
    }


COLLAPSED = {"response_length": 1.0, "distinct_bigrams": 0.0, "ended": 0.0, "ref_perplexity": 1.0}


def test_everything_may_go_wrong_at_once():
    assert set(raised(*[log_row(reward=0.9, **COLLAPSED)] * 2)) == set(COLLAPSED) == set(LIMITS)


@pytest.mark.parametrize("reward", [0.5, 0.45, -1.0])
def test_there_is_no_alarm_while_the_reward_is_not_higher(reward):
    """A collapse that nothing rewards shows in the reward itself."""
    assert raised(*[log_row(reward=reward, **COLLAPSED)] * 2) == {}


def test_a_rise_that_chance_explains_is_none():
    """128 responses each. Within and between rollouts, variances are .25 + .01 and .15: 2 sqrt(.41 / 127) = .1136."""
    start = [row | {"variance": 0.25} for row in BEGINNING]
    for rise, expected in ((0.113, set()), (0.114, set(LIMITS))):
        latest = [log_row(reward=0.5 + rise, variance=0.15, **COLLAPSED)] * 2
        assert set(alarms([*start, *latest], 64)) == expected


def test_an_alarm_is_about_the_latest_rollouts():
    bad, good = log_row(reward=0.9, **COLLAPSED), log_row(reward=0.9)
    assert raised(bad, good, good) == {}
    assert set(raised(good, bad, bad)) == set(LIMITS)


def test_the_first_rollouts_are_what_is_compared_with():
    bad = log_row(reward=0.9, **COLLAPSED)
    assert raised() == raised(bad) == {}  # too few to tell
    assert alarms([*BEGINNING, bad, bad, bad], 128) != {}
    for batch_size, n in ((128, 2), (64, 2), (63, 3), (16, 8), (1000, 2)):
        history = [log_row()] * n + [bad] * n
        assert alarms(history[:-1], batch_size) == {}
        assert set(alarms(history, batch_size)) == set(LIMITS)


def test_responses_of_one_word_raise_no_alarm_of_their_own():
    """Nothing can be said twice in them, be it at the start or later."""
    stats = diversity(["good", "good"])
    assert stats["distinct_bigrams"] == 1.0
    assert raised(*[log_row(reward=0.9, distinct_bigrams=stats["distinct_bigrams"])] * 2) == {}


SHORT = "def short(prompts, responses, rows):\n    return [-len(response.split()) for response in responses]\n"


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """`--task train` of the tiny preset itself, with more flags, as a command of its own; its stages are made once."""
    root = tmp_path_factory.mktemp("tiny")
    (root / "rewards.py").write_text(SHORT)

    def run(name: str, *arguments: str) -> tuple[str, list[dict]]:
        command = [sys.executable, report.__file__.replace("report.py", "main.py"), "--task", "train"]
        done = subprocess.run(
            [*command, "--output_dir", name, *arguments], cwd=root, capture_output=True, text=True, check=True
        )
        return done.stdout, json.loads((root / name / "training_stats.json").read_text())

    return run


@pytest.mark.slow
def test_a_collapse_provoked_on_purpose_raises_the_alarm(tiny_run):
    """A reward for saying little at no price of KL: the policy learns to say next to nothing, and is told on once."""
    output, rows = tiny_run("collapse", "--reward_fn", "rewards.py:short", "--kl_coef", "0")
    lengths = [row["response_length"] for row in rows]
    assert lengths[0] > 15 and lengths[-1] < 5
    first = next(row["step"] for row in rows if any("mean length in tokens" in text for text in row["alarms"]))
    latest = [(a + b) / 2 for a, b in itertools.pairwise(lengths)]
    halved = next(step for step in range(3, 24) if latest[step - 1] < latest[0] / 2)
    assert first == halved
    assert output.count("while the mean length in tokens went from") == 1
    assert f"alarm at update {first}: the reward rose from" in output
    assert rows[-1]["alarms"] != []


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_a_good_run_raises_no_alarm(seed, tiny_run):
    output, rows = tiny_run(f"good-{seed}", "--seed", seed)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.3
    assert [row["alarms"] for row in rows] == [[]] * 24
    assert "alarm" not in output


def test_logs_grow_by_a_rollout_and_keep_every_character(tmp_path):
    responses = [{"step": 0, "query": 'A "film",', "response": "\nnaïve; ", "reward": 0.5}]
    report.write_logs(tmp_path, [{"step": 0}], [{"step": 0}], responses)
    more = [{"step": 1, "query": "B", "response": "", "reward": -1.0}] * 2
    report.write_logs(tmp_path, [{"step": 0}, {"step": 1}], [{"step": 0}, {"step": 1}], more)
    assert json.loads((tmp_path / "training_stats.json").read_text()) == [{"step": 0}, {"step": 1}]
    assert json.loads((tmp_path / "timings.json").read_text()) == [{"step": 0}, {"step": 1}]
    with (tmp_path / "training_log.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{name: str(value) for name, value in row.items()} for row in responses + more]
