"""End to end: the optimum of the KL-regularised objective, π* ∝ ρ exp(s / β), is known exactly, and PPO finds it.

A random model on two prompts, with eight tokens and responses of at most three: 400 responses that can be enumerated.
The whole path is under test, from sampling to the optimizer's step; with one mistake put in, it must stay away.
"""

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from tiny_models import BUILDERS, EOS, FAMILIES, PAD, letter_tokenizer
from transformers import AutoModel

import generate
import model
import ppo
import train
from config import Config
from dataset import pad
from model import PolicyModel, frozen_copy
from prompts import Prompt


def without_shape_checks(monkeypatch) -> None:
    """Take the runtime shape checks off for a long test: they take twice the time of the rest, and are on elsewhere."""
    for module in (ppo, model, generate, train, model.PolicyModel):
        for name, value in vars(module).items():
            code = getattr(value, "__code__", None)
            if code and Path(code.co_filename).parent.name == "typeguard":
                monkeypatch.setattr(module, name, value.__wrapped__)


LETTERS, LONGEST, BETA = 8, 3, 0.5
TASK_PROMPTS = [[5, 3, 6], [2, 4]]  # of different lengths, so that one is padded


def every_response() -> list[list[int]]:
    """All 1 + 7 + 49 that end, and the 343 that are cut off at three tokens."""
    others = [token for token in range(LETTERS) if token != EOS]
    ended = [[*body, EOS] for n in range(LONGEST) for body in itertools.product(others, repeat=n)]
    return ended + [list(body) for body in itertools.product(others, repeat=LONGEST)]


RESPONSES = every_response()


def task_score(prompts: list[str], responses: list[str], rows: list[dict]) -> torch.Tensor:
    """Token 7 (f) is worth 1, token 3 (b) costs .5, token 4 (c) is worth .3."""
    return torch.tensor([text.count("f") - 0.5 * text.count("b") + 0.3 * text.count("c") for text in responses])


@torch.no_grad()
def log_probability(policy: PolicyModel) -> torch.Tensor:
    """log π(y | x) of every prompt and every response that there is."""
    query_ids, query_mask = pad(TASK_PROMPTS, PAD, "right" if policy.is_encoder_decoder else "left")
    ids, mask = pad(RESPONSES, PAD, "right")
    rows = []
    for i in range(len(TASK_PROMPTS)):
        logprobs = policy.score(query_ids[[i] * 400], query_mask[[i] * 400], ids, mask).logprobs
        rows.append(torch.where(mask, logprobs, 0.0).double().sum(1))
    return torch.stack(rows)


def optimum(reference: PolicyModel) -> torch.Tensor:
    """log π*(y | x), with the score less 1 for a response without EOS."""
    tokenizer = letter_tokenizer(LETTERS)
    texts = [tokenizer.decode(response, skip_special_tokens=True) for response in RESPONSES]
    penalty = torch.tensor([float(EOS not in response) for response in RESPONSES])
    return (log_probability(reference) + (task_score([], texts, []) - penalty) / BETA).log_softmax(1)


@dataclass
class Distances:
    """KL(π || π*) per prompt, in nats over whole responses: before and after training."""

    start: list[float]
    end: list[float]


def critic_of(language_model, kind: str):
    """A trunk of the critic's own with the language model's weights, as `loading.load_critic` makes it, or None."""
    if kind == "shared":
        return None
    if kind == "encoder":
        return copy.deepcopy(language_model.get_encoder())
    trunk = AutoModel.from_config(language_model.config)
    own = {name.removeprefix("transformer."): weights for name, weights in language_model.state_dict().items()}
    trunk.load_state_dict({name: own[name] for name in trunk.state_dict()})
    return trunk


def distances_after_training(family: str, n_updates: int, learning_rate: float, seed: int = 0, **options) -> Distances:
    """Train for n_updates on 64 copies of each prompt."""
    config = Config(
        **{
            "batch_size": 128,
            "mini_batch_size": 32,
            "ppo_epochs": 4,
            "n_updates": n_updates,
            "learning_rate": learning_rate,
            "kl_coef": BETA,
            "max_new_tokens": LONGEST,
            "missing_eos_penalty": 1.0,
            "whiten_advantages": False,
            "seed": seed,
            **options,
        }
    )
    language_model = BUILDERS[family](vocab_size=LETTERS)
    policy = PolicyModel(language_model, critic_of(language_model, config.critic), config.critic)
    tokenizer = letter_tokenizer(LETTERS)
    fixed = train.Fixed(reference=frozen_copy(policy), tokenizer=tokenizer, terms={"task": task_score})
    prompts = [Prompt(tokenizer.decode(ids), ids, {}) for ids in TASK_PROMPTS] * 64
    best = optimum(fixed.reference)

    def distance() -> list[float]:
        log_pi = log_probability(policy)
        assert_close(log_pi.exp().sum(1), torch.ones(2), atol=1e-5)
        return (log_pi.exp() * (log_pi - best)).sum(1).tolist()

    start = distance()
    for _ in train.train(train.new_state(policy, config), fixed, prompts, config):
        pass
    return Distances(start, distance())


def test_there_are_four_hundred_responses():
    assert len(RESPONSES) == len({tuple(response) for response in RESPONSES}) == 400


def test_ppo_finds_the_optimum_of_a_small_task(monkeypatch):
    """A random GPT-2 on two prompts: the whole path, from sampling to the optimizer's step, comes within .03 nats."""
    without_shape_checks(monkeypatch)
    distances = distances_after_training("gpt2", n_updates=60, learning_rate=1.5e-3)
    assert min(distances.start) > 0.5
    assert max(distances.end) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", FAMILIES)
def test_ppo_finds_the_optimum_with_every_family(family, seed, monkeypatch):
    without_shape_checks(monkeypatch)
    distances = distances_after_training(family, n_updates=120, learning_rate=1e-3, seed=seed)
    assert min(distances.start) > 0.5
    assert max(distances.end) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("family", "critic", "lam"), [("gpt2", "separate", 0.95), ("t5", "separate", 0.95), ("t5", "encoder", 1.0)]
)
def test_ppo_finds_the_optimum_with_a_critic_of_its_own(family, critic, lam, seed, monkeypatch):
    """A baseline of the prompt alone leaves more variance: it comes within .05 nats, one that reads on within .03."""
    without_shape_checks(monkeypatch)
    distances = distances_after_training(family, 120, 1e-3, seed=seed, critic=critic, lam=lam)
    assert min(distances.start) > 0.5
    assert max(distances.end) < (0.05 if critic == "encoder" else 0.03)


def drop_the_end(real):
    """A loss that does not train the EOS token."""

    def loss(policy, minibatch, *args):
        shorter = minibatch.mask & (minibatch.response_ids != EOS)
        return real(policy, minibatch._replace(mask=shorter), *args)

    return loss


def shift_values(real):
    """Advantages that take a token's value from the state after it."""

    def advantages(values, mask, **others):
        later = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
        return real(values=torch.where(mask.roll(-1, 1), later, 0.0), mask=mask, **others)

    return advantages


def times(factor: float):
    """A function that gives what it gave, so many times."""
    return lambda real: lambda *args, **kwargs: factor * real(*args, **kwargs)


ERRORS = {
    "KL with the wrong sign": (ppo, "kl_estimate", times(-1)),
    "k3 in the reward": (ppo, "kl_estimate", lambda real: lambda **kwargs: real(**kwargs | {"estimator": "k3"})),
    "no KL": (ppo, "kl_estimate", times(0)),
    "value of the state after the token": (ppo, "estimate_advantages", shift_values),
    "advantages with the wrong sign": (ppo, "estimate_advantages", times(-1)),
    "EOS not trained": (train, "minibatch_loss", drop_the_end),
    "sampling at another temperature": (
        generate,
        "sampling_options",
        lambda real: lambda config: real(config) | {"temperature": 0.5},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
def test_ppo_misses_the_optimum_with_an_error(error, monkeypatch):
    """The same run as the one that comes within .03 nats, with one mistake put in."""
    without_shape_checks(monkeypatch)
    module, name, mistake = ERRORS[error]
    monkeypatch.setattr(module, name, mistake(getattr(module, name)))
    assert max(distances_after_training("gpt2", n_updates=60, learning_rate=1.5e-3).end) > 0.05
