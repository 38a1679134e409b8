"""A trace as explain.py hands it to page.py, of made-up log-probabilities, values and scores, in double precision.

All else in it comes from ppo.py. (PYTEST_DONT_REWRITE: there are no tests in here.)
"""

import ast
import textwrap
from pathlib import Path

import torch

import ppo

ROOT = Path(__file__).resolve().parents[1]

HOSTILE = 'Quote: </script><!-- <script>alert("x")</script> <img src=x onerror=alert(1)> & “so” on\u2028'
WORDS = [  # of each response; the last two responses are in the batch, but not shown
    [" I", " loved", " every", " minute", "\n", " of", " </b>", " it", ",", " ", " truly", "<eos>"],
    ["Dull", " and", " far", " too", " long", ".", "."],
    ["<eos>"],
    [" so", " so", "<eos>"],
    [" never", " again", "!", "<eos>"],
]
N_SHOWN, N_EPOCHS = 3, 3
SETTINGS = {
    "kl_coef": 0.15,
    "gamma": 0.97,
    "lam": 0.9,
    "clip_range": 0.2,
    "clip_range_value": 0.25,
    "value_coef": 0.5,
    "entropy_coef": 0.0,
    "temperature": 1.0,
    "kl_estimator": "k1",
    "whiten_advantages": True,
    "missing_eos_penalty": 0.5,
    "learning_rate": 1e-3,
    "ppo_epochs": N_EPOCHS,
    "mini_batch_size": 2,
    "max_grad_norm": 1.0,
}


def toy_tensors() -> dict[str, torch.Tensor]:
    """What models and reward would have said: the raw numbers, that no setting of `recomputed` changes."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.tensor([len(words) for words in WORDS])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]

    def noise(size: float) -> torch.Tensor:
        return size * torch.randn(mask.shape, dtype=torch.float64, generator=generator)

    logprobs = -noise(1.5).abs() - 0.01
    raw = {"mask": mask, "logprobs": logprobs, "ref_logprobs": (logprobs + noise(0.4)).clamp(max=-1e-3)}
    raw |= {"values": noise(0.5), "scores": torch.tensor([1.25, -0.75, 0.1, -2.0, 0.5], dtype=torch.float64)}
    drift, value_drift = noise(0.2), noise(0.15)
    raw["new_logprobs"] = torch.stack([(logprobs + k * drift).clamp(max=-1e-3) for k in range(N_EPOCHS + 1)])
    raw["new_logprobs"][0] = logprobs
    raw["new_values"] = torch.stack([raw["values"] + k * value_drift for k in range(N_EPOCHS + 1)])
    return raw


def recomputed(raw: dict[str, torch.Tensor], settings: dict) -> dict[str, torch.Tensor]:
    """What ppo.py makes of the raw numbers, under the trace's names."""
    mask, values, scores = raw["mask"], raw["values"], raw["scores"]
    kl = ppo.kl_estimate(raw["logprobs"], raw["ref_logprobs"], mask, settings["kl_estimator"])
    rewards = ppo.shape_rewards(scores, kl, mask, settings["kl_coef"])
    reward_kl = ppo.shape_rewards(torch.zeros_like(scores), kl, mask, settings["kl_coef"])
    advantages = ppo.estimate_advantages(rewards, values, mask, settings["gamma"], settings["lam"])
    whitened = ppo.masked_whiten(advantages, mask) if settings["whiten_advantages"] else advantages
    return {
        "logprob": raw["logprobs"],
        "ref_logprob": raw["ref_logprobs"],
        "kl": kl,
        "entropy": raw["logprobs"].abs() + 0.1,
        "value": values,
        "reward_kl": reward_kl,
        "reward_score": rewards - reward_kl,
        "reward": rewards,
        "td_error": ppo.estimate_advantages(rewards, values, mask, settings["gamma"], 0.0),
        "advantage": advantages,
        "whitened": whitened,
        "return": ppo.estimate_returns(advantages, values, mask),
    }


def recomputed_epoch(raw: dict[str, torch.Tensor], rolled: dict, settings: dict, k: int) -> dict[str, torch.Tensor]:
    """The same of what depends on the policy after k epochs."""
    mask, old, new = raw["mask"], raw["values"], raw["new_values"][k]
    ratio = ppo.importance_ratio(raw["new_logprobs"][k], raw["logprobs"], mask)
    losses, is_clipped = ppo.policy_losses(ratio, rolled["whitened"], mask, settings["clip_range"])
    eps = settings["clip_range_value"]
    value_losses, value_is_clipped = ppo.value_losses(new, old, rolled["return"], mask, eps)
    return {
        "logprob": raw["new_logprobs"][k],
        "ratio": ratio,
        "unclipped": -ratio * rolled["whitened"],
        "clipped": -ratio.clamp(1 - settings["clip_range"], 1 + settings["clip_range"]) * rolled["whitened"],
        "policy_loss": losses,
        "is_clipped": is_clipped,
        "share": losses / mask.sum(),
        "value": new,
        "value_near_old": new.clamp(old - eps, old + eps),
        "value_loss": value_losses,
        "value_is_clipped": value_is_clipped,
        "value_change": new - old,
    } | ({"entropy": raw["new_logprobs"][k].abs() + 0.1 * k} if settings["entropy_coef"] else {})


def rows_of(numbers: dict[str, torch.Tensor], row: int) -> list[dict]:
    """A response's numbers, token by token."""
    return [{name: values[row, t].item() for name, values in numbers.items()} for t in range(len(WORDS[row]))]


def branch(token: dict) -> str:
    if not token["is_clipped"]:
        return "unclipped"
    return "clipped above" if token["ratio"] > 1 else "clipped below"


def toy_rows(raw: dict[str, torch.Tensor], settings: dict) -> list[dict]:
    rolled = recomputed(raw, settings)
    epochs = [recomputed_epoch(raw, rolled, settings, k) for k in range(N_EPOCHS + 1)]
    rows = []
    for row in range(N_SHOWN):
        words, score = WORDS[row], raw["scores"][row].item()
        tokens = [
            {"id": t, "text": word} | numbers
            for t, (word, numbers) in enumerate(zip(words, rows_of(rolled, row), strict=True))
        ]
        each = [{"tokens": [token | {"branch": branch(token)} for token in rows_of(epoch, row)]} for epoch in epochs]
        has_eos = words[-1] == "<eos>"
        rows.append({"row": row, "prompt": HOSTILE if row == 0 else f"Prompt {row}", "response": "".join(words)})
        rows[-1] |= {"has_eos": has_eos, "raw_score": score + 0.5 * (not has_eos), "score": score}
        rows[-1] |= {"terms": {"judge": score, "brevity": 0.0}, "tokens": tokens, "epochs": each}
    return rows


def raw_rows(raw: dict[str, torch.Tensor]) -> list[dict]:
    """The raw numbers of the whole batch, from which whitening under other settings is recomputed."""
    columns = {"logprob": raw["logprobs"], "ref_logprob": raw["ref_logprobs"], "value": raw["values"]}
    return [
        {"score": raw["scores"][row].item()} | {name: x[row, : len(words)].tolist() for name, x in columns.items()}
        for row, words in enumerate(WORDS)
    ]


def equation(name: str, file: str = "ppo.py") -> dict:
    """Where a function is, and its lines of code below the docstring; read, not imported, as train.py is slow to."""
    text = (ROOT / file).read_text(encoding="utf-8")
    (function,) = [node for node in ast.parse(text).body if getattr(node, "name", None) == name]
    first, last = function.body[1].lineno, function.end_lineno
    source = textwrap.dedent("\n".join(text.splitlines()[first - 1 : last]))
    return {"name": name, "symbol": "", "paper": "PPO", "file": file, "line": first, "source": source}


def toy_trace(**settings) -> dict:
    """The trace of an update that never was."""
    raw = toy_tensors()
    settings = SETTINGS | settings
    mask = raw["mask"]
    advantages = recomputed(raw, settings)["advantage"]
    mean = ppo.masked_mean(advantages, mask)
    variance = ppo.masked_mean((advantages - mean) ** 2, mask)
    n_tokens = int(mask.sum())
    whitening = {"mean": mean.item(), "variance": variance.item(), "n_tokens": n_tokens}
    names = "token_logprobs token_entropy kl_estimate penalise_missing_eos shape_scores shape_rewards"
    names += (
        " estimate_advantages estimate_returns masked_whiten importance_ratio policy_losses value_losses masked_mean"
    )
    equations = [*map(equation, names.split()), equation("minibatch_loss", "train.py")]
    statistics = {"loss": 0.1, "policy_loss": float("nan"), "value_loss": 0.2, "clip_fraction": 0.25, "grad_norm": 1.5}
    return {
        "title": "an update on the policy of saved_models/made_up/with_a_long_name",
        "model": "made up",
        "update": 7,
        "note": "",
        "settings": settings,
        "scores": {"penalised": raw["scores"].tolist(), "scale": None, "clip": None},
        "whitening": whitening if settings["whiten_advantages"] else None,
        "batch": {"n_rows": len(WORDS), "n_tokens": n_tokens, "raw": raw_rows(raw)},
        "rows": toy_rows(raw, settings),
        "updates": [statistics] * N_EPOCHS,
        "equations": equations,
    }
