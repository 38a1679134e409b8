"""What PPO for language models is in other packages and here, by the same oracles: plain Python on small numbers.

    python benchmarks/conformance.py run ours                       # in this project's environment
    python benchmarks/conformance.py environments                   # prints the commands that make the others
    .../bin/python benchmarks/conformance.py run trl-1              # each in its own: torch and that package
    python benchmarks/conformance.py table                          # that of docs/conformance.md

Each check compares a package with the definition, and notes what it saw, in docs/results/conformance/. To differ is not
to be wrong: remarks.json there says of each difference which it is, and the table refuses one without a remark. The
adapters, each a call of the package's own functions, are in implementations.py. Everything is computed in float64.
"""

import argparse
import itertools
import json
import math
import platform
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]  # last: their names are not the packages'

from implementations import CLIP, EOS, IMPLEMENTATIONS, PAD, Batch, Implementation

RESULTS = Path(__file__).parents[1] / "docs/results/conformance"
TITLES = {
    "ours": "",
    "trl-0.11": "TRL",
    "trl-1": "TRL",
    "torchtune": "torchtune",
    "openrlhf": "OpenRLHF",
    "verl": "verl",
}
CLOSE = 1e-6  # some packages go through float32 on the way
ENVIRONMENTS = {  # commands for an empty environment; torch is pinned, as an open range brings gigabytes
    "ours": ["pip install -r requirements.txt"],
    "trl-0.11": ["pip install torch==2.13.0 trl==0.11.4 transformers==4.46.3 rich"],
    "trl-1": ["pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0 rich pandas"],
    "torchtune": ["pip install torch==2.13.0 torchtune==0.6.1 torchao==0.9.0"],
    "openrlhf": [
        "pip install --no-deps openrlhf==0.11.2",
        "pip install torch==2.13.0 transformers peft ray pylatexenc aiohttp torchdata",
    ],
    "verl": [
        "pip install --no-deps verl==0.9.1",
        "pip install torch==2.13.0 'tensordict>=0.8,<=0.10' 'transformers>=5.5.3,<5.11,!=5.6.0' ray omegaconf "
        "hydra-core codetiming pandas dill torchdata datasets peft accelerate pillow cachetools uvicorn fastapi",
    ],
}


class Outcome(NamedTuple):
    """Whether an implementation does what the check asks, and what was seen."""

    agrees: bool
    seen: str


# --------------------------------------------------------------------------------------------------------------------
# Data: ragged rows, the first and the fourth at the length cap
# --------------------------------------------------------------------------------------------------------------------

LENGTHS = [6, 4, 1, 6, 2, 5]


def prefix_mask(lengths: list[int]) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def sample_batch() -> Batch:
    """Random numbers that bind every clip somewhere. Beyond the mask stand numbers as a model would give there."""
    generator = torch.Generator().manual_seed(3)
    mask = prefix_mask(LENGTHS)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -0.2 - normal(*mask.shape).abs()
    return Batch(
        mask=mask,
        scores=normal(len(mask)),
        old_logprobs=old,
        ref_logprobs=(old + 0.3 * normal(*mask.shape)).clamp(max=-0.01),
        old_values=normal(*mask.shape),
        new_logprobs=(old + 0.3 * normal(*mask.shape)).clamp(max=-0.01),
        new_values=normal(*mask.shape),
    )


def sample_estimates() -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns."""
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(2, *prefix_mask(LENGTHS).shape, generator=generator, dtype=torch.float64))


def real(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x.double()[mask]


def error(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> float:
    """The largest difference on real tokens; NaN counts as infinite."""
    difference = (real(found, mask) - real(expected, mask)).abs().max().item()
    return math.inf if math.isnan(difference) else difference


def within(difference: float) -> Outcome:
    return Outcome(difference < CLOSE, f"{difference:.1g}" if difference >= CLOSE else "0")


# --------------------------------------------------------------------------------------------------------------------
# The definitions, in plain Python
# --------------------------------------------------------------------------------------------------------------------


def double_sum(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """GAE, eq. 16: Â_t = Σ_l (γλ)^l δ_{t+l}, of one episode, behind whose end the value is 0."""
    ahead = [*values[1:], 0.0]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, ahead, strict=True)]
    return [sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def ragged(function: Callable, mask: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """`function` of each row's real tokens as lists of numbers; 0 elsewhere."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for row, length in enumerate(mask.sum(1).tolist()):
        out[row, :length] = torch.tensor(function(*(x[row, :length].tolist() for x in tensors)), dtype=torch.float64)
    return out


def kl_value(d: float, estimator: str) -> float:
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d, "abs": abs(d)}[estimator]


def tokens(batch: Batch, *tensors: torch.Tensor) -> list[tuple[float, ...]]:
    """The real tokens of several tensors, side by side."""
    return list(zip(*(x[batch.mask].tolist() for x in tensors), strict=True))


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


class Expected(NamedTuple):
    policy: float
    value: float
    clip_fraction: float
    value_clip_fraction: float
    policy_gradient: list[float]
    value_gradient: list[float]


def expected_loss(batch: Batch, advantages: torch.Tensor, returns: torch.Tensor) -> Expected:
    """PPO, eq. 7, negated, and ½ max of the two squared errors: means over real tokens."""
    names = (batch.new_logprobs, batch.old_logprobs, advantages, batch.new_values, batch.old_values, returns)
    rows = []
    for new, old, advantage, value, old_value, target in tokens(batch, *names):
        ratio = math.exp(new - old)
        free, held = -ratio * advantage, -clip(ratio, 1 - CLIP, 1 + CLIP) * advantage
        near = clip(value, old_value - CLIP, old_value + CLIP)
        error, near_error = (value - target) ** 2, (near - target) ** 2
        is_free = error >= near_error
        rows.append(
            (
                max(free, held),
                max(error, near_error) / 2,
                held > free,
                near_error > error,
                0.0 if held > free else free,
                (value - target if is_free else (near - target) * (near == value)),
            )
        )
    columns = list(zip(*rows, strict=True))
    means = [sum(column) / len(rows) for column in columns[:4]]
    return Expected(*means, *([g / len(rows) for g in column] for column in columns[4:]))


# --------------------------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------------------------


def estimated(it: Implementation, values: torch.Tensor, gamma: float = 0.9, lam: float = 0.7):
    """Advantages and returns of an implementation, and the double sum."""
    rewards, _ = sample_estimates()
    mask = prefix_mask(LENGTHS)
    rewards = torch.where(mask, rewards, 0.0)
    found, returns = it.advantages(rewards, values, mask, gamma, lam)
    exact = ragged(lambda r, v: double_sum(r, v, gamma, lam), mask, rewards, values)
    return found, returns, exact, mask


def check_gae(it: Implementation) -> Outcome:
    batch = sample_batch()
    found, _, exact, mask = estimated(it, torch.where(batch.mask, batch.old_values, 0.0))
    return within(error(found, exact, mask))


def check_gae_after_end(it: Implementation) -> Outcome:
    found, _, exact, mask = estimated(it, sample_batch().old_values)
    ended = mask & (mask.sum(1, keepdim=True) < mask.shape[1])
    return within(error(found, exact, ended))


def check_gae_at_cap(it: Implementation) -> Outcome:
    found, _, exact, mask = estimated(it, sample_batch().old_values)
    capped = mask & (mask.sum(1, keepdim=True) == mask.shape[1])
    return within(error(found, exact, capped))


def check_returns(it: Implementation) -> Outcome | None:
    values = torch.where(prefix_mask(LENGTHS), sample_batch().old_values, 0.0)
    _, returns, exact, mask = estimated(it, values)
    return None if returns is None else within(error(returns, exact + values, mask))


def check_reward_sign(it: Implementation) -> Outcome:
    """r_t = -β (log π - log ρ), on all tokens but the last."""
    batch = sample_batch()._replace(scores=torch.zeros(len(LENGTHS), dtype=torch.float64))
    found = it.rewards(batch, 0.3, "k1")
    return within(error(found, -0.3 * (batch.old_logprobs - batch.ref_logprobs), batch.mask))


def check_score_place(it: Implementation) -> Outcome:
    """On which token the score is, counted from the last real one, in rows that end before the cap and at it."""
    batch = sample_batch()
    without = it.rewards(batch._replace(scores=torch.zeros_like(batch.scores)), 0.3, "k1")
    added = (it.rewards(batch, 0.3, "k1") - without).nan_to_num()
    places = []
    for row, length in enumerate(LENGTHS):
        (at,) = added[row].abs().gt(CLOSE).nonzero()[:, 0].tolist()
        places.append(at - (length - 1))
    seen = ", ".join(f"{place:+d} (length {length})" for place, length in zip(places, LENGTHS, strict=True) if place)
    return Outcome(not any(places), seen or "last")


def kl_values(it: Implementation, estimator: str, differences: torch.Tensor) -> torch.Tensor | None:
    """Estimates for d = log π - log ρ: of the package's function, or read off the rewards that its loop makes."""
    if estimator not in it.estimators:
        return None
    logprobs = torch.full_like(differences, -30.0)
    mask = torch.ones_like(differences, dtype=torch.bool)
    if it.kl:
        return it.kl(logprobs, logprobs - differences, mask, estimator)
    batch = sample_batch()._replace(scores=torch.zeros(len(LENGTHS), dtype=torch.float64))
    told = torch.zeros(batch.mask.shape, dtype=torch.float64)
    told[: len(differences)] = differences
    old = torch.full_like(told, -3.0)
    ref = old - told
    found = -it.rewards(batch._replace(old_logprobs=old, ref_logprobs=ref), 1.0, estimator)
    return found[: len(differences), :1]


def check_kl(estimator: str) -> Callable:
    def check(it: Implementation) -> Outcome | None:
        differences = torch.tensor([[0.7], [-0.4], [0.0], [2.0], [-1.5]], dtype=torch.float64)
        found = kl_values(it, estimator, differences)
        if found is None:
            return None
        exact = [kl_value(d, estimator) for d in differences[:, 0].tolist()]
        return within((found[:, 0] - torch.tensor(exact)).abs().max().item())

    return check


def check_kl_far(it: Implementation) -> Outcome:
    """k1 = 15 where the log-probabilities are 15 nats apart."""
    found = kl_values(it, "k1", torch.tensor([[15.0]], dtype=torch.float64)).item()
    return Outcome(abs(found - 15) < 1e-4, f"{found:.4g}")


def whitened(it: Implementation) -> tuple[torch.Tensor, torch.Tensor]:
    """Of numbers with mean 3 on real tokens and large ones beyond, and those real numbers."""
    x, _ = sample_estimates()
    mask = prefix_mask(LENGTHS)
    x = torch.where(mask, x + 3, 0.0)
    return real(it.whiten(x, mask), mask), real(x, mask)


def check_whitened_mean(it: Implementation) -> Outcome:
    found, _ = whitened(it)
    return Outcome(abs(found.mean().item()) < CLOSE, f"{abs(found.mean().item()):.3g}")


def check_whitened_scope(it: Implementation) -> Outcome:
    """Centred or not, all real tokens of the batch share one scale and one shift, and padding has no part in them."""
    found, x = whitened(it)
    scale = (found - found.mean()).norm() / (x - x.mean()).norm()
    residue = (found - found.mean() - scale * (x - x.mean())).abs().max().item()
    variance = found.var(correction=0).item()
    n = len(x)
    near = min(abs(variance - 1), abs(variance * n / (n - 1) - 1))
    return Outcome(residue < CLOSE and near < CLOSE, f"variance {variance:.4f}")


def check_whitened_variance(it: Implementation) -> Outcome:
    """Divided by n or by n - 1."""
    found, _ = whitened(it)
    biased, unbiased = found.var(correction=0).item(), found.var().item()
    name = "n" if abs(biased - 1) < CLOSE else "n - 1" if abs(unbiased - 1) < CLOSE else f"variance {biased:.4f}"
    return Outcome(name == "n", name)


def check_whitened_one(it: Implementation) -> Outcome:
    """A batch of one real token stays finite."""
    mask = torch.tensor([[True, False]])
    try:
        found = it.whiten(torch.tensor([[2.0, 0.0]], dtype=torch.float64), mask)[0, 0].item()
    except Exception as caught:
        return Outcome(False, type(caught).__name__)
    return Outcome(math.isfinite(found), f"{found:.3g}")


def losses(it: Implementation):
    batch, estimates = sample_batch(), sample_estimates()
    return it.loss(batch, *estimates), expected_loss(batch, *estimates), batch


def check_policy_loss(it: Implementation) -> Outcome:
    found, exact, _ = losses(it)
    return within(abs(found.policy - exact.policy))


def check_policy_gradient(it: Implementation) -> Outcome:
    """0 where the clip binds, -q Â / n elsewhere."""
    found, exact, batch = losses(it)
    return within((real(found.policy_gradient, batch.mask) - torch.tensor(exact.policy_gradient)).abs().max().item())


def check_far_ratio(it: Implementation) -> Outcome:
    """PPO, eq. 7, has no bound where Â < 0 and q is large: a token with Â = -1 and q = 5 has the loss 5."""
    batch = sample_batch()
    old = torch.full_like(batch.old_logprobs, -3.0)
    far = batch._replace(old_logprobs=old, new_logprobs=old + math.log(5), new_values=batch.old_values)
    found = it.loss(far, -torch.ones_like(old), batch.old_values).policy
    return Outcome(abs(found - 5) < CLOSE, f"{found:.4g}")


def check_value_loss(it: Implementation) -> Outcome:
    found, exact, batch = losses(it)
    others = {name: loss.value for name, loss in after_end(batch).items()}
    return named(found.value, {"real tokens": exact.value} | others, "real tokens")


def check_value_gradient(it: Implementation) -> Outcome:
    """In its own measure: the ratio of gradients is the same on all real tokens."""
    found, exact, batch = losses(it)
    found, exact = real(found.value_gradient, batch.mask), torch.tensor(exact.value_gradient, dtype=torch.float64)
    scale = found.norm() / exact.norm()
    return within((found / scale - exact).abs().max().item())


def check_clip_fraction(it: Implementation) -> Outcome | None:
    """Of real tokens, where the clip binds."""
    found, exact, batch = losses(it)
    if found.clip_fraction is None:
        return None
    ratio = (batch.new_logprobs - batch.old_logprobs).exp()
    outside = real((ratio - 1).abs() > CLIP, batch.mask).mean().item()
    names = {"binding": exact.clip_fraction, "|q-1| > ε": outside}
    return named(found.clip_fraction, names, "binding")


def check_value_clip_fraction(it: Implementation) -> Outcome | None:
    found, exact, batch = losses(it)
    if found.value_clip_fraction is None:
        return None
    others = {name: loss.value_clip_fraction for name, loss in after_end(batch).items()}
    return named(found.value_clip_fraction, {"binding": exact.value_clip_fraction} | others, "binding")


def after_end(batch: Batch) -> dict[str, Expected]:
    """The losses where the token behind the end counts too, with a return of 0."""
    advantages, returns = sample_estimates()
    returns = torch.where(batch.mask, returns, 0.0)
    found = {}
    for name, shortest in (("and one after EOS", 1), ("and one after EOS, but in one-token rows", 2)):
        mask = prefix_mask([min(length + (length >= shortest), max(LENGTHS)) for length in LENGTHS])
        found[name] = expected_loss(batch._replace(mask=mask), advantages, returns)
    return found


def named(found: float, names: dict[str, float], right: str) -> Outcome:
    """Which of several definitions gives the number."""
    name = next((name for name, value in names.items() if abs(value - found) < CLOSE), "")
    return Outcome(name == right, name or f"{found:.4f} for {names[right]:.4f}")


def check_parts(it: Implementation) -> Outcome:
    """The gradient of a step is the same from one part and from three, whatever their lengths."""
    batch, estimates = sample_batch(), sample_estimates()
    whole = it.step_gradient(batch, *estimates, 1)
    parts = it.step_gradient(batch, *estimates, 3)
    relative = error(parts, whole, batch.mask) / real(whole, batch.mask).abs().max().item()
    return Outcome(relative < 1e-5, "0" if relative < 1e-5 else f"{100 * relative:.0f} % off")


# Padding


def stages(it: Implementation, batch: Batch, clean: Batch) -> dict[str, torch.Tensor]:
    """What each stage makes of a batch, on real tokens alone, given what the stages before make of the clean one."""
    mask = batch.mask
    estimates = {name: it.estimate(told, 0.3, "k1", 0.9, 0.7) for name, told in (("here", batch), ("clean", clean))}
    loss = it.loss(batch, *sample_estimates())
    made = {
        "rewards": it.rewards(batch, 0.3, "k1"),
        "advantages": estimates["here"],
        "whitening": it.whiten(torch.where(mask, estimates["clean"], estimates["here"]), mask),
        "policy loss": loss.policy_gradient,
        "value loss": loss.value_gradient,
    }
    return {name: real(tensor, mask) for name, tensor in made.items()}


def check_padding(logprob: float, other: float) -> Callable:
    """Which stages change with what stands beyond the mask; what stood there before is what a model gives."""

    def check(it: Implementation) -> Outcome:
        batch = sample_batch()
        plain = stages(it, batch, batch)
        dirty = {}
        for name in ("old_logprobs", "ref_logprobs", "new_logprobs"):
            dirty[name] = getattr(batch, name).masked_fill(~batch.mask, logprob)
        for name in ("old_values", "new_values"):
            dirty[name] = getattr(batch, name).masked_fill(~batch.mask, other)
        changed = stages(it, batch._replace(**dirty), batch)
        leaks = [name for name in plain if not (plain[name] - changed[name]).abs().max().item() < CLOSE]
        return Outcome(not leaks, ", ".join(leaks) or "nothing")

    return check


# Tokens: a bigram model, whose log-probabilities and values are known token by token

QUERIES = torch.tensor([[2, 3, 4], [5, 2, 6], [3, 3, 2], [6, 5, 4]])
RESPONSES = torch.tensor([[2, 3, EOS, PAD, PAD], [4, EOS, PAD, PAD, PAD], [5, 6, 2, 3, 4], [EOS, PAD, PAD, PAD, PAD]])
RESPONSE_LENGTHS = [3, 2, 5, 1]


def bigrams() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(8, 8, generator=generator, dtype=torch.float64),
        torch.randn(8, generator=generator, dtype=torch.float64),
    )


def scored(score: Callable, starts: list[int]) -> tuple:
    """What an implementation makes of the toy responses, and what is so: each token's log-probability, value before."""
    table, values = bigrams()
    found = score(QUERIES, RESPONSES, table, values)
    mask = prefix_mask(RESPONSE_LENGTHS)
    logprobs, before = torch.zeros(2, *mask.shape, dtype=torch.float64)
    for row, (start, response) in enumerate(zip(starts, RESPONSES.tolist(), strict=True)):
        for t, token in enumerate(response[: RESPONSE_LENGTHS[row]]):
            state = response[t - 1] if t else start
            logits = table[state].tolist()
            logprobs[row, t] = logits[token] - math.log(sum(map(math.exp, logits)))
            before[row, t] = values[state]
    return found, mask, logprobs, before


def check_trained_tokens(place: str) -> Callable:
    def check(it: Implementation, score: Callable | None = None, starts: list[int] | None = None) -> Outcome:
        found, mask, *_ = scored(score or it.score, starts or QUERIES[:, -1].tolist())
        last = torch.tensor(RESPONSE_LENGTHS) - 1
        rows = torch.arange(len(mask))
        of = {
            "first": found.mask[:, 0],
            "last": found.mask[rows, last],
            "beyond": ~(found.mask & ~mask).any(1),
        }[place]
        return Outcome(bool(of.all()), f"{int(of.sum())} of {len(of)} rows")

    return check


def check_first_of_decoder(it: Implementation) -> Outcome | None:
    if it.score_encoder_decoder is None:
        return None
    return check_trained_tokens("first")(it, it.score_encoder_decoder, [PAD] * len(QUERIES))


def check_logprobs(it: Implementation) -> Outcome:
    found, mask, logprobs, _ = scored(it.score, QUERIES[:, -1].tolist())
    return within(error(found.logprobs, logprobs, mask))


def check_values_before(it: Implementation) -> Outcome | None:
    found, mask, _, before = scored(it.score, QUERIES[:, -1].tolist())
    return None if found.values is None else within(error(found.values, before, mask))


# Enumeration: all responses of up to three tokens over {EOS, a, b}; the objective is E[s] - β KL(π || ρ)

HORIZON, WORDS, BETA = 3, (EOS, 2, 3), 0.4
STATES = [state for n in range(HORIZON) for state in itertools.product((2, 3), repeat=n)]
SENTENCES = [(*state, EOS) for state in STATES] + list(itertools.product((2, 3), repeat=HORIZON))


def log_policy(logits: list[float]) -> dict[tuple[int, ...], dict[int, float]]:
    """log π(a | state), from one logit for each action in each state."""
    found = {}
    for number, state in enumerate(STATES):
        own = logits[3 * number : 3 * number + 3]
        total = math.log(sum(map(math.exp, own)))
        found[state] = {word: logit - total for word, logit in zip(WORDS, own, strict=True)}
    return found


def steps(sentence: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
    return [(sentence[:t], word) for t, word in enumerate(sentence)]


def told_score(sentence: tuple[int, ...]) -> float:
    return math.sin(3 * sum(word * 7**t for t, word in enumerate(sentence)))


def objective(logits: list[float], reference: list[float]) -> float:
    """J = Σ_y π(y) (s(y) - β log π(y)/ρ(y))."""
    policy, other = log_policy(logits), log_policy(reference)
    total = 0.0
    for sentence in SENTENCES:
        logprob, ref = (sum(table[state][word] for state, word in steps(sentence)) for table in (policy, other))
        total += math.exp(logprob) * (told_score(sentence) - BETA * (logprob - ref))
    return total


def true_gradient(logits: list[float], reference: list[float]) -> torch.Tensor:
    """Of J, by central differences."""
    found = []
    for i in range(len(logits)):
        moved = [[x + h * (i == j) for j, x in enumerate(logits)] for h in (1e-5, -1e-5)]
        found.append((objective(moved[0], reference) - objective(moved[1], reference)) / 2e-5)
    return torch.tensor(found, dtype=torch.float64)


def enumerated() -> tuple[list[float], list[float], Batch]:
    """Two policies, and all sentences as a batch: log-probabilities under both, and values that are no guess at any."""
    generator = torch.Generator().manual_seed(6)
    logits, reference = torch.randn(2, 3 * len(STATES), generator=generator, dtype=torch.float64).tolist()
    guesses = torch.randn(len(STATES), generator=generator, dtype=torch.float64).tolist()
    mask = prefix_mask([len(sentence) for sentence in SENTENCES])
    columns = torch.full((3, *mask.shape), -1.0, dtype=torch.float64)
    policy, other = log_policy(logits), log_policy(reference)
    for row, sentence in enumerate(SENTENCES):
        for t, (state, word) in enumerate(steps(sentence)):
            of_token = policy[state][word], other[state][word], guesses[STATES.index(state)]
            columns[:, row, t] = torch.tensor(of_token, dtype=torch.float64)
    scores = torch.tensor([told_score(sentence) for sentence in SENTENCES], dtype=torch.float64)
    logprobs, ref, values = columns
    return logits, reference, Batch(mask, scores, logprobs, ref, values, logprobs, values)


def expected_gradient(it: Implementation, estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    """E[Σ_t Â_t ∇log π(y_t)] with λ = 1, by the package's rewards, advantages and loss; and ∇J."""
    logits, reference, batch = enumerated()
    advantages = it.estimate(batch, BETA, estimator, 1.0, 1.0)
    loss = it.loss(batch, advantages, torch.zeros_like(advantages))
    per_token = -loss.policy_gradient * batch.mask.sum()  # Â_t, as the ratio is 1
    policy = log_policy(logits)
    found = [0.0] * len(logits)
    for row, sentence in enumerate(SENTENCES):
        weight = math.exp(sum(policy[state][word] for state, word in steps(sentence)))
        for t, (state, word) in enumerate(steps(sentence)):
            for i, other in enumerate(WORDS):
                slope = (word == other) - math.exp(policy[state][other])
                found[3 * STATES.index(state) + i] += weight * per_token[row, t].item() * slope
    return torch.tensor(found, dtype=torch.float64), true_gradient(logits, reference)


def check_kl_gradient(estimator: str) -> Callable:
    def check(it: Implementation) -> Outcome | None:
        if estimator not in it.estimators:
            return None
        found, true = expected_gradient(it, estimator)
        cosine = (found @ true / found.norm() / true.norm()).item()
        return Outcome((found - true).abs().max().item() < CLOSE, f"cosine {cosine:.3f}")

    return check


CHECKS: dict[str, Callable] = {
    "reward: -β (log π - log ρ) on every token": check_reward_sign,
    "the score is on the last real token": check_score_place,
    "KL in the reward: k1 = d": check_kl("k1"),
    "KL in the reward: k2 = d²/2": check_kl("k2"),
    "KL in the reward: k3 = exp(-d) - 1 + d": check_kl("k3"),
    "KL in the reward: 15 nats count 15": check_kl_far,
    "expected gradient with k1 in the reward = that of E[s] - β KL": check_kl_gradient("k1"),
    "the same with k2": check_kl_gradient("k2"),
    "the same with k3": check_kl_gradient("k3"),
    "GAE = the double sum, where V = 0 after the end": check_gae,
    "GAE, whatever V is after an EOS": check_gae_after_end,
    "GAE at the length cap: no bootstrap": check_gae_at_cap,
    "returns = advantages before whitening + V": check_returns,
    "whitening: mean 0 on real tokens": check_whitened_mean,
    "whitening: one scale, padding apart": check_whitened_scope,
    "whitening: variance over n": check_whitened_variance,
    "whitening: one token stays finite": check_whitened_one,
    "policy loss = PPO, eq. 7, mean over real tokens": check_policy_loss,
    "its gradient, token by token": check_policy_gradient,
    "no further bound where Â < 0 and q = 5": check_far_ratio,
    "value loss = ½ max of both errors, mean over real tokens": check_value_loss,
    "its gradient, but for a factor": check_value_gradient,
    "clip fraction: where the clip binds, of real tokens": check_clip_fraction,
    "clip fraction of the value: the same": check_value_clip_fraction,
    "a step in parts = in one": check_parts,
    "large numbers beyond the mask change nothing": check_padding(-50.0, 1e3),
    "NaN beyond the mask changes nothing": check_padding(math.nan, math.nan),
    "log-probabilities are those of their tokens": check_logprobs,
    "values are those before their tokens": check_values_before,
    "the first token is trained": check_trained_tokens("first"),
    "the first token of an encoder-decoder is trained": check_first_of_decoder,
    "the last token (EOS) is trained": check_trained_tokens("last"),
    "nothing is trained beyond it": check_trained_tokens("beyond"),
}


# --------------------------------------------------------------------------------------------------------------------
# Running them, and the table
# --------------------------------------------------------------------------------------------------------------------


def run(it: Implementation) -> dict[str, dict | None]:
    """What every check saw; None where the package has no such piece."""
    results = {}
    for name, check in CHECKS.items():
        try:
            outcome = check(it)
        except Exception as caught:
            traceback.print_exc()
            outcome = Outcome(False, f"fails: {type(caught).__name__}: {caught}")
        results[name] = outcome and {"agrees": outcome.agrees, "seen": "" if outcome.agrees else outcome.seen}
    return results


def report(name: str) -> dict:
    torch.set_default_dtype(torch.float64)
    it = IMPLEMENTATIONS[name]()
    machine = {"torch": torch.__version__, "python": platform.python_version()}
    return {"implementation": name, "version": it.version, **machine, "checks": run(it)}


def table(reports: list[dict], remarks: list[dict]) -> str:
    """Markdown: a row a check, a column an implementation, and the remarks, numbered.

    Raises ValueError for a difference that no remark speaks of, and for a remark on what does not differ.
    """
    heads = [f"{TITLES[report['implementation']]} {report['version']}".strip() for report in reports]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    spoken_of = set()
    for check in CHECKS:
        cells = []
        for report in reports:
            outcome, name = report["checks"][check], report["implementation"]
            numbers = [i for i, remark in enumerate(remarks) if name in remark["of"] and check in remark["checks"]]
            differs = outcome is not None and not outcome["agrees"]
            if differs != bool(numbers):
                raise ValueError(f"{name}, {check}: {outcome}, remarks {numbers}")
            spoken_of.update(numbers)
            notes = ", ".join(str(i + 1) for i in numbers)
            cells.append("–" if outcome is None else f"{outcome['seen']} [{notes}]" if differs else "✓")
        lines.append(f"| {check} | " + " | ".join(cells) + " |")
    if unused := set(range(len(remarks))) - spoken_of:
        raise ValueError(f"no difference belongs to remarks {sorted(unused)}")
    notes = [f"{i}. **{remark['verdict']}**: {remark['text']}" for i, remark in enumerate(remarks, 1)]
    return "\n".join([*lines, "", *notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="the checks, in the implementation's own environment")
    running.add_argument("implementation", choices=IMPLEMENTATIONS)
    commands.add_parser("environments", help="how to make these environments")
    commands.add_parser("table", help="of what was run")
    args = parser.parse_args()
    if args.command == "environments":
        print("\n".join(f"{name}: {' && '.join(commands)}" for name, commands in ENVIRONMENTS.items()))
    elif args.command == "table":
        print(kept_table())
    else:
        result = report(args.implementation)
        RESULTS.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1, ensure_ascii=False)
        (RESULTS / f"{args.implementation}.json").write_text(text + "\n", encoding="utf-8")
        for name, outcome in result["checks"].items():
            print("–" if outcome is None else "✓" if outcome["agrees"] else outcome["seen"], name, sep="\t")


def kept_table() -> str:
    """The table of what is in `RESULTS`."""
    reports = [
        json.loads(path.read_text(encoding="utf-8")) for name in TITLES if (path := RESULTS / f"{name}.json").exists()
    ]
    return table(reports, json.loads((RESULTS / "remarks.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
