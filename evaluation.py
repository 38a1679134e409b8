"""What a policy has become: its responses to held-out prompts beside those of the model before PPO.

The same prompts and random numbers for both, so that their differences are paired. The `evaluate` task adds judges
that had no part in the training: a bag-of-words classifier and a language model, each trained on rows of their own.
"""

import csv
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checkpoint import stage_folder, trained_stage, whole_folder, write_whole
from config import Config, UsageError, to_json
from dataset import PARTS, Prompt, column, load_prompts, load_rows, pad
from generate import respond
from loading import check_context, load_policy, load_tokenizer, pick_device
from model import PolicyModel, score_rows
from ppo import kl_estimate, masked_mean
from reviews import movie_reviews
from reward import load_reward_terms, total_reward
from sft import train_language_model


@torch.no_grad()
def evaluate_policy(
    policy: PolicyModel, reference: PolicyModel, tokenizer, terms: dict, prompts: list[Prompt], config: Config
) -> list[dict]:
    """One row a prompt: response, reward and its terms, length, whether it ended, KL to the reference (k1), value.

    Seeded by config.seed alone: two policies draw with the same random numbers. The reward is the raw weighted sum.
    """
    generator = torch.Generator().manual_seed(config.seed)
    table = []
    for start in range(0, len(prompts), config.batch_size):
        batch = prompts[start : start + config.batch_size]
        *query, (ids, mask, _), texts = respond(policy, tokenizer, [p.ids for p in batch], config, generator)
        total, rewards = total_reward(terms, [p.text for p in batch], texts, [p.row for p in batch], config)
        logprobs, values, _ = score_rows(policy, *query, ids, mask, config.mini_batch_size, config.temperature)
        ref_logprobs = score_rows(reference, *query, ids, mask, config.mini_batch_size, config.temperature).logprobs
        kl = kl_estimate(logprobs, ref_logprobs, mask).sum(1)
        for i, prompt in enumerate(batch):
            real = ids[i][mask[i]].tolist()
            table.append(
                {"query": prompt.text, "response": texts[i], "text": policy.separator.join([prompt.text, texts[i]])}
                | {"reward": total[i].item()}
                | {f"reward_{name}": value[i].item() for name, value in rewards.items()}
                | {"length": len(real), "ended": tokenizer.eos_token_id in real}
                | {"kl": kl[i].item(), "value": values[i, 0].item()}
                | {"query_ids": prompt.ids, "response_ids": real}
            )
    return table


def bootstrap_interval(differences: list[float], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of paired differences, by resampling them with replacement."""
    values = np.asarray(differences)
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def distinct_bigrams(texts: list[str]) -> float:
    """Share of different pairs of neighbouring words among all such pairs in the texts together."""
    pairs = [pair for text in texts for words in [text.lower().split()] for pair in itertools.pairwise(words)]
    return len(set(pairs)) / max(1, len(pairs))


def perplexity_under(judge: PolicyModel, rows: list[dict], pad_id: int) -> float:
    """exp of the mean negative log-likelihood a token of the responses, given their prompts, under another model."""
    total = count = 0.0
    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        device = judge.value_head.weight.device
        query = [x.to(device) for x in pad([row["query_ids"] for row in batch], pad_id, "left")]
        ids, mask = (x.to(device) for x in pad([row["response_ids"] for row in batch], pad_id, "right"))
        with torch.no_grad():
            logprobs = judge(*query, ids, mask).logprobs
        count += mask.sum().item()
        total -= masked_mean(logprobs, mask, count=1).item()
    return math.exp(total / count)


def words_and_pairs(text: str) -> list[str]:
    """The features of the bag-of-words judge: lower-cased words, and pairs of neighbours, so that `not bad` is one."""
    words = re.findall(r"[a-z']+", text.lower())
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


def bag_of_words_judge(texts: list[str], labels: list[int], min_count: int = 3) -> Callable[[list[str]], np.ndarray]:
    """A logistic regression on words and word pairs; returns a function from texts to the probability of label 1."""
    bags = [words_and_pairs(text) for text in texts]
    counts = Counter(feature for bag in bags for feature in bag)
    index = {feature: i for i, feature in enumerate(sorted(f for f, n in counts.items() if n >= min_count))}
    weights = nn.EmbeddingBag(len(index) + 1, 1, mode="mean")  # the last feature stands for every unknown one
    nn.init.zeros_(weights.weight)

    def logits(some_bags: list[list[str]]) -> torch.Tensor:
        features = [[index.get(feature, len(index)) for feature in bag] or [len(index)] for bag in some_bags]
        offsets = torch.tensor([0, *np.cumsum([len(row) for row in features])[:-1]])
        return weights(torch.tensor([i for row in features for i in row]), offsets)[:, 0]

    optimizer = torch.optim.Adam(weights.parameters(), lr=0.3)
    targets = torch.tensor(labels, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for rows in torch.randperm(len(bags), generator=generator).split(256):
            loss = nn.functional.binary_cross_entropy_with_logits(logits([bags[i] for i in rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def judge(some_texts: list[str]) -> np.ndarray:
        with torch.no_grad():
            return logits([words_and_pairs(text) for text in some_texts]).sigmoid().numpy()

    return judge


def judge_accuracy(judge: Callable, texts: list[str], labels: list[int]) -> float:
    return float(((judge(texts) > 0.5) == np.array(labels)).mean())


def load_text_judge(config: Config) -> Callable | None:
    """The bag-of-words judge, its accuracy printed; None where the data has no labels of 0 and 1."""
    rows, held_out = load_rows(config, "judge"), load_rows(config, "test", 2000)
    if config.label_column not in rows[0] or {row[config.label_column] for row in rows} != {0, 1}:
        return None
    texts, labels = (
        column(rows, name, "prompt_column", object) for name in (config.prompt_column, config.label_column)
    )
    judge = bag_of_words_judge(texts, labels)
    tests = {"held-out texts": held_out}
    if not config.dataset_path:
        tests |= {f"{kind} reviews": movie_reviews(1000, len(PARTS), kind) for kind in ("negated", "mixed")}
    figures = []
    for name, rows in tests.items():
        known = [row[config.label_column] for row in rows]
        figures.append(f"{judge_accuracy(judge, [row[config.prompt_column] for row in rows], known):.1%} on {name}")
    print("independent judge (words and word pairs), accuracy: " + ", ".join(figures))
    return judge


def load_fluency_judge(config: Config, tokenizer) -> PolicyModel:
    """A language model trained on the judge's own rows with the run's tokenizer; kept for the next evaluation."""
    folder = stage_folder(config, "judge")
    if not trained_stage(config, str(folder), "sft"):
        texts = column(load_rows(config, "judge"), config.prompt_column, "prompt_column")
        torch.manual_seed(config.seed + 1)
        model = train_language_model(config, texts, tokenizer, "fluency judge")
        with whole_folder(folder) as scratch:
            model.save_pretrained(scratch)
            write_whole(scratch / "run_config.json", to_json(config))
    return load_policy(str(folder), "float32", pick_device(config.device)).eval()


def summarise(rows: list[dict], text_judge: Callable | None, fluency_judge: PolicyModel | None, pad_id: int) -> dict:
    """The figures of one policy; see `BOUNDS` for what each should stay within."""
    texts = [row["text"] for row in rows]
    summary = {
        "reward": float(np.mean([row["reward"] for row in rows])),
        "length": float(np.mean([row["length"] for row in rows])),
        "distinct_bigrams": distinct_bigrams([row["response"] for row in rows]),
        "ended": float(np.mean([row["ended"] for row in rows])),
        "kl": float(np.mean([row["kl"] for row in rows])),
    }
    if text_judge:
        summary["positive"] = float((text_judge(texts) > 0.5).mean())
    if fluency_judge:
        summary["perplexity"] = perplexity_under(fluency_judge, rows, pad_id)
    return summary


# What training may do to a text and no more: a rising reward with broken text is a failure.
BOUNDS = {
    "positive": ("at least 90 %", lambda before, after: after >= 0.9),
    "length": ("70 to 130 % of before", lambda before, after: 0.7 <= after / before <= 1.3),
    "distinct_bigrams": ("at least 60 % of before", lambda before, after: after >= 0.6 * before),
    "ended": ("at most 10 points under before", lambda before, after: after >= before - 0.1),
    "kl": ("at most 15 nats", lambda before, after: after <= 15),
    "perplexity": ("at most 1.5 x before", lambda before, after: after <= 1.5 * before),
}


def comparison_table(before: dict, after: dict) -> str:
    """The figures side by side, with the bound that each should keep and whether it does."""
    lines = [f"{'':18}{'before':>10}{'after':>10}   should be"]
    for name, value in after.items():
        bound, holds = BOUNDS.get(name, ("higher", lambda b, a: a > b))
        verdict = "yes" if holds(before[name], value) else "NO"
        lines.append(f"{name:18}{before[name]:10.3f}{value:10.3f}   {bound}: {verdict}")
    return "\n".join(lines)


def reward_difference(before: list[dict], after: list[dict]) -> str:
    """Mean reward before and after on the same prompts, and the interval of the difference."""
    means = [np.mean([row["reward"] for row in rows]) for rows in (before, after)]
    low, high = bootstrap_interval([b["reward"] - a["reward"] for a, b in zip(before, after, strict=True)])
    return (
        f"reward on {len(after)} held-out prompts: {means[0]:.3f} before, {means[1]:.3f} after; "
        f"difference {means[1] - means[0]:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]"
    )


def sample_pairs(before: list[dict], after: list[dict], count: int = 3) -> str:
    """A few prompts with the response before and after, and their rewards."""
    blocks = []
    for old, new in list(zip(before, after, strict=True))[:count]:
        blocks.append(
            f"prompt  {old['query']!r}\n  before ({old['reward']:+.2f}) {old['response'].strip()}\n"
            f"  after  ({new['reward']:+.2f}) {new['response'].strip()}"
        )
    return "\n".join(blocks)


def save_comparison(folder: Path, before: list[dict], after: list[dict], figures: dict) -> None:
    """results/comparison.json with the figures, and results/samples.csv with a row a prompt, best difference first."""
    results = folder / "results"
    results.mkdir(exist_ok=True)
    write_whole(results / "comparison.json", json.dumps(figures, indent=2))
    pairs = sorted(zip(before, after, strict=True), key=lambda pair: pair[0]["reward"] - pair[1]["reward"])
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["query", "response_before", "response_after", "reward_before", "reward_after", "reward_diff"])
    for a, b in pairs:
        writer.writerow([a["query"], a["response"], b["response"], a["reward"], b["reward"], b["reward"] - a["reward"]])
    write_whole(results / "samples.csv", buffer.getvalue())


def evaluate(config: Config, base_model: str, reward_model_path: str) -> None:
    """The `evaluate` task: the run's policy beside the model it started from, on held-out prompts, by every judge."""
    device = pick_device(config.device)
    folder = Path(config.output_dir)
    tokenizer = load_tokenizer(str(folder), "output_dir")
    policy, reference = (load_policy(path, config.dtype, device).eval() for path in (str(folder), base_model))
    check_context(config, policy)
    prompts = load_prompts(config, tokenizer, config.eval_split, config.eval_samples)
    if len(prompts) < 2:
        raise UsageError(f"{config.eval_split} has {len(prompts)} prompts, expected at least 2")
    terms = load_reward_terms(config, reward_model_path, device, policy.separator)
    text_judge = load_text_judge(config)
    fluency_judge = load_fluency_judge(config, tokenizer) if config.trains_from_scratch else None
    before, after = (
        evaluate_policy(model, reference, tokenizer, terms, prompts, config) for model in (reference, policy)
    )
    figures = {
        name: summarise(rows, text_judge, fluency_judge, tokenizer.pad_token_id)
        for name, rows in (("before", before), ("after", after))
    }
    print(f"{folder} on {len(prompts)} {config.eval_split} prompts")
    print(comparison_table(figures["before"], figures["after"]))
    print(reward_difference(before, after))
    print(sample_pairs(before, after))
    save_comparison(folder, before, after, figures)
    print(f"figures and every sample: {folder / 'results'}")
