"""What a run says of itself while it goes on: its log rows, the numbers on its progress bar, its alarms."""

import math
import time
from pathlib import Path
from statistics import fmean

from config import Config
from evaluation import diversity
from files import append_row, append_to_table, cut, cut_rows, flush, write_whole
from folders import FINISHED, STATS
from ppo import explained_variance, kl_estimate, masked_mean
from train import Rollout, learning_rate

TIMINGS = "timings.jsonl"  # what two equal runs do not share
RESPONSES = "training_log.csv"

WINDOW = 128  # responses, and two rollouts, at least: alarms compare the latest so many with the first

GAP = 1e-3  # nats a token between sampling and scoring: below it, whether it grows does not matter
FAR, FAR_A_TOKEN = 10.0, 0.2  # nats further from the reference, a response and a token: a reward should have risen

# What a higher reward must not be bought with. Statistic: its name and its bounds in words, and whether it keeps them.
LIMITS = {
    "response_length": ("mean length in tokens", "50 to 200 % of", lambda start, now: 0.5 * start <= now <= 2 * start),
    "distinct_bigrams": ("share of distinct word pairs", "at least 60 % of", lambda start, now: now >= 0.6 * start),
    "ended": ("share of responses with EOS", "at most 20 points under", lambda start, now: now >= start - 0.2),
    "ref_perplexity": ("perplexity to the reference", "50 to 200 % of", lambda start, now: 0.5 <= now / start <= 2),
}


def rollout_stats(rollout: Rollout) -> dict[str, float]:
    """A rollout's log row: rewards in reward units, KL and entropy in nats, lengths in tokens, all over real tokens.

    `ref_perplexity` = exp(-mean log ρ(y_t)), at the sampling temperature: it rises as responses become unlike text, and
    falls as they repeat what is likely anyway.
    """
    mask = rollout.mask

    def kl(estimator: str) -> float:
        estimate = kl_estimate(
            logprobs=rollout.logprobs, other_logprobs=rollout.ref_logprobs, mask=mask, estimator=estimator
        )
        return estimate.sum(1).mean().item()

    gaps = (rollout.sampled_logprobs - rollout.logprobs).abs()[mask]
    stats = {
        "reward": rollout.raw_scores.mean().item(),
        "variance": rollout.raw_scores.var(correction=0).item(),
    }
    for name, scores in rollout.term_scores.items():
        stats[f"reward_{name}"] = scores.mean().item()
    return stats | {
        "score": rollout.scores.mean().item(),
        "kl": rollout.kl.sum(1).mean().item(),
        "kl_k1": kl("k1"),
        "kl_k3": kl("k3"),
        "value": masked_mean(rollout.values, mask).item(),
        "return": masked_mean(rollout.returns, mask).item(),
        "explained_variance": explained_variance(values=rollout.values, returns=rollout.returns, mask=mask).item(),
        "response_length": mask.sum(1).float().mean().item(),
        "distinct_bigrams": diversity(rollout.texts)["distinct_bigrams"],
        "ref_perplexity": math.exp(min(-masked_mean(rollout.ref_logprobs, mask).item(), 700)),  # beyond, no float is
        "entropy": masked_mean(rollout.entropy, mask).item(),
        "ended": rollout.has_eos.float().mean().item(),
        "sampling_gap": gaps.mean().item(),
        "sampling_gap_max": gaps.max().item(),
    }


def log_row(update: int, rollout: Rollout, stats: dict[str, float], config: Config) -> dict:
    """An update's row of statistics: its rollout's, and those of its steps."""
    return {"step": update} | rollout_stats(rollout) | stats | {"learning_rate": learning_rate(config, update)}


def log_rows(update: int, rollout: Rollout) -> list[dict]:
    """A rollout's rows of training_log.csv: what was asked, what was answered, what it earned."""
    rows = []
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.texts, strict=True)):
        row = {"step": update, "query": prompt.text, "response": response, "reward": rollout.raw_scores[i].item()}
        for name, scores in rollout.term_scores.items():
            row[f"reward_{name}"] = scores[i].item()
        rows.append(row)
    return rows


def window(batch_size: int) -> int:
    """How many rollouts the alarms compare with as many."""
    return max(2, math.ceil(WINDOW / batch_size))


def least_to_compare(batch_size: int) -> int:
    """From how many updates on the latest rollouts are compared with the first."""
    return 2 * window(batch_size)


def alarms(history: list[dict], batch_size: int) -> dict[str, str]:
    """What is wrong with the latest rollouts, in words, by statistic.

    `history` holds a run's rows of statistics, or those that are `remembered`.
    """
    raised = {}
    if history[-1].get("skipped_steps"):
        latest = history[-1]
        raised["skipped_steps"] = (
            f"{latest['skipped_steps']} of the update's steps were not taken, as the loss was not finite in "
            f"{latest['nonfinite_losses']} of them, and in the others the gradient; try a lower --learning_rate"
        )
    n = window(batch_size)
    if len(history) < least_to_compare(batch_size):
        return raised
    return raised | compared(history[:n], history[-n:], batch_size)


def compared(first: list[dict], latest: list[dict], batch_size: int) -> dict[str, str]:
    """The alarms that come from a run's latest rows, beside its first.

    A rise of the reward is more than two standard errors of the difference, a fall more than four.
    """
    names = ("reward", "kl_k1", "explained_variance", "value_loss", "sampling_gap", *LIMITS)
    start, now = ({name: fmean(row[name] for row in rows) for name in names} for rows in (first, latest))
    error = math.sqrt(squared_error(first, batch_size) + squared_error(latest, batch_size))
    rise = now["reward"] - start["reward"]
    raised = bought_dearly(start, now) if rise > 2 * error else {}
    gone = now["kl_k1"] - first[0]["kl_k1"]  # since before the first update: the second may be far already
    if rise <= 2 * error and gone > max(FAR, FAR_A_TOKEN * now["response_length"]):
        raised["kl"] = (
            f"the policy is {now['kl_k1']:.3g} nats a response from the reference, and the reward has not risen: "
            f"it was {start['reward']:.3g} and is {now['reward']:.3g}"
        )
    if rise < -4 * error - 1e-3 * abs(start["reward"]):
        raised["reward"] = f"the reward fell from {start['reward']:.3g} to {now['reward']:.3g}"
    if now["explained_variance"] < -10 and now["value_loss"] > 10 * start["value_loss"]:
        raised["value_loss"] = (
            f"the value loss went from {start['value_loss']:.3g} to {now['value_loss']:.3g}, "
            "more than ten times what a constant would have"
        )
    if now["sampling_gap"] > max(GAP, 3 * start["sampling_gap"]):
        raised["sampling_gap"] = (
            f"sampling and scoring differ by {now['sampling_gap']:.2g} nats a token, which were "
            f"{start['sampling_gap']:.2g} at the start: what is trained on is not what was drawn"
        )
    return raised


def bought_dearly(start: dict[str, float], now: dict[str, float]) -> dict[str, str]:
    """Which of the LIMITS the latest rollouts break, whose reward has risen."""
    raised = {}
    for name, (words, bounds, keeps) in LIMITS.items():
        if not keeps(start[name], now[name]):
            raised[name] = (
                f"the reward rose from {start['reward']:.3g} to {now['reward']:.3g} while the {words} went from "
                f"{start[name]:.3g} to {now[name]:.3g}; expected {bounds} the start"
            )
    return raised


def squared_error(rows: list[dict], batch_size: int) -> float:
    """The mean reward's squared standard error over some rollouts, from the mean and the variance of each of them."""
    mean = fmean(row["reward"] for row in rows)
    variance = fmean(row["variance"] + row["reward"] ** 2 for row in rows) - mean**2
    return variance / (len(rows) * batch_size - 1)


def bar_numbers(stats: dict[str, float]) -> dict[str, str]:
    """The few numbers that matter, for the progress bar."""
    return {
        "reward": f"{stats['reward']:.2f}",
        "kl": f"{stats['kl_k1']:z.2f}",
        "entropy": f"{stats['entropy']:.2f}",
        "length": f"{stats['response_length']:.0f}",
        "eos": f"{stats['ended']:.0%}",
    }


def timing(update: int, started: float, rollout: Rollout) -> dict[str, float]:
    """Seconds of an update's two halves, up to now, and response tokens a second over both.

    The rollout ends when the reward has been asked; shaping, estimating and the update itself are the other half.
    """
    now = time.perf_counter()
    return {
        "step": update,
        "seconds_rollout": rollout.collected_at - started,
        "seconds_update": now - rollout.collected_at,
        "tokens_per_second": rollout.mask.sum().item() / (now - started),
    }


def write_logs(folder: Path, row: dict, timings: dict, responses: list[dict]) -> None:
    """What is logged of an update, added to the files: its statistics the last, by which it counts as done."""
    append_to_table(folder / RESPONSES, responses)
    append_row(folder / TIMINGS, timings)
    append_row(folder / STATS, row)


def flush_logs(folder: Path) -> int:
    """Have the logs on the disk; the size of that of the responses in bytes."""
    for name in (STATS, TIMINGS, RESPONSES):
        flush(folder / name)
    flush(folder)
    return (folder / RESPONSES).stat().st_size


def cut_logs(folder: Path, n_updates: int, n_bytes: int) -> None:
    """Cut what was logged after so many updates, when the log of the responses had so many bytes.

    Raises RunError if the logs are shorter than that.
    """
    cut_rows(folder / STATS, n_updates)
    cut_rows(folder / TIMINGS, n_updates)
    cut(folder / RESPONSES, n_bytes)


def finish_logs(folder: Path) -> None:
    """Leave the statistics as a list, too: the run is over."""
    rows = (folder / STATS).read_text(encoding="utf-8").splitlines()
    write_whole(folder / FINISHED, "[" + ",\n".join(rows) + "]\n")


def remembered(history: list[dict], batch_size: int) -> list[dict]:
    """The rows of a run's history that the alarms read: the first few and the latest few."""
    n = window(batch_size)
    return history[:n] + history[max(n, len(history) - n) :]
