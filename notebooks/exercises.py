"""The exercises of demo.ipynb: what is to be filled in, and how an answer is judged.

`check` runs an answer on a batch of ragged rows and compares it with the function of ppo.py that trains. Where the two
differ, it tries the mistakes that it knows by name, and says which of them gives the very same numbers. What stands
beyond the mask in the batch is noise, so that an answer that reads it shows.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

import ppo

NAN = float("nan")


class Exercise(NamedTuple):
    """The arguments of an answer, the function that is right, and by a sentence each the ways to be wrong; and where
    an answer may go wrong that is right elsewhere: what is other there, by the sentence that is then said.

    A wrong way gives NaN where it leaves open what an answer would have.
    """

    inputs: dict
    right: Callable
    wrong: dict[str, Callable]
    edges: dict[str, dict]


def batch() -> dict[str, torch.Tensor]:
    """Responses of 5, 3, 4 and 2 tokens, with numbers in every column."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]
    drawn = torch.randn(4, *mask.shape, dtype=torch.float64, generator=generator)
    drawn = torch.where(mask, drawn, 3 * drawn + 2)
    names = ("x", "rewards", "values", "advantages")
    ratio = torch.exp(0.5 * torch.randn(mask.shape, dtype=torch.float64, generator=generator))
    return {"mask": mask, "ratio": ratio} | dict(zip(names, drawn, strict=True))


def one_short(mask: torch.Tensor) -> torch.Tensor:
    """Without each row's last real token."""
    return mask & (torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True) - 1)


def one_long(mask: torch.Tensor) -> torch.Tensor:
    """With the first column of padding."""
    return torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True) + 1


def everywhere(mask: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(mask)


def with_mask(change: Callable, right: Callable) -> Callable:
    """`right` with another mask; open where either mask has no token."""

    def wrong(mask: torch.Tensor, **inputs) -> torch.Tensor:
        found = right(mask=change(mask), **inputs)
        return found if found.dim() == 0 else torch.where(mask & change(mask), found, NAN)

    return wrong


SHORT = "the last real token, the EOS, is left out: mask is True on it, too"
LONG = "the first column of padding is counted: mask is False there"
PADDING = "what stands beyond the mask is counted"
SIGN = "the sign is turned"

# ---------------------------------------------------------------------------------------------------------------------
# Whitening
# ---------------------------------------------------------------------------------------------------------------------


def centred(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x - ppo.masked_mean(x, mask)


WHITEN = {
    SIGN: lambda x, mask: -ppo.masked_whiten(x, mask),
    PADDING: with_mask(everywhere, ppo.masked_whiten),
    SHORT: with_mask(one_short, ppo.masked_whiten),
    LONG: with_mask(one_long, ppo.masked_whiten),
    "the mean is still in it": partial(ppo.masked_whiten, shift_mean=False),
    "the mean is gone, but the variance is not 1": centred,
    "it is divided by the variance, expected its square root": lambda x, mask: centred(x, mask) / x[mask].var(False),
    "the variance is divided by n - 1, expected n": lambda x, mask: centred(x, mask) / x[mask].std(),
    "every row is whitened by itself, expected all tokens of the batch together": lambda x, mask: torch.cat(
        [ppo.masked_whiten(x[i : i + 1], mask[i : i + 1]) for i in range(len(x))]
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# Advantages
# ---------------------------------------------------------------------------------------------------------------------


def decaying_sums(delta: torch.Tensor, mask: torch.Tensor, decay: float) -> torch.Tensor:
    """Σ_l decay^l δ_{t+l}."""
    zero = torch.zeros_like(delta)
    return ppo.estimate_advantages(rewards=delta, values=zero, mask=mask, gamma=decay, lam=1.0)


def residuals(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, **_) -> torch.Tensor:
    """δ_t = r_t + γ V_{t+1} - V_t."""
    return ppo.estimate_advantages(rewards=rewards, values=values, mask=mask, gamma=gamma, lam=0.0)


def without_next_value(rewards, values, mask, gamma, lam) -> torch.Tensor:
    return decaying_sums(rewards - values, mask, gamma * lam)


def reading_past_the_end(rewards, values, mask, gamma, lam) -> torch.Tensor:
    """V_{t+1} as it stands, also where there is no token t + 1; Â_{t+1} is 0 there."""
    noise = torch.where(mask, 0.0, values)
    after = torch.cat([noise[:, 1:], torch.zeros_like(noise[:, :1])], dim=1)
    return ppo.estimate_advantages(rewards=rewards + gamma * after, values=values, mask=mask, gamma=gamma, lam=lam)


def with_decay(of: Callable[[float, float], float]) -> Callable:
    def wrong(mask, gamma, lam, **inputs) -> torch.Tensor:
        return decaying_sums(residuals(mask=mask, gamma=gamma, **inputs), mask, of(gamma, lam))

    return wrong


def forwards(mask, gamma, lam, **inputs) -> torch.Tensor:
    """δ_t + γλ Â_{t-1}."""
    delta = residuals(mask=mask, gamma=gamma, **inputs)
    found = delta.clone()
    for t in range(1, delta.shape[1]):
        found[:, t] = delta[:, t] + gamma * lam * found[:, t - 1]
    return found


GAE = {
    SIGN: lambda **inputs: -ppo.estimate_advantages(**inputs),
    PADDING + ": V and Â are 0 from there on": with_mask(everywhere, ppo.estimate_advantages),
    "V_{t+1} is read beyond the mask: after the last token it is 0": reading_past_the_end,
    SHORT: with_mask(one_short, ppo.estimate_advantages),
    LONG: with_mask(one_long, ppo.estimate_advantages),
    "these are the δ_t, not yet their sum": residuals,
    "the sum decays by γ alone, expected γλ": with_decay(lambda gamma, lam: gamma),
    "the sum decays by λ alone, expected γλ": with_decay(lambda gamma, lam: lam),
    "δ_t is without γ V_{t+1}": without_next_value,
    "these are the returns: V_t has to be taken off": lambda **inputs: (
        ppo.estimate_advantages(**inputs) + inputs["values"]
    ),
    "the sum runs over the tokens before t, expected those from t on": forwards,
}

# ---------------------------------------------------------------------------------------------------------------------
# The clipped loss
# ---------------------------------------------------------------------------------------------------------------------


def token_losses(ratio, advantages, mask, clip_range) -> torch.Tensor:
    return ppo.policy_losses(ratio=ratio, advantages=advantages, mask=mask, clip_range=clip_range)[0]


def clipped_loss(mask: torch.Tensor, **inputs) -> torch.Tensor:
    """-mean of min(q_t Â_t, clip(q_t, 1-ε, 1+ε) Â_t) over the real tokens."""
    return ppo.masked_mean(token_losses(mask=mask, **inputs), mask)


def of_terms(reduce: Callable) -> Callable:
    """The mean loss with another function of the two terms, as gains: unclipped and clipped."""

    def wrong(ratio, advantages, mask, clip_range) -> torch.Tensor:
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        return -ppo.masked_mean(reduce(ratio * advantages, clipped * advantages), mask)

    return wrong


def divided_by_all(mask: torch.Tensor, **inputs) -> torch.Tensor:
    return clipped_loss(mask=mask, **inputs) * mask.sum() / mask.numel()


def mean_of_rows(mask: torch.Tensor, **inputs) -> torch.Tensor:
    losses = torch.where(mask, token_losses(mask=mask, **inputs), 0.0)
    return (losses.sum(1) / mask.sum(1)).mean()


LOSS = {
    "the sign is turned: a loss is minus the gain": lambda **inputs: -clipped_loss(**inputs),
    PADDING: with_mask(everywhere, clipped_loss),
    "the mean is over the padding, too: the sum is right, but divide it by the number of real tokens": divided_by_all,
    SHORT: with_mask(one_short, clipped_loss),
    LONG: with_mask(one_long, clipped_loss),
    "of the two gains it is the larger one, expected the smaller": of_terms(torch.maximum),
    "nothing is clipped": of_terms(lambda unclipped, clipped: unclipped),
    "the clipped gain is taken always, expected the smaller of the two": of_terms(lambda unclipped, clipped: clipped),
    "it is the sum, expected the mean over the real tokens": lambda **inputs: (
        clipped_loss(**inputs) * inputs["mask"].sum()
    ),
    "it is the mean of the rows' means, expected every token to count alike": mean_of_rows,
}


ALIKE = {
    "where all numbers are alike it divides 0 by 0: 1e-8 beside the variance keeps that finite": {
        "x": torch.full_like(batch()["x"], 2.0)
    }
}


def exercise(
    right: Callable, wrong: dict[str, Callable], names: str, edges: dict[str, dict] | None = None, **numbers: float
) -> Exercise:
    tensors = batch()
    return Exercise({name: tensors[name] for name in names.split()} | numbers, right, wrong, edges or {})


EXERCISES = {
    "whiten": exercise(ppo.masked_whiten, WHITEN, "x mask", edges=ALIKE),
    "gae": exercise(ppo.estimate_advantages, GAE, "rewards values mask", gamma=0.9, lam=0.8),
    "clipped_loss": exercise(clipped_loss, LOSS, "ratio advantages mask", clip_range=0.2),
}


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for rounding, wherever `expected` says something, which is not nowhere."""
    said = ~expected.isnan()
    return bool(said.any()) and torch.allclose(found[said], expected[said], rtol=0, atol=1e-5)


def answered(answer: Callable, inputs: dict) -> torch.Tensor | None:
    """What an answer gives for the inputs, which it may change as it likes."""
    return answer(**{name: x.clone() if torch.is_tensor(x) else x for name, x in inputs.items()})


def check(answer: Callable) -> str:
    """What is to be said of an answer, which is known by its function's name."""
    inputs, right, wrong, edges = EXERCISES[answer.__name__]
    found = answered(answer, inputs)
    if found is None:
        return "Not filled in yet: the function returns nothing."
    expected = right(**inputs)
    if not torch.is_tensor(found) or found.shape != expected.shape:
        given = f"a tensor of shape {tuple(found.shape)}" if torch.is_tensor(found) else repr(found)
        return f"Not yet: it returns {given}, expected a tensor of shape {tuple(expected.shape)}."
    found = found.detach().double()
    if same(found, expected):
        for sentence, changes in edges.items():
            there = inputs | changes
            if not same(answered(answer, there).detach().double(), right(**there)):
                return f"Nearly: {sentence}."
        return "Right: these are the numbers of ppo.py."
    mask = inputs["mask"]
    beyond = torch.full_like(mask, expected.dim() > 0) & ~mask  # of a single number nothing is
    on_tokens = expected if expected.dim() == 0 else torch.where(beyond, NAN, expected)
    if same(found, on_tokens):
        return "Nearly: every real token is right, but beyond the mask stand numbers that are not 0."
    for sentence, mistake in wrong.items():
        said = mistake(**inputs)
        if same(found, said if said.dim() == 0 else torch.where(beyond, NAN, said)):
            return f"Not yet: {sentence}."
    return f"Not yet: {first_difference(found, on_tokens)}."


def first_difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    if expected.dim() == 0:
        return f"it gives {found:.4f}, expected {expected:.4f}"
    differs = (found - expected).abs() > 1e-5  # False where nothing is expected
    if not differs.any():
        return "a real token has a number that is none (NaN)"
    row, t = differs.nonzero()[0].tolist()
    return f"in row {row}, token {t} is {found[row, t]:.4f}, expected {expected[row, t]:.4f}"
