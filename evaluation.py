"""What a policy has become: its responses to held-out prompts beside those of other policies, such as its start.

The same prompts and random numbers for all, so that their differences are paired. The `evaluate` task adds judges
that had no part in the training: a bag-of-words classifier and a language model, each trained on rows of their own.
"""

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from adapters import adapter_to_add
from config import Config, UsageError, first_line
from dataset import PARTS, column, load_rows, most_texts, pad
from device import pick_device, prepare_device, products, settle_precision
from distributed import gathered, own_share
from files import check_writable, write_table, write_whole
from folders import policy_folder, run_above, stage_folder
from generate import respond, score_responses
from intervals import bootstrap_interval, paired_share_interval, wilson_interval
from loading import load_language_model, load_policy, load_tokenizer
from model import PolicyModel
from plot import sample_pairs
from ppo import kl_estimate
from preflight import check_context, check_static_cache
from progress import progress, say, tell
from prompts import Prompt, load_prompts, rows_of, separator_of
from provenance import Source, columns_read, other_start, overlaps, usable_stage
from randomness import uniforms
from reviews import movie_reviews
from reward import load_reward_terms, needs_reward_model, total_reward
from sft import save_stage, train_language_model
from train import Fixed

FILES = {"validation": "val", "test": "test"}  # the splits of --eval_split both, and how their files' names begin
SHARES = ("ended", "positive")  # columns that say yes or no of a response
PERPLEXITIES = {"reference_perplexity": "reference_logprob", "perplexity": "judge_logprob"}  # of these columns


@torch.no_grad()
def evaluate_policy(
    policy: PolicyModel, fixed: Fixed, prompts: list[Prompt], config: Config, name: str = "evaluation"
) -> list[dict]:
    """One row a prompt: response, raw reward and its terms, length, whether it ended, KL (k1), value, likelihood.

    KL to the reference, and log-likelihood under it (`reference_logprob`), in nats a response at the sampling
    temperature. The random numbers are a function of config.seed alone: two policies draw alike. `name` is what the
    progress bar says. Several processes have a share of the prompts each, and all get the whole table.
    """
    random_numbers = uniforms(config.seed, "evaluation", 0, (len(prompts), config.max_new_tokens))
    own = own_share(len(prompts))
    table = []
    with progress(own.stop - own.start, name, "prompt") as advance:
        for start in range(own.start, own.stop, config.batch_size):
            batch = slice(start, min(start + config.batch_size, own.stop))
            rows = evaluate_batch(policy, fixed, prompts[batch], random_numbers[batch], config)
            table += rows
            advance(bar_numbers(table), len(rows))
    return [row for part in gathered(table) for row in part]


def bar_numbers(rows: list[dict]) -> dict[str, str]:
    """The few numbers that matter, over the rows so far, for the progress bar."""
    reward, kl, length, ended = (fmean(row[name] for row in rows) for name in ("reward", "kl", "length", "ended"))
    return {"reward": f"{reward:.2f}", "kl": f"{kl:z.2f}", "length": f"{length:.0f}", "eos": f"{ended:.0%}"}


def evaluate_batch(
    policy: PolicyModel, fixed: Fixed, prompts: list[Prompt], random_numbers: torch.Tensor, config: Config
) -> list[dict]:
    """The rows of some prompts, with the random numbers of theirs."""
    drawn = respond(policy, fixed.tokenizer, [prompt.ids for prompt in prompts], random_numbers, config)
    rewards, term_rewards = total_reward(
        fixed.terms,
        prompts=[prompt.text for prompt in prompts],
        responses=drawn.texts,
        rows=[prompt.row for prompt in prompts],
        config=config,
    )
    own, reference = score_responses(policy, drawn, config), score_responses(fixed.reference, drawn, config)
    kl = kl_estimate(logprobs=own.logprobs, other_logprobs=reference.logprobs, mask=drawn.mask).sum(1)
    reference_logprobs = torch.where(drawn.mask, reference.logprobs, 0.0).sum(1)
    table = []
    for i, (prompt, response) in enumerate(zip(prompts, drawn.texts, strict=True)):
        response_ids = drawn.response_ids[i][drawn.mask[i]].tolist()
        row = {"query": prompt.text, "response": response}
        row["text"] = separator_of(policy, config).join([prompt.text, response])
        row["reward"] = rewards[i].item()
        for name, values in term_rewards.items():
            row[f"reward_{name}"] = values[i].item()
        row["value"] = own.values[i, 0].item()
        row["kl"] = kl[i].item()
        row["reference_logprob"] = reference_logprobs[i].item()
        row["length"] = len(response_ids)
        row["ended"] = drawn.has_eos[i].item()
        row["query_ids"] = prompt.ids
        row["response_ids"] = response_ids
        table.append(row)
    return table


def add_rouge(rows: list[dict], references: list[str]) -> None:
    """Add each row's reference and ROUGE-1, -2 and -L: F1 in [0, 1] on lower-cased runs of a-z and 0-9, unstemmed."""
    from rouge_score.rouge_scorer import RougeScorer  # here, as all that has no references can do without it

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for row, reference in zip(rows, references, strict=True):
        scores = scorer.score(reference, row["response"])
        row |= {"reference": reference} | {name: score.fmeasure for name, score in scores.items()}


def own_numbers(row: dict) -> list[str]:
    """The columns that measure a response by itself: reward and its terms, ROUGE, value, length in tokens."""
    return [name for name in row if name.startswith(("reward", "rouge", "value", "length"))]


def mean_of(values: np.ndarray, picks: np.ndarray) -> np.ndarray:
    return values[picks].mean(-1)


def perplexity_of(logprobs: np.ndarray, lengths: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """exp of the mean negative log-likelihood a token, over all tokens of the picked responses together."""
    return np.exp(-logprobs[picks].sum(-1) / lengths[picks].sum(-1))


def difference_of(before: Callable, after: Callable, picks: np.ndarray) -> np.ndarray:
    return after(picks) - before(picks)


def statistics_of(rows: list[dict]) -> dict[str, Callable]:
    """The figures that can be said of any of a policy's rows: from rows' indices (..., picked) to the figure (...)."""

    def numbers(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows], dtype=float)

    names = [*own_numbers(rows[0]), "kl", *(name for name in SHARES if name in rows[0])]
    statistics = {name: partial(mean_of, numbers(name)) for name in names}
    different = np.array([unique_share(words_of(row["response"])) for row in rows])
    statistics |= {"unique_token_ratio": partial(mean_of, different), "repetition": partial(mean_of, 1 - different)}
    for name, column_name in PERPLEXITIES.items():
        if column_name in rows[0]:
            statistics[name] = partial(perplexity_of, numbers(column_name), numbers("length"))
    return statistics


def intervals_of(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each figure of a policy that has one, over prompts: Wilson's of a share, else by bootstrap.

    Figures of all responses together, such as the number of different words, have none: they grow with the sample.
    """
    found = {name: bootstrap_interval(statistic, len(rows)) for name, statistic in statistics_of(rows).items()}
    for name in SHARES:
        if name in rows[0]:
            found[name] = wilson_interval(sum(row[name] for row in rows), len(rows))
    return found


def paired_differences(first: list[dict], other: list[dict]) -> dict[str, dict[str, float]]:
    """For each figure that has an interval: other's minus first's on the same prompts, and its 95 % interval: Agresti
    and Min's of a share, else by bootstrap.
    """
    n = len(first)
    before, after = statistics_of(first), statistics_of(other)
    paired = {}
    for name in after:
        difference = partial(difference_of, before[name], after[name])
        if name in SHARES:
            changes = [b[name] - a[name] for a, b in zip(first, other, strict=True)]
            low, high = paired_share_interval(gained=changes.count(1), lost=changes.count(-1), n=n)
        else:
            low, high = bootstrap_interval(difference, n)
        paired[name] = {"difference": float(difference(np.arange(n))), "low": low, "high": high}
    return paired


def words_of(text: str) -> list[str]:
    return text.lower().split()


def unique_share(words: list[str]) -> float:
    """Different words / words, in (0, 1]; 1 without a word."""
    return len(set(words)) / len(words) if words else 1.0


def diversity(responses: list[str]) -> dict[str, float]:
    """How varied the words are: a response's whitespace-separated, lower-cased tokens.

    Within a response, as means over responses: `unique_token_ratio`, different words / words in (0, 1], and
    `repetition`, 1 minus it; without a word 1 and 0. Over all responses together: `vocabulary`, the number of different
    words, and distinct-1 and -2 in [0, 1], different words or pairs of neighbours / their number; without a pair 1.
    """
    texts = [words_of(response) for response in responses]
    words = [word for text in texts for word in text]
    pairs = [pair for text in texts for pair in itertools.pairwise(text)]
    unique = float(np.mean([unique_share(text) for text in texts]))
    return {
        "unique_token_ratio": unique,
        "repetition": 1 - unique,
        "vocabulary": len(set(words)),
        "distinct_words": len(set(words)) / max(1, len(words)),
        "distinct_bigrams": len(set(pairs)) / len(pairs) if pairs else 1.0,
    }


@torch.no_grad()
def likelihoods_under(judge: PolicyModel, rows: list[dict], pad_id: int) -> list[float]:
    """Each response's log-likelihood given its prompt, in nats, under another model."""
    likelihoods = []
    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        query_ids, query_mask = pad([row["query_ids"] for row in batch], pad_id, "left")
        response_ids, mask = pad([row["response_ids"] for row in batch], pad_id, "right")
        mask = mask.to(judge.device)
        outputs = judge(
            query_ids=query_ids.to(judge.device),
            query_mask=query_mask.to(judge.device),
            response_ids=response_ids.to(judge.device),
            response_mask=mask,
        )
        likelihoods += torch.where(mask, outputs.logprobs, 0.0).sum(1).tolist()
    return likelihoods


def bag_of_words_judge(texts: list[str], labels: list[int]):
    """A classifier of scikit-learn, fitted: logistic regression on lower-cased words and pairs of neighbours, so that
    `not bad` is one feature; of those that three texts hold.
    """
    from sklearn.feature_extraction.text import CountVectorizer  # here, as only the models trained here have a judge
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words_and_pairs = CountVectorizer(ngram_range=(1, 2), min_df=3, token_pattern=r"[\w']+")
    return make_pipeline(words_and_pairs, LogisticRegression(max_iter=1000)).fit(texts, labels)


def load_text_judge(config: Config):
    """The bag-of-words judge, its accuracy printed; None where the data has no labels of 0 and 1, or too few words."""
    rows = list(load_rows(config, "judge", most_texts(config, "sft")))
    held_out = list(load_rows(config, "test", 2000))
    if config.label_column not in rows[0] or {row[config.label_column] for row in rows} != {0, 1}:
        return None

    def texts_and_labels(some_rows: list[dict]) -> list[list]:
        return [[row[name] for row in some_rows] for name in (config.prompt_column, config.label_column)]

    try:
        judge = bag_of_words_judge(*texts_and_labels(rows))
    except ValueError as error:  # no word is in three texts
        print(f"there is no independent judge of these texts: {first_line(error)}")
        return None
    tests = {"held-out texts": held_out}
    if not config.dataset_path:
        tests |= {f"{kind} reviews": movie_reviews(1000, len(PARTS), kind) for kind in ("negated", "mixed")}
    figures = [f"{judge.score(*texts_and_labels(some)):.1%} on {name}" for name, some in tests.items()]
    print("independent judge (words and word pairs), accuracy: " + ", ".join(figures))
    return judge


def load_fluency_judge(config: Config, tokenizer) -> PolicyModel:
    """A language model trained on the judge's own rows with the run's tokenizer; kept for the next evaluation."""
    folder = stage_folder(config, "judge")
    if not usable_stage(config, str(folder), "sft", part="judge"):
        torch.manual_seed(config.seed + 1)
        rows = load_rows(config, "judge", most_texts(config, "sft"))
        model = train_language_model(config, rows, tokenizer, "fluency judge")
        source = Source(columns_read(config, rows[0]), rows, held_out=[])
        save_stage(folder, "judge", model, tokenizer, config, source)
    return PolicyModel(load_language_model(str(folder), "float32", pick_device(config.device))).eval()


def add_judgements(rows: list[dict], text_judge, fluency_judge: PolicyModel | None, pad_id: int) -> None:
    """Add what the independent judges that there are say of each row: whether it is positive, how likely it is."""
    if text_judge:
        for row, positive in zip(rows, text_judge.predict([row["text"] for row in rows]), strict=True):
            row["positive"] = bool(positive)
    if fluency_judge:
        for row, likelihood in zip(rows, likelihoods_under(fluency_judge, rows, pad_id), strict=True):
            row["judge_logprob"] = likelihood


def summarise(rows: list[dict]) -> dict[str, float]:
    """A policy's figures: means under the plain name; of `own_numbers` also `_std` (population), `_min` and `_max`."""
    statistics = statistics_of(rows)
    summary = {}
    for name in own_numbers(rows[0]):
        values = [row[name] for row in rows]
        for suffix, figure in (("", np.mean), ("_std", np.std), ("_min", np.min), ("_max", np.max)):
            summary[name + suffix] = float(figure(values))
    summary |= diversity([row["response"] for row in rows])
    everyone = np.arange(len(rows))
    for name in ("ended", "kl", "reference_perplexity", "positive", "perplexity"):
        if name in statistics:
            summary[name] = float(statistics[name](everyone))
    return summary


def compare(tables: dict[str, list[dict]]) -> dict:
    """A split's part of comparison.json: each policy's figures and their intervals, its differences from the first
    one, five samples.
    """
    first, *others = tables
    return {
        "n_prompts": len(tables[first]),
        "figures": {name: summarise(rows) for name, rows in tables.items()},
        "intervals": {name: intervals_of(rows) for name, rows in tables.items()},
        "differences": {name: paired_differences(tables[first], tables[name]) for name in others},
        "samples": side_by_side(tables)[:5],
    }


def side_by_side(tables: dict[str, list[dict]]) -> list[dict]:
    """A row a prompt: query, reference if there is one, `<column>_<policy>` for all, reward_diff from first to last."""
    everyone = list(tables.values())
    first, last = everyone[0], everyone[-1]
    table = []
    for i in range(len(first)):
        row = {"query": first[i]["query"]}
        if "reference" in first[i]:
            row["reference"] = first[i]["reference"]
        for column_name in ("response", *own_numbers(first[i])):
            for policy, rows in tables.items():
                row[f"{column_name}_{policy}"] = rows[i][column_name]
        row["reward_diff"] = last[i]["reward"] - first[i]["reward"]
        table.append(row)
    return table


def policy_paths(config: Config, base_model: str) -> dict[str, str]:
    """Folder or id of each policy by name: those of --policies, else `before` and `after`, the run's start and end."""
    if not config.policies:
        return {"before": base_model, "after": config.output_dir}
    paths = {}
    for entry in config.policies:
        name, _, path = entry.partition("=")
        if not name or not path or name in paths:
            raise UsageError(f"--policies {entry!r}: expected NAME=FOLDER_OR_ID, with a name of its own")
        paths[name] = policy_folder(path)
    return paths


def load_policies(config: Config, paths: dict[str, str], device: torch.device):
    """The first one's tokenizer, and each policy by name. Raises UsageError for a vocabulary other than the first's."""
    flags = ["policies"] * len(paths) if config.policies else ["base_model_name", "output_dir"]
    first, policies = None, {}
    for flag, (name, path) in zip(flags, paths.items(), strict=True):
        adapter = adapter_to_add(config, path) if flag == "base_model_name" else ""  # where the run started from
        tokenizer = load_tokenizer(path, flag, adapter)
        first = first or tokenizer
        if tokenizer.get_vocab() != first.get_vocab():
            raise UsageError(f"--{flag} {path} has another vocabulary than the first policy, which scores its tokens")
        policies[name] = load_policy(config, path, device, adapter, flag).eval()
        if policies[name].is_encoder_decoder != next(iter(policies.values())).is_encoder_decoder:
            raise UsageError(f"--{flag} {path} is of another family than the first policy, whose prompts it would get")
    return first, policies


def load_held_out(config: Config, tokenizer) -> tuple[dict[str, list[Prompt]], dict[str, list[str]]]:
    """Prompts, and the texts to compare responses with where there are any, of each split that is asked for."""
    prompts, references = {}, {}
    for split in FILES if config.eval_split == "both" else [config.eval_split]:
        prompts[split] = load_prompts(config, tokenizer, split, config.eval_samples)
        if len(prompts[split]) < 2:
            raise UsageError(f"{split} has {len(prompts[split])} prompts, expected at least 2")
        if config.reference_column:
            references[split] = column(rows_of(prompts[split]), config.reference_column, "reference_column")
    return prompts, references


def models_used(config: Config, paths: dict[str, str], reward_model_path: str) -> list[str]:
    """The policies' folders, and the reward model's where there is one."""
    return [*paths.values(), *([reward_model_path] if needs_reward_model(config) else [])]


def rows_to_judge_by(config: Config, prompts: dict[str, list[Prompt]]) -> dict[str, list[dict]]:
    """The rows on which no model should have been trained: those of the prompts, by split, and those of the judges."""
    rows = {split: rows_of(some) for split, some in prompts.items()}
    if config.trains_from_scratch:
        rows["judge"] = load_rows(config, "judge", most_texts(config, "sft"))
    return rows


def try_evaluation(
    config: Config, policies: dict[str, PolicyModel], fixed: Fixed, prompts: dict[str, list[Prompt]], results: Path
) -> None:
    """What a dry run shows of an evaluation: a few prompts with each policy's response, and what would be left."""
    few = next(iter(prompts.values()))[:3]
    tables = {name: evaluate_policy(policy, fixed, few, config) for name, policy in policies.items()}
    say(sample_pairs(compare(tables)))
    counts = " and ".join(f"{len(some)} {split} prompts" for split, some in prompts.items())
    print(f"dry run: {', '.join(policies)} would be compared on {counts}, in {results}")
    judge = str(stage_folder(config, "judge"))
    if config.trains_from_scratch and not usable_stage(config, judge, "sft", part="judge"):
        print(f"dry run: {judge} would be a language model, the judge of fluency, trained on rows of its own")


def tell_what_is_named(config: Config) -> None:
    """The models, data and function that the run's settings name, before any is read: they may be anybody's."""
    named = {
        "base_model_name": config.base_model_name,
        "peft_model_path": config.peft_model_path,
        "dataset_path": config.dataset_path,
        "reward_model_path": config.reward_model_path,
        "reward_fn": config.reward_fn,
    }
    if any(named.values()):
        tell("using " + ", ".join(f"--{name} {value}" for name, value in named.items() if value))


def evaluate(config: Config, base_model: str, reward_model_path: str) -> None:
    """The `evaluate` task: every policy on the same held-out prompts, by every judge, written into results/."""
    tell_what_is_named(config)
    device = prepare_device(config)
    paths = policy_paths(config, base_model)
    tokenizer, policies = load_policies(config, paths, device)
    prompts, references = load_held_out(config, tokenizer)
    for policy in policies.values():
        check_context(config, policy, *prompts.values())
        check_static_cache(config, policy)
    reference = next(iter(policies.values()))
    terms = load_reward_terms(config, reward_model_path, device, separator_of(reference, config))
    fixed = Fixed(reference=reference, tokenizer=tokenizer, terms=terms)
    notes = other_start(run_above(Path(config.output_dir)))
    if config.dataset_path:  # reviews made here are alike by chance
        notes += overlaps(models_used(config, paths, reward_model_path), rows_to_judge_by(config, prompts))
    for note in notes:
        say(note)
    results = run_above(Path(config.output_dir)) / "results"
    check_writable(results)
    if config.dry_run:
        return try_evaluation(config, policies, fixed, prompts, results)
    text_judge = load_text_judge(config) if config.trains_from_scratch else None
    fluency_judge = load_fluency_judge(config, tokenizer) if config.trains_from_scratch else None
    # only now, so that a judge that had to be trained leaves no other numbers than one that was there
    work = products(config.mini_batch_size * (config.max_prompt_length + config.max_new_tokens))
    settle_precision(reference.language_model, work, config)
    results.mkdir(exist_ok=True)  # before the work, as it may fail
    tables = {}
    for split in prompts:
        tables[split] = {}
        for name, policy in policies.items():
            rows = evaluate_policy(policy, fixed, prompts[split], config, name=f"{name}, {split} prompts")
            add_judgements(rows, text_judge, fluency_judge, tokenizer.pad_token_id)
            if references:
                add_rouge(rows, references[split])
            tables[split][name] = rows
    comparison = {"policies": paths, "notes": notes}
    comparison["splits"] = {split: compare(own) for split, own in tables.items()}
    write_results(results, comparison, tables, Path(config.dataset_path).stem or "reviews")


def write_results(folder: Path, comparison: dict, tables: dict[str, dict[str, list[dict]]], data: str) -> None:
    """The comparison, a table a split, and the samples of all of them, sorted by how much the reward changed.

    All in place of an earlier evaluation's, whose tables of other splits may be of other policies or settings.
    """
    samples = []
    earlier = {path for start in FILES.values() for path in folder.glob(f"{start}_results_*.csv")}
    for split, policies in tables.items():
        rows = side_by_side(policies)
        table = folder / f"{FILES[split]}_results_{data}.csv"
        write_table(table, rows)
        earlier.discard(table)
        samples += rows
    write_whole(folder / "comparison.json", json.dumps(comparison, indent=2))
    names = comparison["policies"]
    columns = ["query", *(f"response_{name}" for name in names), *(f"reward_{name}" for name in names), "reward_diff"]
    write_table(folder / "samples.csv", sorted(samples, key=lambda row: -row["reward_diff"]), columns)
    for path in earlier:
        path.unlink(missing_ok=True)
