"""What benchmarks/experiments.py tries, and what was expected of it: its runs, its experiments, and claims about them.

The claims were written down before the runs that they are about. docs/experiments.md says which of them held.
"""

import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

import generate  # noqa: E402
import ppo  # noqa: E402
from config import PRESETS, Config  # noqa: E402

SMALL = {  # half the demonstration's rows; the precision is named, lest another day's measurement chooses another
    "batch_size": 64,
    "gradient_accumulation_steps": 1,
    "n_updates": 14,
    "eval_samples": 128,
    "matmul_precision": "highest",
}
WARM_UP = 6  # updates of the critic alone
PRAISE = {"best", "better", "delight", "excellent", "fresh", "funny", "gem", "great", "honest", "loved", "lovely"}
PRAISE |= {"superb", "terrific", "treat", "wonderful"}


class Variant(NamedTuple):
    """A run: how tables and figures call it, and in what it differs from the baseline."""

    label: str
    changes: Mapping = MappingProxyType({})
    patched: tuple = ()  # module, name and function: what stands there while it trains
    warm_up: int = 0  # updates of the critic alone before the first
    is_trained: bool = True


class Claim(NamedTuple):
    """A sentence, and whether it holds of the figures of one seed's runs, which are asked for as f(variant, figure)."""

    sentence: str
    holds: Callable[[Callable[[str, str], float]], bool]


class Experiment(NamedTuple):
    """Its runs, what its table and its panels show, and what was expected of it."""

    title: str
    variants: tuple[str, ...]
    figures: tuple[str, ...]
    panels: tuple[str, ...]
    expected: tuple[Claim, ...]


# --------------------------------------------------------------------------------------------------------------------
# What is changed beyond settings
# --------------------------------------------------------------------------------------------------------------------


def praise(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """A reward for --reward_fn that understands nothing: how many words of a response are among PRAISE."""
    return [float(sum(word in PRAISE for word in re.findall(r"[a-z]+", text.lower()))) for text in responses]


def unclipped(clip_range: float, shipped: Callable = ppo.policy_losses, **tensors) -> tuple:
    """`ppo.policy_losses` with an ε without end."""
    return shipped(clip_range=math.inf, **tensors)


def mask_one_short(response_ids: torch.Tensor, eos_ids: torch.Tensor) -> torch.Tensor:
    """`ppo.response_mask` up to the first EOS and not including it; a response that is nothing else keeps it."""
    mask = torch.isin(response_ids, eos_ids).long().cumsum(1) == 0
    mask[:, 0] = True
    return mask


def mask_one_long(
    response_ids: torch.Tensor, eos_ids: torch.Tensor, shipped: Callable = ppo.response_mask
) -> torch.Tensor:
    """`ppo.response_mask` with the token behind the EOS, where there is a column for it."""
    return functional.pad(shipped(response_ids, eos_ids)[:, :-1], (1, 0), value=True)


COUNTED = {"reward_fn": f"{Path(__file__).resolve()}:praise", "ppo_epochs": 4, "n_updates": 20}  # it takes longer
BRIEF = {"reward_weights": "length=1", "length_range": "1,12"}
NO_CLIP = (ppo, "policy_losses", unclipped)
VARIANTS = {
    "start": Variant("before PPO", is_trained=False),
    "baseline": Variant("baseline"),
    "kl-0": Variant("β 0", {"kl_coef": 0.0}),
    "kl-0.02": Variant("β 0.02", {"kl_coef": 0.02}),
    "kl-0.2": Variant("β 0.2", {"kl_coef": 0.2}),
    "kl-0.6": Variant("β 0.6", {"kl_coef": 0.6}),
    "no-clip": Variant("no clip, 2 epochs", patched=NO_CLIP),
    "no-clip-16": Variant("no clip, 16 epochs", {"ppo_epochs": 16}, NO_CLIP),
    "lam-0": Variant("λ 0", {"lam": 0.0}),
    "lam-0.95": Variant("λ 0.95, shared head", {"lam": 0.95}),
    "raw": Variant("not whitened", {"whiten_advantages": False}),
    "epochs-1": Variant("1 epoch", {"ppo_epochs": 1}),
    "epochs-4": Variant("4 epochs", {"ppo_epochs": 4}),
    "epochs-16": Variant("16 epochs", {"ppo_epochs": 16}),
    "hack": Variant("words counted", COUNTED),
    "hack-length": Variant(
        "length 5 to 30", COUNTED | {"reward_weights": "reward_fn=1,length=5", "length_range": "5,30"}
    ),
    "hack-repetition": Variant("repetition -10", COUNTED | {"reward_weights": "reward_fn=1,repetition=-10"}),
    "hack-kl-0.5": Variant("β 0.5", COUNTED | {"kl_coef": 0.5}),
    "hack-kl": Variant("β 1", COUNTED | {"kl_coef": 1.0}),
    "separate": Variant("separate", {"lam": 0.95, "critic": "separate"}),
    "warm": Variant("shared, warmed up", {"lam": 0.95}, warm_up=WARM_UP),
    "separate-warm": Variant("separate, warmed up", {"lam": 0.95, "critic": "separate"}, warm_up=WARM_UP),
    "mask-short": Variant("EOS left out", patched=(generate, "response_mask", mask_one_short)),
    "mask-long": Variant("one token too many", patched=(generate, "response_mask", mask_one_long)),
    "brief": Variant("the right mask", BRIEF),
    "brief-short": Variant("EOS left out", BRIEF, (generate, "response_mask", mask_one_short)),
    "brief-long": Variant("one token too many", BRIEF, (generate, "response_mask", mask_one_long)),
}


def config_of(name: str, seed: int) -> Config:
    return Config(**{"preset": "tiny", "seed": seed} | PRESETS["tiny"] | SMALL | VARIANTS[name].changes)


# --------------------------------------------------------------------------------------------------------------------
# What was expected
# --------------------------------------------------------------------------------------------------------------------


def falls(values: Iterable[float]) -> bool:
    """Whether each is below the one before it."""
    return all(later < earlier for earlier, later in itertools.pairwise(values))


def width(values: Iterable[float]) -> float:
    values = list(values)
    return max(values) - min(values)


PRICES = ("kl-0", "kl-0.02", "baseline", "kl-0.2", "kl-0.6")
CRITICS = ("lam-0.95", "separate", "warm", "separate-warm")
TEXT = ("reward", "kl", "positive", "perplexity", "distinct_bigrams", "length", "ended")

FRONTIER = (
    Claim("Each higher price has the lower KL.", lambda f: falls(f(name, "kl") for name in PRICES)),
    Claim(
        "From β 0 to 0.07 the KL falls by half or more, and the reward by less than 0.05.",
        lambda f: f("baseline", "kl") <= f("kl-0", "kl") / 2 and f("baseline", "reward") > f("kl-0", "reward") - 0.05,
    ),
    Claim(
        "At β 0.6 the reward is at least 0.1 below the baseline's.",
        lambda f: f("kl-0.6", "reward") < f("baseline", "reward") - 0.1,
    ),
)
NO_KL = (
    Claim(
        "The reward is the baseline's or higher, to within 0.01.",
        lambda f: f("kl-0", "reward") > f("baseline", "reward") - 0.01,
    ),
    Claim(
        "The judge of fluency finds the text worse: its perplexity is at least 1.2 times the baseline's.",
        lambda f: f("kl-0", "perplexity") > 1.2 * f("baseline", "perplexity"),
    ),
    Claim(
        "The share of distinct pairs of words is lower.",
        lambda f: f("kl-0", "distinct_bigrams") < f("baseline", "distinct_bigrams"),
    ),
)
NO_CLIPPING = (
    Claim(
        "With 2 epochs it makes no difference: the rewards are within 0.05.",
        lambda f: abs(f("no-clip", "reward") - f("baseline", "reward")) < 0.05,
    ),
    Claim(
        "With 16 epochs an update goes at least twice as far without it.",
        lambda f: f("no-clip-16", "step_kl") > 2 * f("epochs-16", "step_kl"),
    ),
    Claim(
        "With 16 epochs the reward is lower without it, by 0.1 or more.",
        lambda f: f("no-clip-16", "reward") < f("epochs-16", "reward") - 0.1,
    ),
)
LAMBDA = (
    Claim(
        "λ 0 learns most slowly, as values have to travel back token by token.",
        lambda f: f("lam-0", "early_reward") < min(f("lam-0.95", "early_reward"), f("baseline", "early_reward")),
    ),
    Claim("At the end λ 0 is at least 0.1 below λ 1.", lambda f: f("lam-0", "reward") < f("baseline", "reward") - 0.1),
    Claim(
        "λ 0.95 and 1 end within 0.05 of each other.",
        lambda f: abs(f("lam-0.95", "reward") - f("baseline", "reward")) < 0.05,
    ),
)
WHITENING = (
    Claim(
        "Without it learning is slower at first, as nothing is subtracted from the reward while V is 0.",
        lambda f: f("raw", "early_reward") < f("baseline", "early_reward"),
    ),
    Claim("At the end its reward is lower, too.", lambda f: f("raw", "reward") < f("baseline", "reward")),
    Claim(
        "Its gradients have less than half the norm.", lambda f: f("raw", "grad_norm") < f("baseline", "grad_norm") / 2
    ),
)
EPOCHS = (
    Claim(
        "4 epochs learn faster than 1, counted in rollouts.",
        lambda f: f("epochs-4", "early_reward") > f("epochs-1", "early_reward"),
    ),
    Claim(
        "The more epochs, the more is clipped.",
        lambda f: falls(f(name, "clip_fraction") for name in ("epochs-16", "epochs-4", "baseline", "epochs-1")),
    ),
    Claim(
        "16 epochs overshoot: they end with at least twice the KL of 1, and with no higher reward than 4.",
        lambda f: (
            f("epochs-16", "kl") > 2 * f("epochs-1", "kl") and f("epochs-16", "reward") <= f("epochs-4", "reward")
        ),
    ),
)
HACKING = (
    Claim(
        "Counting words of praise ends in a list of them: 10 a response or more, and a repetition above 0.5.",
        lambda f: f("hack", "reward_reward_fn") > 10 and f("hack", "repetition") > 0.5,
    ),
    Claim(
        "The judge of fluency sees it: a perplexity of at least three times that with β 1.",
        lambda f: f("hack", "perplexity") > 3 * f("hack-kl", "perplexity"),
    ),
    Claim(
        "A bound on the length does not cure it: the repetition stays above 0.3.",
        lambda f: f("hack-length", "repetition") > 0.3,
    ),
    Claim(
        "A price of repetition and a high β both do: a repetition below 0.3, and some praise all the same.",
        lambda f: all(
            f(name, "repetition") < 0.3 and f(name, "reward_reward_fn") > 0.5 for name in ("hack-repetition", "hack-kl")
        ),
    ),
    Claim("The run's own alarms ring for the hack.", lambda f: f("hack", "alarms") > 0),
)
CRITIC = (
    Claim(
        "A trunk of its own explains more of the returns' variance in the first third.",
        lambda f: f("separate", "early_explained") > f("lam-0.95", "early_explained"),
    ),
    Claim(
        "Warmed up, both kinds learn faster at first.",
        lambda f: (
            f("warm", "early_reward") > f("lam-0.95", "early_reward")
            and f("separate-warm", "early_reward") > f("separate", "early_reward")
        ),
    ),
    Claim("At the end all four are within 0.05.", lambda f: width(f(name, "reward") for name in CRITICS) < 0.05),
)
MASK = (
    Claim(
        "The reward hides it: both end within 0.1 of the baseline's.",
        lambda f: all(abs(f(name, "reward") - f("baseline", "reward")) < 0.1 for name in ("mask-short", "mask-long")),
    ),
    Claim(
        "Without the EOS nothing teaches the policy to stop: fewer of its responses end than the baseline's.",
        lambda f: f("mask-short", "ended") < f("baseline", "ended"),
    ),
    Claim(
        "With a token too many the judge of fluency finds the text no better than the baseline's.",
        lambda f: f("mask-long", "perplexity") >= f("baseline", "perplexity"),
    ),
)
MASK_BRIEF = (
    Claim("With the right mask nearly all become brief: a reward above -0.2.", lambda f: f("brief", "reward") > -0.2),
    Claim(
        "Without the EOS they do not, as no gradient reaches it: a reward lower by 0.3 or more.",
        lambda f: f("brief-short", "reward") < f("brief", "reward") - 0.3,
    ),
    Claim("A token too many costs less than 0.1.", lambda f: f("brief-long", "reward") > f("brief", "reward") - 0.1),
)
EXPERIMENTS = {
    "frontier": Experiment(
        "The price of KL",
        variants=(*PRICES, "start"),
        figures=("reward", "kl", "positive", "perplexity", "entropy"),
        panels=("reward", "kl_k1"),
        expected=FRONTIER,
    ),
    "no-kl": Experiment(
        "Without KL",
        variants=("baseline", "kl-0", "start"),
        figures=TEXT,
        panels=("reward", "kl_k1", "ref_perplexity"),
        expected=NO_KL,
    ),
    "no-clipping": Experiment(
        "Without clipping",
        variants=("baseline", "no-clip", "epochs-16", "no-clip-16"),
        figures=("reward", "kl", "perplexity", "clip_fraction", "ratio_max", "step_kl"),
        panels=("reward", "kl_k1", "ratio_max"),
        expected=NO_CLIPPING,
    ),
    "lambda": Experiment(
        "GAE: λ 0, 0.95 and 1",
        variants=("lam-0", "lam-0.95", "baseline"),
        figures=("early_reward", "reward", "kl", "explained_variance", "perplexity"),
        panels=("reward", "kl_k1", "explained_variance"),
        expected=LAMBDA,
    ),
    "whitening": Experiment(
        "Without whitening of advantages",
        variants=("baseline", "raw"),
        figures=("early_reward", "reward", "kl", "entropy", "perplexity", "grad_norm"),
        panels=("reward", "kl_k1", "grad_norm"),
        expected=WHITENING,
    ),
    "epochs": Experiment(
        "More epochs",
        variants=("epochs-1", "baseline", "epochs-4", "epochs-16"),
        figures=("early_reward", "reward", "kl", "perplexity", "clip_fraction", "step_kl", "seconds"),
        panels=("reward", "kl_k1", "clip_fraction"),
        expected=EPOCHS,
    ),
    "hacking": Experiment(
        "Reward hacking, provoked and cured",
        variants=("hack", "hack-length", "hack-repetition", "hack-kl-0.5", "hack-kl"),
        figures=("reward_reward_fn", "kl", "positive", "perplexity", "repetition", "length", "alarms"),
        panels=("reward_reward_fn", "kl_k1", "distinct_bigrams"),
        expected=HACKING,
    ),
    "critic": Experiment(
        "The value head: shared, separate, warmed up (λ 0.95)",
        variants=CRITICS,
        figures=("early_reward", "reward", "kl", "early_explained", "explained_variance", "seconds"),
        panels=("reward", "kl_k1", "explained_variance"),
        expected=CRITIC,
    ),
    "mask": Experiment(
        "A mask off by one",
        variants=("baseline", "mask-short", "mask-long", "start"),
        figures=TEXT,
        panels=("reward", "kl_k1", "response_length"),
        expected=MASK,
    ),
    "mask-brief": Experiment(
        "A mask off by one, where to stop is what is rewarded",
        variants=("brief", "brief-short", "brief-long"),
        figures=("reward", "kl", "perplexity", "length", "ended"),
        panels=("reward", "kl_k1", "response_length"),
        expected=MASK_BRIEF,
    ),
}
