"""The experiments: each run differs from the baseline by what it says and no more, and what is wrong in one of them is
wrong while it trains only. That they are run at all is for docs/experiments.md.
"""

import json
import math
import random
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from tiny_models import EOS, PAD, letter_tokenizer, tiny_policy

import generate
import ppo
import train
from benchmarks import experiments, variants
from benchmarks.variants import EXPERIMENTS, VARIANTS, Variant, config_of
from config import PRESETS
from model import frozen_copy
from prompts import Prompt
from report import rollout_stats
from reward import load_reward_function, load_reward_terms
from run import Prompts
from train import Fixed, new_state

PAGE = Path(__file__).parents[1] / "docs/experiments.md"
DIFFERENCES = {
    "start": {},
    "baseline": {},
    "kl-0": {"kl_coef": 0.0},
    "kl-0.02": {"kl_coef": 0.02},
    "kl-0.2": {"kl_coef": 0.2},
    "kl-0.6": {"kl_coef": 0.6},
    "no-clip": {},
    "no-clip-16": {"ppo_epochs": 16},
    "lam-0": {"lam": 0.0},
    "lam-0.95": {"lam": 0.95},
    "raw": {"whiten_advantages": False},
    "epochs-1": {"ppo_epochs": 1},
    "epochs-4": {"ppo_epochs": 4},
    "epochs-16": {"ppo_epochs": 16},
    "hack": {"reward_fn": "praise", "ppo_epochs": 4, "n_updates": 20},
    "hack-length": {
        "reward_fn": "praise",
        "ppo_epochs": 4,
        "n_updates": 20,
        "reward_weights": "reward_fn=1,length=5",
        "length_range": "5,30",
    },
    "hack-repetition": {
        "reward_fn": "praise",
        "ppo_epochs": 4,
        "n_updates": 20,
        "reward_weights": "reward_fn=1,repetition=-10",
    },
    "hack-kl-0.5": {"reward_fn": "praise", "ppo_epochs": 4, "n_updates": 20, "kl_coef": 0.5},
    "hack-kl": {"reward_fn": "praise", "ppo_epochs": 4, "n_updates": 20, "kl_coef": 1.0},
    "separate": {"lam": 0.95, "critic": "separate"},
    "warm": {"lam": 0.95},
    "separate-warm": {"lam": 0.95, "critic": "separate"},
    "mask-short": {},
    "mask-long": {},
    "brief": {"reward_weights": "length=1", "length_range": "1,12"},
    "brief-short": {"reward_weights": "length=1", "length_range": "1,12"},
    "brief-long": {"reward_weights": "length=1", "length_range": "1,12"},
}
PATCHED = {
    "no-clip": (ppo, "policy_losses", variants.unclipped),
    "no-clip-16": (ppo, "policy_losses", variants.unclipped),
    "mask-short": (generate, "response_mask", variants.mask_one_short),
    "mask-long": (generate, "response_mask", variants.mask_one_long),
    "brief-short": (generate, "response_mask", variants.mask_one_short),
    "brief-long": (generate, "response_mask", variants.mask_one_long),
}
WARMED_UP = {"warm", "separate-warm"}
IDS = torch.tensor([[7, EOS, PAD, PAD], [7, 8, EOS, PAD], [7, 8, 9, 9], [EOS, PAD, PAD, PAD], [7, 8, 9, EOS]])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_from_the_baseline_by_what_it_says_alone(name):
    """`config_of` would have raised UsageError for settings that no run can have."""
    baseline, own = asdict(config_of("baseline", seed=2)), asdict(config_of(name, seed=2))
    found = {key: value for key, value in own.items() if value != baseline[key]}
    if "reward_fn" in found:
        found["reward_fn"] = found["reward_fn"].rpartition(":")[2]
    assert found == DIFFERENCES[name]
    assert VARIANTS[name].patched == PATCHED.get(name, ())
    assert bool(VARIANTS[name].warm_up) == (name in WARMED_UP)
    assert VARIANTS[name].is_trained == (name != "start")


def test_the_baseline_is_the_demonstration_but_smaller():
    own = asdict(config_of("baseline", seed=0))
    changed = {key for key, value in PRESETS["tiny"].items() if own[key] != value}
    assert changed == {"batch_size", "gradient_accumulation_steps", "n_updates", "eval_samples"}
    assert own["batch_size"] < PRESETS["tiny"]["batch_size"] and own["n_updates"] < PRESETS["tiny"]["n_updates"]


# ----------------------------------------------------------------------------------------------------------------
# What is changed beyond settings
# ----------------------------------------------------------------------------------------------------------------


def test_masks_off_by_one_by_hand():
    right = [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    short = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]
    long = [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]
    ends = torch.tensor([EOS])
    assert ppo.response_mask(IDS, ends).long().tolist() == right
    assert variants.mask_one_short(IDS, ends).long().tolist() == short
    assert variants.mask_one_long(IDS, ends).long().tolist() == long


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", PATCHED)
def test_what_is_patched_is_so_while_a_variant_trains_and_not_after(name, fails, monkeypatch):
    module, attribute, wrong = PATCHED[name]
    shipped, seen = getattr(module, attribute), []

    def stand_in(*args):
        seen.append(getattr(module, attribute))
        if fails:
            raise RuntimeError("in the middle")
        return []

    monkeypatch.setattr(experiments, "train", stand_in)
    monkeypatch.setattr(experiments, "new_state", lambda policy, config: None)
    arguments = (VARIANTS[name], None, None, Prompts([], [], []), config_of(name, seed=0))
    if fails:
        with pytest.raises(RuntimeError):
            experiments.trained(*arguments)
    else:
        assert experiments.trained(*arguments) == []
    assert seen == [wrong] and shipped is not wrong
    assert getattr(module, attribute) is shipped


@pytest.mark.parametrize("name", ["mask-short", "mask-long"])
def test_the_mask_that_trains_is_off_by_one(name):
    """Row by row, beside the same responses with the shipped mask."""
    lengths = []
    for variant in (VARIANTS["baseline"], VARIANTS[name]):
        policy, fixed, prompts, config = micro_run()
        seen = []

        def noted(*args, seen=seen):
            for rollout, stats in train.train(*args):
                seen.append(rollout.mask.sum(1))
                yield rollout, stats

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiments, "train", noted)
            assert len(experiments.trained(variant, policy, fixed, prompts, config)) == 1
        lengths.append(seen[0])
    right, wrong = lengths
    difference = set((wrong - right).tolist())
    assert difference == ({0, -1} if name == "mask-short" else {0, 1})


def test_the_loss_without_clipping_by_hand():
    ratio, advantages = torch.tensor([[0.1, 1.0, 9.0]]), torch.tensor([[-2.0, 3.0, 1.0]])
    losses, clipped = variants.unclipped(
        ratio=ratio, advantages=advantages, mask=torch.ones(1, 3, dtype=torch.bool), clip_range=0.2
    )
    assert_close(losses, torch.tensor([[0.2, -3.0, -9.0]]))
    assert not clipped.any()


def micro_run(critic: str = "shared"):
    """A policy of random weights, and what it trains on, in settings that take a moment."""
    config = config_of("baseline", seed=0)
    changes = {"batch_size": 8, "mini_batch_size": 8, "max_new_tokens": 6, "n_updates": 1, "reward_weights": ""}
    config = type(config)(**asdict(config) | changes | {"reward_fn": variants.COUNTED["reward_fn"], "critic": critic})
    policy = tiny_policy("gpt2")
    fixed = Fixed(frozen_copy(policy), letter_tokenizer(), load_reward_terms(config, "", torch.device("cpu")))
    prompts = [Prompt("ab", [2, 3 + number], {}) for number in range(8)]
    return policy, fixed, Prompts(prompts, prompts, prompts), config


def test_warming_up_moves_the_value_head_and_nothing_of_the_policy():
    policy, fixed, prompts, config = micro_run()
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    experiments.warm_up(policy, fixed, prompts, config, n_updates=2)
    moved = {name for name, weight in policy.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {"value_head.weight", "value_head.bias"}
    assert all(weight.requires_grad for weight in policy.parameters())
    n_trained = sum(len(group["params"]) for group in new_state(policy, config).optimizer.param_groups)
    assert n_trained == len(before)


def test_the_reward_that_can_be_won_counts_words():
    spec = variants.COUNTED["reward_fn"]
    texts = ["Great, great; GREAT!", "A greatness unlike the best.", ""]
    assert load_reward_function(spec)(["x"] * 3, texts, [{}] * 3).tolist() == [3.0, 1.0, 0.0]


# ----------------------------------------------------------------------------------------------------------------
# What is said of the runs
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "claim", [claim for e in EXPERIMENTS.values() for claim in e.expected], ids=lambda c: c.sentence
)
def test_every_claim_can_hold_and_can_fail(claim):
    """Of figures of every order of magnitude, some negative; that four agree to 0.05 is rare, so of equal ones, too."""
    rng, answers = random.Random(0), {bool(claim.holds(lambda name, key: 1.0))}
    for _ in range(5000):
        drawn = defaultdict(lambda: rng.choice((-1, 1, 1, 1)) * 10 ** rng.uniform(-2, 2))
        answers.add(bool(claim.holds(lambda name, key, drawn=drawn: drawn[name, key])))
        if len(answers) == 2:
            break
    assert answers == {False, True}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_names_runs_and_figures_that_there_are(name):
    experiment = EXPERIMENTS[name]
    row = dict.fromkeys(log_columns(), 1.0)
    run = {"history": [row] * 3, "figures": dict.fromkeys(EVALUATED, 1.0), "seconds": 1.0, "alarms": []}
    figures = experiments.figures_of(run)
    assert set(experiment.variants) <= set(VARIANTS)
    assert set(experiment.figures) <= set(figures)
    assert set(experiment.panels) <= set(row)
    asked = []
    for claim in experiment.expected:
        claim.holds(lambda variant, key: asked.append((variant, key)) or figures[key])
    assert {variant for variant, _ in asked} <= set(experiment.variants)


EVALUATED = ("reward", "reward_reward_fn", "kl", "positive", "perplexity", "distinct_bigrams", "repetition", "length")
EVALUATED += ("ended",)


def log_columns() -> set[str]:
    policy, fixed, prompts, config = micro_run()
    [(rollout, stats)] = train.train(new_state(policy, config), fixed, prompts.train, config)
    return {*rollout_stats(rollout), *stats}


def test_figures_of_a_run_by_hand():
    columns = ("explained_variance", "entropy", "clip_fraction", "approx_kl_k3", "grad_norm")
    history = [{"reward": i, "ratio_max": 10 - i} | dict.fromkeys(columns, 0.5 * i) for i in range(6)]
    figures = experiments.figures_of({"history": history, "figures": {"kl": 7}, "seconds": 3, "alarms": ["a", "b"]})
    assert figures == {
        "kl": 7,
        "seconds": 3,
        "alarms": 2,
        "early_reward": 0.5,
        "early_explained": 0.25,
        "explained_variance": 2.25,
        "entropy": 2.5,
        "clip_fraction": 1.25,
        "ratio_max": 10,
        "step_kl": 1.25,
        "grad_norm": 1.25,
    }


def test_a_table_and_its_verdicts_by_hand():
    claim = variants.Claim("More.", lambda f: f("kl-0", "kl") > f("baseline", "kl"))
    experiment = variants.Experiment("T", ("baseline", "kl-0"), ("kl", "entropy"), (), (claim,))

    def run(kl: float) -> dict:
        return {"history": [], "figures": {"kl": kl}, "seconds": 0, "alarms": []}

    runs = {"baseline": [run(1), run(2), run(3)], "kl-0": [run(5), run(1), run(300)]}
    assert experiments.table(experiment, runs).splitlines()[2:] == [
        "| baseline | 2.00 ± 1.00 |  |",
        "| β 0 | 102 ± 171 |  |",
    ]
    assert experiments.verdicts(experiment, runs) == ["- More. Held in 2 of 3 seeds."]


def test_the_best_frontier_by_hand():
    weights, kl = experiments.tilted(torch.tensor([[0.0, math.log(3)], [5.0, 5.0]], dtype=torch.float64), kl_coef=1.0)
    assert_close(weights, torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64))
    assert kl == pytest.approx((0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2)
    _, far = experiments.tilted(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), kl_coef=0.01)
    assert far == pytest.approx(math.log(4))


def test_the_best_frontier_reads_prompt_by_prompt_and_counts_the_penalty(tmp_path):
    rows = [[1.0, True], [0.0, True]] * 64 + [[0.0, True], [1.0, False]] * 64  # two prompts 64 times, and again
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(rows[:128] * 16))
    rewards, ended = experiments.reference_rows(path)
    assert rewards.shape == (64, 32) and ended.bool().all()
    assert set(rewards[0].tolist()) == {1.0} and set(rewards[1].tolist()) == {0.0}
    assert all(reward == pytest.approx(0.5) and abs(kl) < 1e-9 for kl, reward in experiments.best_frontier(path))


def test_a_run_that_is_there_is_not_trained_again(tmp_path, monkeypatch):
    played = []

    def play(name: str, seed: int) -> dict:
        played.append((name, seed))
        return {"config": asdict(config_of(name, seed)), "history": []}

    monkeypatch.setattr(experiments, "play", play)
    first = experiments.run_of("lam-0", 1, tmp_path)
    again = experiments.run_of("lam-0", 1, tmp_path)
    assert played == [("lam-0", 1)] and json.loads(json.dumps(first)) == again
    monkeypatch.setitem(VARIANTS, "lam-0", Variant("λ 0", {"lam": 0.1}))
    experiments.run_of("lam-0", 1, tmp_path)
    experiments.run_of("lam-0", 2, tmp_path)
    assert played == [("lam-0", 1), ("lam-0", 1), ("lam-0", 2)]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_page_has_every_experiment_with_what_was_expected_of_it(name):
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"## {EXPERIMENTS[name].title}" in page
    assert f"experiments/{name}.png" in page and (PAGE.parent / f"experiments/{name}.png").is_file()
    for claim in EXPERIMENTS[name].expected:
        assert claim.sentence in page
