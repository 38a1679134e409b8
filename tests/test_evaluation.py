"""What a policy is judged by: paired intervals, judges that had no part in training, and the bounds."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from micro import micro_config, review_texts

from dataset import Prompt
from evaluation import (
    BOUNDS,
    bag_of_words_judge,
    bootstrap_interval,
    comparison_table,
    distinct_bigrams,
    evaluate_policy,
    judge_accuracy,
    load_text_judge,
    perplexity_under,
    reward_difference,
    sample_pairs,
    save_comparison,
    summarise,
    words_and_pairs,
)
from loading import new_language_model
from model import PolicyModel
from reviews import movie_reviews

pytest_plugins = ["micro"]


def new_policy(tokenizer, seed: int = 0) -> PolicyModel:
    torch.manual_seed(seed)
    policy = PolicyModel(new_language_model(micro_config(), tokenizer)).eval()
    with torch.no_grad():
        policy.language_model.transformer.wte.weight.mul_(3)  # far from uniform
    return policy


# ----------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "interval"),
    [
        ([2.0, 2.0, 2.0], (2.0, 2.0)),
        ([0.0, 1.0], (0.0, 1.0)),  # means 0, 1/2 and 1 with probability 1/4, 1/2, 1/4
        ([0.0, 0.0, 3.0], (0.0, 3.0)),  # 3 k / 3, k ~ Binomial(3, 1/3): P(k = 3) = .037
        ([0.0] * 9 + [1.0], (0.0, 0.3)),  # k / 10, k ~ Binomial(10, 1/10): P(k > 2) = .070, P(k > 3) = .013
        ([-1.0] + [0.0] * 9, (-0.3, 0.0)),
    ],
)
def test_the_bootstrap_interval_of_a_few_values_is_known(differences, interval):
    """Worked by hand from the distribution of a resample's mean."""
    assert bootstrap_interval(differences) == pytest.approx(interval, abs=1e-9)


def test_the_bootstrap_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(1).normal(0.3, 2.0, 4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    low, high = bootstrap_interval(list(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_the_bootstrap_interval_covers_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(list(rng.normal(0.5, 1.0, 40)), seed) for seed in range(200)]
    assert 0.90 <= np.mean([low <= 0.5 <= high for low, high in intervals]) <= 0.98


def test_the_bootstrap_interval_repeats_and_moves_with_the_values():
    values = [0.1, 0.5, -0.2, 0.7, 0.3]
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values) and low < np.mean(values) < high
    assert bootstrap_interval([value + 1 for value in values]) == pytest.approx((low + 1, high + 1), abs=1e-9)
    assert bootstrap_interval([-value for value in values]) == pytest.approx((-high, -low), abs=0.05)


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        (["a b c"], 1.0),
        (["a b a b a"], 0.5),  # ab ba ab ba
        (["a b", "A  b"], 0.5),  # across texts, in lower case, whatever the spaces
        (["a b", "b c"], 1.0),  # no pair reaches from one text into the next
        (["a", ""], 0.0),
    ],
)
def test_distinct_bigrams_by_hand(texts, share):
    assert distinct_bigrams(texts) == pytest.approx(share, abs=1e-9)


def test_perplexity_under_another_model_equals_brute_force(tokenizer):
    """One token at a time, without padding; over more rows than a batch, of unequal lengths."""
    judge, seed = new_policy(tokenizer), torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(2, len(tokenizer), (n,), generator=seed).tolist()

    rows = [{"query_ids": ids(1 + n % 3), "response_ids": ids(1 + n % 4)} for n in range(70)]
    total, count = 0.0, 0
    for row in rows:
        for t, token in enumerate(row["response_ids"]):
            before = torch.tensor([row["query_ids"] + row["response_ids"][:t]])
            with torch.no_grad():
                total -= judge.language_model(before).logits[0, -1].log_softmax(-1)[token].item()
            count += 1
    assert perplexity_under(judge, rows, tokenizer.pad_token_id) == pytest.approx(math.exp(total / count), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------
# Judges
# ----------------------------------------------------------------------------------------------------------------


def test_the_features_are_words_and_neighbouring_pairs():
    assert words_and_pairs("It's NOT bad, at all!") == [
        *("it's", "not", "bad", "at", "all"),
        *("it's not", "not bad", "bad at", "at all"),
    ]
    assert words_and_pairs("?!") == []


def test_the_judge_tells_not_bad_from_bad():
    """Words alone cannot: each of them stands in as many positive texts as negative ones."""
    positive, negative = ["the film is not bad", "the film is good"], ["the film is bad", "the film is not good"]
    judge = bag_of_words_judge((positive + negative) * 100, [1, 1, 0, 0] * 100)
    probabilities = judge(["it is not bad", "bad", "it is good", "it is not good", "the film is bad"])
    assert (probabilities > 0.5).tolist() == [True, False, True, False, False]


def test_the_judge_learns_the_built_in_reviews_and_repeats_itself():
    train, test = movie_reviews(1500, 1), movie_reviews(300, 2)
    texts, labels = ([row[name] for row in train] for name in ("text", "label"))
    held_out, known = ([row[name] for row in test] for name in ("text", "label"))
    judge = bag_of_words_judge(texts, labels)
    assert judge_accuracy(judge, held_out, known) > 0.85
    assert judge(held_out).tolist() == bag_of_words_judge(texts, labels)(held_out).tolist()


def test_the_judge_has_an_answer_for_words_it_has_never_met():
    judge = bag_of_words_judge(["good film", "bad film"] * 10, [1, 0] * 10)
    assert np.isfinite(judge(["xyzzy", "", "?"])).all()


def test_accuracy_by_hand():
    def judge(texts):
        return np.array([0.9, 0.2, 0.6, 0.4])

    assert judge_accuracy(judge, [""] * 4, [1, 0, 0, 1]) == pytest.approx(0.5, abs=1e-9)


def test_data_without_classes_has_no_judge(tmp_path):
    rows = "text,label\n" + "".join(f"Text {number}.,{number % 3}\n" for number in range(60))
    (tmp_path / "three.csv").write_text(rows)
    (tmp_path / "none.csv").write_text(rows.replace("label", "stars"))
    for name in ("three.csv", "none.csv"):
        assert load_text_judge(micro_config(dataset_path=str(tmp_path / name))) is None


# ----------------------------------------------------------------------------------------------------------------
# Before and after
# ----------------------------------------------------------------------------------------------------------------

VERDICTS = [
    ("positive", 0.5, 0.9, "yes"),
    ("positive", 0.95, 0.89, "NO"),
    ("length", 10.0, 7.0, "yes"),
    ("length", 10.0, 6.9, "NO"),
    ("length", 10.0, 13.0, "yes"),
    ("length", 10.0, 13.1, "NO"),
    ("distinct_bigrams", 0.5, 0.3, "yes"),
    ("distinct_bigrams", 0.5, 0.29, "NO"),
    ("ended", 0.75, 0.66, "yes"),
    ("ended", 0.75, 0.64, "NO"),
    ("kl", 0.0, 15.0, "yes"),
    ("kl", 0.0, 15.1, "NO"),
    ("perplexity", 4.0, 6.0, "yes"),
    ("perplexity", 4.0, 6.1, "NO"),
    ("reward", 0.1, 0.2, "yes"),
    ("reward", 0.2, 0.2, "NO"),
]


@pytest.mark.parametrize(("name", "before", "after", "verdict"), VERDICTS)
def test_the_table_says_whether_each_bound_holds(name, before, after, verdict):
    heading, line = comparison_table({name: before}, {name: after}).splitlines()
    assert heading.split() == ["before", "after", "should", "be"]
    assert line.split()[:3] == [name, f"{before:.3f}", f"{after:.3f}"]
    assert line.endswith(f": {verdict}")


def test_every_bound_is_tested_on_both_sides():
    for name in BOUNDS:
        assert {verdict for other, *_, verdict in VERDICTS if other == name} == {"yes", "NO"}


def rows(rewards: list[float], response: str = " is good.") -> list[dict]:
    return [{"query": f"Film {n}", "response": response, "reward": value} for n, value in enumerate(rewards)]


def test_the_difference_is_printed_with_its_means_and_interval():
    assert reward_difference(rows([1.0, 2.0]), rows([1.5, 2.5])) == (
        "reward on 2 held-out prompts: 1.500 before, 2.000 after; difference +0.500, 95 % interval [+0.500, +0.500]"
    )


def test_sample_pairs_stand_one_below_the_other():
    text = sample_pairs(rows([1.0] * 5), rows([-2.0] * 5, " is bad."))
    assert text.count("prompt  ") == 3
    assert text.splitlines()[:3] == ["prompt  'Film 0'", "  before (+1.00) is good.", "  after  (-2.00) is bad."]


def test_the_comparison_is_saved_best_difference_first(tmp_path):
    before, after = rows([1.0, 2.0, 3.0]), rows([1.5, 5.0, 2.0], ' is, "well",\nbad.')
    save_comparison(tmp_path, before, after, {"before": {"reward": 2.0}, "after": {"reward": 2.5}})
    assert json.loads((tmp_path / "results/comparison.json").read_text())["after"] == {"reward": 2.5}
    with (tmp_path / "results/samples.csv").open(newline="", encoding="utf-8") as file:
        saved = list(csv.DictReader(file))
    assert [row["query"] for row in saved] == ["Film 1", "Film 0", "Film 2"]
    assert [float(row["reward_diff"]) for row in saved] == [3.0, 0.5, -1.0]
    assert {row["response_after"] for row in saved} == {' is, "well",\nbad.'}


def evaluated(policy, reference, tokenizer, **settings) -> list[dict]:
    """Reward: 2 for every response and its length in characters, halved."""
    terms = {
        "two": lambda prompts, responses, rows: torch.full((len(responses),), 2.0),
        "length": lambda prompts, responses, rows: torch.tensor([float(len(text)) for text in responses]),
    }
    prompts = [Prompt(text[:9], tokenizer(text[:9]).input_ids, {}) for text in review_texts(10)]
    config = micro_config(reward_weights="length=0.5", batch_size=2, **settings)
    return evaluate_policy(policy, reference, tokenizer, terms, prompts, config)


def test_a_policy_is_evaluated_row_by_row(tokenizer):
    """Against `score` on each row alone: KL summed over the response, the value before its first token."""
    policy, reference = new_policy(tokenizer), new_policy(tokenizer, seed=1)
    torch.nn.init.normal_(policy.value_head.weight)
    table = evaluated(policy, reference, tokenizer)
    assert [row["query"] for row in table] == [text[:9] for text in review_texts(10)]
    for row in table:
        assert row["reward_two"] == 2.0 and row["reward_length"] == len(row["response"])
        assert row["reward"] == pytest.approx(2 + len(row["response"]) / 2, abs=1e-4)
        assert row["length"] == len(row["response_ids"]) <= 12
        assert row["ended"] == (row["response_ids"][-1] == tokenizer.eos_token_id)
        query, response = torch.tensor([row["query_ids"]]), torch.tensor([row["response_ids"]])
        masks = [torch.ones_like(ids, dtype=torch.bool) for ids in (query, response)]
        with torch.no_grad():
            scores, others = (model.score(query, masks[0], response, masks[1]) for model in (policy, reference))
        assert row["kl"] == pytest.approx((scores.logprobs - others.logprobs).sum().item(), abs=1e-4)
        assert row["value"] == pytest.approx(scores.values[0, 0].item(), abs=1e-4)


def test_two_policies_draw_with_the_same_random_numbers(tokenizer):
    """So that equal policies give equal responses; and the seed decides them."""
    policy = new_policy(tokenizer)
    table = evaluated(policy, policy, tokenizer)
    assert table == evaluated(new_policy(tokenizer), policy, tokenizer)
    assert {row["kl"] for row in table} == {0.0}
    assert [row["response"] for row in table] != [
        row["response"] for row in evaluated(policy, policy, tokenizer, seed=1)
    ]


def test_the_summary_is_made_of_means():
    """Worked by hand; the judge reads prompt and response."""
    table = [
        {
            "query": "A",
            "response": " b c b c",
            "text": "A b c b c",
            "reward": 1.0,
            "length": 4,
            "ended": True,
            "kl": 0.5,
        },
        {"query": "D", "response": " b c", "text": "D b c", "reward": 2.0, "length": 3, "ended": False, "kl": -0.1},
    ]
    read = []

    def judge(texts):
        read.extend(texts)
        return np.array([0.7, 0.5])

    summary = summarise(table, judge, None, 0)
    assert summary == pytest.approx(
        {"reward": 1.5, "length": 3.5, "distinct_bigrams": 0.5, "ended": 0.5, "kl": 0.2, "positive": 0.5}, abs=1e-9
    )
    assert read == ["A b c b c", "D b c"]
    assert set(summarise(table, None, None, 0)) == {"reward", "length", "distinct_bigrams", "ended", "kl"}


def test_the_summary_asks_the_fluency_judge(monkeypatch):
    monkeypatch.setattr("evaluation.perplexity_under", lambda judge, rows, pad_id: judge.answer + pad_id)
    table = [{"query": "A", "response": " b c", "text": "A b c", "reward": 1.0, "length": 4, "ended": True, "kl": 0.5}]
    assert summarise(table, None, SimpleNamespace(answer=6.0), 1)["perplexity"] == 7.0
