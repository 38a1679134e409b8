"""What a run says of itself: its log rows, its progress bar, its alarms."""

import csv
import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import read_stats

import report
from evaluation import diversity
from files import read_rows
from prompts import Prompt
from report import LIMITS, alarms, bar_numbers, log_rows, rollout_stats
from train import Rollout

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
        sampled_logprobs=torch.tensor([[-1.0, -2.25, -0.5], [-0.25, x, x]]),
        ref_logprobs=torch.tensor([[-1.5, -1.0, -1.0], [-1.0, x, x]]),
        values=torch.tensor([[1.0, 2.0, 3.0], [2.0, x, x]]),
        entropy=torch.tensor([[1.0, 2.0, 0.5], [0.5, x, x]]),
        has_eos=torch.tensor([False, True]),
        prompts=[Prompt("A", [0], {}), Prompt("B", [0], {})],
        texts=["good  film good\nFilm", " bad"],
        raw_scores=torch.tensor([1.0, 2.0]),
        term_scores={"fn": torch.tensor([3.0, 5.0])},
        collected_at=0.0,
        scores=torch.tensor([0.5, 1.5]),
        kl=torch.tensor([[0.1, 0.2, 0.0], [0.5, 0.0, 0.0]]),
        rewards=torch.zeros(2, 3),
        advantages=torch.zeros(2, 3),
        returns=torch.tensor([[2.0, 2.0, 4.0], [0.0, x, x]]),
    )
    stats = rollout_stats(rollout)
    k3 = (math.exp(-0.5) - 0.5) + (math.exp(1.0) - 2.0) + (math.exp(-0.5) - 0.5)
    expected = {
        "reward": 1.5,
        "variance": 0.25,
        "reward_fn": 4.0,
        "score": 1.0,
        "kl": 0.4,
        "kl_k1": 0.0,
        "kl_k3": k3 / 2,
        "value": 2.0,
        "return": 2.0,
        "explained_variance": 0.25,  # returns 2 2 4 0 have variance 2, and returns - values 1 0 1 -2 have 1.5
        "response_length": 2.0,
        "distinct_bigrams": 2 / 3,  # good film, film good, good film
        "ref_perplexity": math.exp(4.5 / 4),
        "entropy": 1.0,
        "ended": 0.5,
        "sampling_gap": 0.25,
        "sampling_gap_max": 0.5,
    }
    assert stats == pytest.approx(expected, abs=1e-5)
    assert log_rows(7, rollout) == [
        {"step": 7, "query": "A", "response": "good  film good\nFilm", "reward": 1.0, "reward_fn": 3.0},
        {"step": 7, "query": "B", "response": " bad", "reward": 2.0, "reward_fn": 5.0},
    ]


def test_the_timing_of_an_update_by_hand(monkeypatch):
    """From 10 to 14 s the rollout, with 30 tokens; until 16 s the update."""
    monkeypatch.setattr(report.time, "perf_counter", lambda: 16.0)
    rollout = SimpleNamespace(collected_at=14.0, mask=torch.ones(3, 10, dtype=torch.bool))
    expected = {"step": 4, "seconds_rollout": 4.0, "seconds_update": 2.0, "tokens_per_second": 5.0}
    assert report.timing(4, 10.0, rollout) == expected


def test_the_progress_bar_shows_five_numbers():
    stats = {"reward": 1.234, "kl_k1": -0.01, "entropy": 2.5, "response_length": 11.6, "ended": 0.25, "loss": 1.0}
    expected = {"reward": "1.23", "kl": "-0.01", "entropy": "2.50", "length": "12", "eos": "25%"}
    assert bar_numbers(stats) == expected
    assert bar_numbers(stats | {"kl_k1": -0.001})["kl"] == "0.00"


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
        "kl_k1": 2.0,
        "explained_variance": 0.5,
        "value_loss": 0.1,
        "sampling_gap": 0.01,
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


def test_a_sampler_that_comes_apart_from_scoring_is_told_on():
    """Three times what it was, from a thousandth of a nat on."""
    assert raised(*[log_row(sampling_gap=0.0299)] * 2) == {}
    (told,) = raised(*[log_row(sampling_gap=0.0301)] * 2).values()
    assert told.startswith("sampling and scoring differ by 0.03 nats a token, which were 0.01 at the start")
    small = [log_row(sampling_gap=1e-7)] * 2
    for gap, count in ((0.9e-3, 0), (1.1e-3, 1)):
        assert len(alarms([*small, *[log_row(sampling_gap=gap)] * 2], 64)) == count


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


@pytest.mark.parametrize("reward", [0.5, 0.47, -1.0])
def test_a_collapse_that_nothing_rewards_shows_in_the_reward_itself(reward):
    expected = {} if reward > 0 else {"reward": "the reward fell from 0.5 to -1"}
    assert raised(*[log_row(reward=reward, **COLLAPSED)] * 2) == expected


@pytest.mark.parametrize(("fall", "expected"), [(0.227, set()), (0.228, {"reward"})])
def test_a_fall_that_chance_hardly_explains_is_told(fall, expected):
    """Four standard errors of `test_a_rise_that_chance_explains_is_none`: .2272."""
    start = [row | {"variance": 0.25} for row in BEGINNING]
    assert set(alarms([*start, *[log_row(reward=0.5 - fall, variance=0.15)] * 2], 64)) == expected


def test_far_from_the_reference_for_nothing_is_told():
    assert raised(*[log_row(reward=0.5, kl_k1=9.9)] * 2) == {}
    assert raised(*[log_row(reward=0.9, kl_k1=44.0)] * 2) == {}  # for a reward that rose
    assert raised(*[log_row(reward=0.5, kl_k1=44.0)] * 2) == {
        "kl": "the policy is 44 nats a response from the reference, and the reward has not risen: it was 0.5 and is 0.5"
    }


def test_a_policy_that_is_lost_with_the_first_update_is_told_on():
    first = [log_row(kl_k1=0.0), log_row(kl_k1=453.0)]
    assert set(alarms([*first, *[log_row(kl_k1=19.0)] * 2], 64)) == {"kl"}


def test_a_distance_that_was_there_from_the_start_or_is_little_a_token_is_not_told():
    """An 8-bit reference is not what the policy starts as; 10 nats on 500 tokens are next to nothing."""
    far = [row | {"kl_k1": 12.0} for row in BEGINNING]
    assert alarms([*far, *[log_row(kl_k1=12.0)] * 2], 64) == {}
    long = [row | {"response_length": 500.0} for row in BEGINNING]
    assert alarms([*long, *[log_row(kl_k1=99.0, response_length=500.0)] * 2], 64) == {}
    assert set(alarms([*long, *[log_row(kl_k1=103.0, response_length=500.0)] * 2], 64)) == {"kl"}


def test_a_fall_of_a_constant_reward_by_rounding_is_none():
    start = [log_row(reward=0.3)] * 2
    assert alarms([*start, *[log_row(reward=0.3 - 3e-8)] * 2], 64) == {}


def test_values_that_run_away_are_told_whatever_the_reward():
    """A critic that is worse than a constant is usual at first, and a loss near 0 can grow."""
    assert raised(*[log_row(reward=0.9, explained_variance=-11.0, value_loss=0.9)] * 2) == {}
    assert raised(*[log_row(reward=0.9, explained_variance=-9.0, value_loss=1e15)] * 2) == {}
    assert raised(*[log_row(reward=0.9, explained_variance=-1e9, value_loss=1e15)] * 2) == {
        "value_loss": "the value loss went from 0.1 to 1e+15, more than ten times what a constant would have"
    }


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
        return done.stdout, read_stats(root / name)

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
    assert output.count("while the mean length in tokens went from") == 2
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
    report.write_logs(tmp_path, {"step": 0}, {"step": 0, "seconds": 0.5}, responses)
    more = [{"step": 1, "query": "B", "response": "", "reward": -1.0}] * 2
    report.write_logs(tmp_path, {"step": 1}, {"step": 1, "seconds": 0.25}, more)
    assert (tmp_path / "training_stats.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'
    assert read_rows(tmp_path / "timings.jsonl") == [{"step": 0, "seconds": 0.5}, {"step": 1, "seconds": 0.25}]
    with (tmp_path / "training_log.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{name: str(value) for name, value in row.items()} for row in responses + more]
