"""What policies are judged by: figures of their responses, paired intervals, judges that had no part in training."""

import copy
import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import read_table
from micro import micro_config, review_texts
from tiny_models import letter_tokenizer, tiny_policy

import evaluation
from config import UsageError
from evaluation import (
    add_judgements,
    add_rouge,
    bag_of_words_judge,
    compare,
    diversity,
    evaluate_policy,
    intervals_of,
    likelihoods_under,
    load_text_judge,
    paired_differences,
    policy_paths,
    side_by_side,
    summarise,
    write_results,
)
from intervals import paired_share_interval, wilson_interval
from model import PolicyModel
from prompts import Prompt
from randomness import uniforms
from reviews import movie_reviews
from sft import new_language_model
from train import Fixed

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
    ("texts", "share"),
    [
        (["a b c"], 1.0),
        (["a b a b a"], 0.5),  # ab ba ab ba
        (["a b", "A  b"], 0.5),  # across texts, in lower case, whatever the spaces
        (["a b", "b c"], 1.0),  # no pair reaches from one text into the next
        (["a", ""], 1.0),
    ],
)
def test_distinct_bigrams_by_hand(texts, share):
    assert diversity(texts)["distinct_bigrams"] == pytest.approx(share, abs=1e-9)


def test_diversity_and_repetition_by_hand():
    """Different words in a response: 2 of 5, 2 of 2, and none to repeat. In all: a b a b a, a c."""
    assert diversity(["a b a b a", " A  c\n", ""]) == pytest.approx(
        {
            "unique_token_ratio": (0.4 + 1 + 1) / 3,
            "repetition": 0.6 / 3,
            "vocabulary": 3,
            "distinct_words": 3 / 7,
            "distinct_bigrams": 3 / 5,  # ab ba ab ba, ac
        },
        abs=1e-9,
    )
    nothing = {"unique_token_ratio": 1, "repetition": 0, "vocabulary": 0, "distinct_words": 0, "distinct_bigrams": 1}
    assert diversity(["", " "]) == nothing


@pytest.mark.parametrize(
    ("reference", "response", "scores"),
    [
        # the cat on mat: 4 words of 6 and 6, also as a subsequence; the cat: 1 pair of 5 and 5
        ("the cat sat on the mat", " The cat lay on a mat.", (2 / 3, 1 / 5, 2 / 3)),
        # P 4/5, R 4/4; ab: P 1/4, R 1/3; the subsequence ab: P 2/5, R 2/4
        ("a b c d", "d c b a b", (8 / 9, 2 / 7, 4 / 9)),
        ("a film", "films", (0, 0, 0)),  # not stemmed
        ("a film", "", (0, 0, 0)),
        ("a film", "A film!", (1, 1, 1)),
    ],
)
def test_rouge_by_hand(reference, response, scores):
    rows = [{"response": "else", "length": 1}, {"response": response, "length": 2}]
    add_rouge(rows, ["something", reference])
    names = ("rouge1", "rouge2", "rougeL")
    assert [rows[1][name] for name in names] == pytest.approx(scores, abs=1e-9)
    assert {name: rows[1][name] for name in rows[1] if name not in names} == {
        "response": response,
        "length": 2,
        "reference": reference,
    }
    assert rows[0]["rouge1"] == 0


def test_the_likelihood_under_another_model_equals_brute_force(tokenizer):
    """One token at a time, without padding; over more rows than a batch, of unequal lengths."""
    judge, seed = new_policy(tokenizer), torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(2, len(tokenizer), (n,), generator=seed).tolist()

    rows = [{"query_ids": ids(1 + n % 3), "response_ids": ids(1 + n % 4)} for n in range(70)]
    expected = []
    for row in rows:
        total = 0.0
        for t, token in enumerate(row["response_ids"]):
            before = torch.tensor([row["query_ids"] + row["response_ids"][:t]])
            with torch.no_grad():
                total += judge.language_model(before).logits[0, -1].log_softmax(-1)[token].item()
        expected.append(total)
    assert likelihoods_under(judge, rows, tokenizer.pad_token_id) == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------
# Judges
# ----------------------------------------------------------------------------------------------------------------


def test_the_features_are_words_and_neighbouring_pairs_of_three_texts():
    texts = ["It's NOT bad, at all!"] * 3 + ["I saw 2 of it."] * 2
    vectorizer = bag_of_words_judge(texts, [1, 1, 1, 0, 0])[0]
    words, pairs = ["it's", "not", "bad", "at", "all"], ["it's not", "not bad", "bad at", "at all"]
    assert sorted(vectorizer.vocabulary_) == sorted(words + pairs)


def test_the_judge_tells_not_bad_from_bad():
    """Words alone cannot: each of them stands in as many positive texts as negative ones."""
    positive, negative = ["the film is not bad", "the film is good"], ["the film is bad", "the film is not good"]
    judge = bag_of_words_judge((positive + negative) * 100, [1, 1, 0, 0] * 100)
    labels = judge.predict(["it is not bad", "bad", "it is good", "it is not good", "the film is bad"])
    assert labels.tolist() == [1, 0, 1, 0, 0]


def test_the_judge_learns_the_built_in_reviews_and_repeats_itself():
    train, test = movie_reviews(1500, 1), movie_reviews(300, 2)
    texts, labels = ([row[name] for row in train] for name in ("text", "label"))
    held_out, known = ([row[name] for row in test] for name in ("text", "label"))
    judge = bag_of_words_judge(texts, labels)
    assert judge.score(held_out, known) > 0.95
    assert (judge.predict_proba(held_out) == bag_of_words_judge(texts, labels).predict_proba(held_out)).all()


def test_the_judge_has_an_answer_for_words_it_has_never_met():
    judge = bag_of_words_judge(["good film", "bad film"] * 10, [1, 0] * 10)
    assert set(judge.predict(["xyzzy", "", "?"])) <= {0, 1}


def test_texts_in_any_script_have_a_judge_and_too_few_of_them_none(monkeypatch, capsys):
    rows = {"many": [{"text": f"这部 电影 {'好' if label else '坏'}", "label": label} for label in (0, 1)] * 5}
    rows["few"] = rows["many"][:2]
    for name, judged in (("many", True), ("few", False)):
        monkeypatch.setattr("evaluation.load_rows", lambda *_, name=name: rows[name])
        judge = load_text_judge(micro_config(dataset_path="x"))
        assert (judge is not None) == judged
    assert "there is no independent judge of these texts: " in capsys.readouterr().out


def test_data_without_classes_has_no_judge(tmp_path):
    rows = "text,label\n" + "".join(f"Text {number}.,{number % 3}\n" for number in range(60))
    (tmp_path / "three.csv").write_text(rows)
    (tmp_path / "none.csv").write_text(rows.replace("label", "stars"))
    for name in ("three.csv", "none.csv"):
        assert load_text_judge(micro_config(dataset_path=str(tmp_path / name))) is None


# ----------------------------------------------------------------------------------------------------------------
# Policies side by side
# ----------------------------------------------------------------------------------------------------------------


def evaluated(policy, reference, tokenizer, **settings) -> list[dict]:
    """Reward: 2 for every response and its length in characters, halved."""
    terms = {
        "two": lambda prompts, responses, rows: torch.full((len(responses),), 2.0),
        "length": lambda prompts, responses, rows: torch.tensor([float(len(text)) for text in responses]),
    }
    prompts = [Prompt(text[:9], tokenizer(text[:9]).input_ids, {}) for text in review_texts(10)]
    config = micro_config(**{"reward_weights": "length=0.5", "batch_size": 2} | settings)
    return evaluate_policy(policy, Fixed(reference, tokenizer, terms), prompts, config)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_policy_is_evaluated_row_by_row(temperature, tokenizer):
    """Against `score` on each row alone: KL and likelihood of the whole response, the value before its first token.

    A token that the first response has in its middle is made the end, so that some rows are padded and some are not.
    """
    policy, reference = new_policy(tokenizer), new_policy(tokenizer, seed=1)
    torch.nn.init.normal_(policy.value_head.weight)
    middle = evaluated(policy, reference, tokenizer, temperature=temperature)[0]["response_ids"][5]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(middle)
    table = evaluated(policy, reference, tokenizer, temperature=temperature)
    assert {row["ended"] for row in table} == {True, False} and table[0]["length"] <= 6
    assert [row["query"] for row in table] == [text[:9] for text in review_texts(10)]
    for row in table:
        assert row["reward_two"] == 2.0 and row["reward_length"] == len(row["response"])
        assert row["reward"] == pytest.approx(2 + len(row["response"]) / 2, abs=1e-4)
        assert row["length"] == len(row["response_ids"]) <= 12
        assert row["ended"] == (row["response_ids"][-1] == tokenizer.eos_token_id)
        query, response = torch.tensor([row["query_ids"]]), torch.tensor([row["response_ids"]])
        masks = [torch.ones_like(ids, dtype=torch.bool) for ids in (query, response)]
        with torch.no_grad():
            scores, others = (
                model.score(query, masks[0], response, masks[1], temperature) for model in (policy, reference)
            )
        assert row["kl"] == pytest.approx((scores.logprobs - others.logprobs).sum().item(), abs=1e-4)
        assert row["reference_logprob"] == pytest.approx(others.logprobs.sum().item(), abs=1e-4)
        assert row["value"] == pytest.approx(scores.values[0, 0].item(), abs=1e-4)


@pytest.mark.parametrize(("family", "text"), [("gpt2", "cffa"), ("t5", "cf\nfa")])
def test_a_judge_is_given_prompt_and_response_as_the_policys_family_has_them(family, text, monkeypatch):
    """A causal model goes on from its prompt, an encoder-decoder answers on a line of its own."""
    policy, tokenizer = tiny_policy(family), letter_tokenizer()
    real = evaluation.respond
    monkeypatch.setattr(evaluation, "respond", lambda *args: real(*args)._replace(texts=["fa"]))
    fixed = Fixed(policy, tokenizer, {"one": lambda prompts, responses, rows: torch.ones(len(responses))})
    (row,) = evaluate_policy(policy, fixed, [Prompt("cf", [4, 7], {})], micro_config(reward_weights="one=1"))
    assert (row["query"], row["response"], row["text"]) == ("cf", "fa", text)


def test_two_policies_draw_with_the_same_random_numbers(tokenizer):
    """So that equal policies give equal responses; and the seed decides them."""
    policy = new_policy(tokenizer)
    table = evaluated(policy, policy, tokenizer)
    assert table == evaluated(new_policy(tokenizer), policy, tokenizer)
    assert {row["kl"] for row in table} == {0.0}
    assert [row["response"] for row in table] != [
        row["response"] for row in evaluated(policy, policy, tokenizer, seed=1)
    ]


def test_an_evaluation_draws_alike_whatever_the_batches_are(tokenizer):
    """Two evaluations are paired: prompt i has the same random numbers in each, in batches of any size."""
    policy, reference = new_policy(tokenizer), new_policy(tokenizer, seed=1)
    table = evaluated(policy, reference, tokenizer)
    assert len({row["response"] for row in table}) > 5
    for batch_size in (2, 10, 64):
        again = evaluated(policy, reference, tokenizer, batch_size=batch_size)
        assert [row["response_ids"] for row in again] == [row["response_ids"] for row in table]


def test_every_prompt_of_an_evaluation_has_random_numbers_of_its_own(tokenizer, monkeypatch):
    """Prompt i has row i of the evaluation's, in whichever batch it is."""
    seen, real = [], evaluation.respond

    def respond(policy, tokenizer, prompts, numbers, config):
        seen.append(numbers)
        return real(policy, tokenizer, prompts, numbers, config)

    monkeypatch.setattr(evaluation, "respond", respond)
    policy = new_policy(tokenizer)
    evaluated(policy, policy, tokenizer, batch_size=4, seed=5)
    assert [len(numbers) for numbers in seen] == [4, 4, 2]
    assert torch.equal(torch.cat(seen), uniforms(5, "evaluation", 0, (10, 12)))


def row(query: str, response: str, reward: float, length: int, **changes) -> dict:
    """A row as `evaluate_policy` makes it: two terms, value half the reward, likelihood 1/2 a token."""
    numbers = {"reward": reward, "reward_fn": reward + 1, "value": reward / 2, "length": length, "ended": True}
    logprobs = {"kl": 0.5, "reference_logprob": -length * math.log(2)}
    return {"query": query, "response": response, "text": query + response} | numbers | logprobs | changes


def test_the_summary_of_a_policy_by_hand():
    """Perplexity is of all tokens together, (5 log 2 + 9 log 2) / 7; the judge reads prompt and response."""
    table = [
        row("A", " b c b c", 1.0, 4, reference_logprob=-5 * math.log(2)),
        row("D", " b c", 2.0, 3, reference_logprob=-9 * math.log(2), kl=-0.1, ended=False, reward_fn=6.0),
    ]
    read = []

    def predict(texts):
        read.extend(texts)
        return np.array([1, 0])

    judge = SimpleNamespace(predict=predict)
    before = summarise(table)
    add_judgements(table, judge, None, 0)
    figures = {
        **{"reward": 1.5, "reward_std": 0.5, "reward_min": 1, "reward_max": 2},
        **{"reward_fn": 4, "reward_fn_std": 2, "reward_fn_min": 2, "reward_fn_max": 6},
        **{"value": 0.75, "value_std": 0.25, "value_min": 0.5, "value_max": 1},
        **{"length": 3.5, "length_std": 0.5, "length_min": 3, "length_max": 4},
        **{"unique_token_ratio": 0.75, "repetition": 0.25, "vocabulary": 2},
        **{"distinct_words": 1 / 3, "distinct_bigrams": 0.5, "ended": 0.5, "kl": 0.2, "reference_perplexity": 4},
    }
    assert summarise(table) == pytest.approx(figures | {"positive": 0.5}, abs=1e-9)
    assert read == ["A b c b c", "D b c"]
    assert before == pytest.approx(figures, abs=1e-9)


def test_the_summary_has_the_perplexity_to_the_fluency_judge(monkeypatch):
    """Of all tokens together: exp((4 log 2 + 8 log 4) / 12)."""
    monkeypatch.setattr("evaluation.likelihoods_under", lambda judge, rows, pad_id: [judge * 4, judge * 16])
    table = [row("A", " b c", 1.0, 4), row("B", " b c", 1.0, 8)]
    add_judgements(table, None, -math.log(2), 1)
    assert summarise(table)["perplexity"] == pytest.approx(2 ** (20 / 12))


# ----------------------------------------------------------------------------------------------------------------
# Intervals and paired differences
# ----------------------------------------------------------------------------------------------------------------

WITHOUT = {"vocabulary", "distinct_words", "distinct_bigrams"}  # figures of all responses together


def many_rows(n: int = 200, shift: float = 0.0) -> list[dict]:
    """Rows with all that an evaluation measures, the same random numbers for any shift of what they measure."""
    rng = np.random.default_rng(0)
    table = []
    for i in range(n):
        reward, length, chance = rng.normal(shift), int(rng.integers(2, 20)), rng.random()
        logprobs = {"reference_logprob": -length * (1 + chance + shift), "judge_logprob": -length * (2 + chance)}
        judged = {"positive": chance < 0.3 + shift, "ended": chance < 0.8, "kl": chance + shift}
        table.append(row(str(i), " a b" if chance < 0.5 else " a a", reward, length, **logprobs, **judged))
    return table


def test_every_mean_has_an_interval_and_a_paired_difference():
    """Figures of all responses together have none."""
    first, other = many_rows(), many_rows(shift=0.1)
    figures = {name for name in summarise(first) if not name.endswith(("_std", "_min", "_max"))}
    assert set(intervals_of(first)) == set(paired_differences(first, other)) == figures - WITHOUT


def test_intervals_are_about_their_figures_and_of_the_known_width():
    """1.96 standard errors of a mean; Wilson's of a share; of a perplexity by the delta method, as lengths differ."""
    table = many_rows()
    figures, found = summarise(table), intervals_of(table)
    for name in ("reward", "length"):
        half = 1.96 * figures[f"{name}_std"] / math.sqrt(200)
        assert found[name] == pytest.approx((figures[name] - half, figures[name] + half), abs=0.15 * half)
    assert found["ended"] == wilson_interval(sum(row["ended"] for row in table), 200)
    lengths = np.array([row["length"] for row in table])
    nats = -np.array([row["judge_logprob"] for row in table])
    perplexity = math.exp(nats.sum() / lengths.sum())
    errors = (nats - lengths * nats.sum() / lengths.sum()) / lengths.mean()
    half = 1.96 * perplexity * errors.std() / math.sqrt(200)
    assert figures["perplexity"] == pytest.approx(perplexity)
    assert found["perplexity"] == pytest.approx((perplexity - half, perplexity + half), abs=0.15 * half)


def test_paired_differences_are_those_of_the_same_prompts():
    """Other minus first: where every row moves alike, the difference is certain, whatever the spread."""
    first, other = many_rows(), many_rows(shift=0.5)
    paired = paired_differences(first, other)
    assert paired["reward"] == pytest.approx({"difference": 0.5, "low": 0.5, "high": 0.5}, abs=1e-9)
    assert paired["kl"] == pytest.approx({"difference": 0.5, "low": 0.5, "high": 0.5}, abs=1e-9)
    two = [row("A", " b", 1.0, 2), row("B", " b", 3.0, 4)]
    longer = [row("A", " b", 0.5, 2), row("B", " b", 2.5, 5)]
    assert paired_differences(two, longer)["length"] == pytest.approx(
        {"difference": 0.5, "low": 0, "high": 1}, abs=1e-9
    )


def test_a_paired_difference_of_shares_counts_the_rows_that_changed():
    first, other = many_rows(), many_rows(shift=0.5)
    gained = sum(b["positive"] and not a["positive"] for a, b in zip(first, other, strict=True))
    paired = paired_differences(first, other)["positive"]
    assert paired["difference"] == pytest.approx(gained / 200) and 80 < gained < 120
    assert (paired["low"], paired["high"]) == paired_share_interval(gained=gained, lost=0, n=200)
    back = paired_differences(other, first)["positive"]
    assert (back["low"], back["high"]) == paired_share_interval(gained=0, lost=gained, n=200)


def test_a_paired_difference_of_perplexities_draws_a_prompt_for_both():
    """Every token is exp(.1) times less likely: a factor on each resample's perplexity, and so of its difference."""
    first, other = many_rows(), many_rows(shift=0.1)
    paired, low_and_high = paired_differences(first, other)["reference_perplexity"], intervals_of(first)
    expected = np.array(low_and_high["reference_perplexity"]) * (math.exp(0.1) - 1)
    assert (paired["low"], paired["high"]) == pytest.approx(tuple(expected), rel=1e-9)


def test_policies_stand_side_by_side_and_the_difference_is_last_minus_first():
    tables = {
        name: [row("A", f" {name}.", reward, 3), row("B", f" {name}!", reward + shift, 4)]
        for name, reward, shift in (("base", 1.0, 1.0), ("sft", 7.0, 1.0), ("ppo", 1.5, 3.0))
    }
    table = side_by_side(tables)
    names = ("response", "reward", "reward_fn", "value", "length")
    columns = [f"{name}_{policy}" for name in names for policy in ("base", "sft", "ppo")]
    assert [list(line) for line in table] == [["query", *columns, "reward_diff"]] * 2
    assert [line["response_sft"] for line in table] == [" sft.", " sft!"]
    assert [line["value_ppo"] for line in table] == [0.75, 2.25]
    assert [line["reward_diff"] for line in table] == [0.5, 2.5]
    for rows in tables.values():
        add_rouge(rows, ["base", "ppo"])
    line = side_by_side(tables)[1]
    assert list(line)[:2] == ["query", "reference"] and (line["reference"], line["rougeL_ppo"]) == ("ppo", 1)


def test_a_comparison_holds_every_policy_its_difference_from_the_first_and_samples():
    tables = {
        name: [row(str(number), f" {name}", reward + number, 3) for number in range(7)]
        for name, reward in (("base", 1.0), ("sft", 3.0), ("ppo", 0.5))
    }
    comparison = compare(tables)
    assert set(comparison) == {"n_prompts", "figures", "intervals", "differences", "samples"}
    assert comparison["n_prompts"] == 7 and comparison["intervals"]["ppo"] == intervals_of(tables["ppo"])
    assert [own["reward"] for own in comparison["figures"].values()] == pytest.approx([4.0, 6.0, 3.5])
    shifts = {name: paired["reward_fn"]["difference"] for name, paired in comparison["differences"].items()}
    assert shifts == pytest.approx({"sft": 2.0, "ppo": -0.5})
    assert [line["query"] for line in comparison["samples"]] == list("01234")
    assert comparison["samples"] == side_by_side(tables)[:5]


def test_policies_are_named_by_flags_or_are_the_runs_start_and_end():
    config = micro_config(task="evaluate", output_dir="run")
    assert list(policy_paths(config, "start").items()) == [("before", "start"), ("after", "run")]
    named = micro_config(policies=("base=gpt2", "b=a=c/d"))
    assert list(policy_paths(named, "start").items()) == [("base", "gpt2"), ("b", "a=c/d")]


@pytest.mark.parametrize("entries", [("gpt2",), ("=gpt2",), ("base=",), ("base=gpt2", "base=run")])
def test_policies_without_a_name_or_a_folder_or_with_the_same_name_are_refused(entries):
    with pytest.raises(UsageError, match=f"--policies {entries[-1]!r}: expected NAME=FOLDER_OR_ID"):
        policy_paths(micro_config(policies=entries), "start")


def test_an_evaluation_takes_the_place_of_an_earlier_one(tmp_path):
    """Of its other split and its other data, too; what is not an evaluation's stays."""
    tables = {name: [row("A", f" {name}", 1.0, 3), row("B", " b", 2.0, 3)] for name in ("before", "after")}
    comparison = {"policies": {"before": "a", "after": "b"}}
    write_results(tmp_path, comparison, {"validation": tables, "test": tables}, "reviews")
    (tmp_path / "notes.csv").write_text("mine")
    both = {"comparison.json", "samples.csv", "notes.csv", "val_results_reviews.csv", "test_results_reviews.csv"}
    assert {path.name for path in tmp_path.iterdir()} == both
    write_results(tmp_path, comparison, {"test": tables}, "imdb")
    left = {"comparison.json", "samples.csv", "notes.csv", "test_results_imdb.csv"}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert len(read_table(tmp_path / "samples.csv")) == 2


def test_an_evaluation_says_how_far_it_is_with_the_numbers_that_matter(tokenizer, monkeypatch):
    """10 prompts in batches of 4: the means over all rows so far."""
    told = []

    @contextmanager
    def progress(total: int, name: str, unit: str):
        told.append((total, name, unit))
        yield lambda numbers, count: told.append((numbers, count))

    monkeypatch.setattr(evaluation, "progress", progress)
    table = evaluated(new_policy(tokenizer), new_policy(tokenizer, seed=1), tokenizer, batch_size=4)
    start, *batches = told
    assert start == (10, "evaluation", "prompt") and [count for _, count in batches] == [4, 4, 2]
    for done, (numbers, _) in zip((4, 8, 10), batches, strict=True):
        means = {name: np.mean([row[name] for row in table[:done]]) for name in ("reward", "kl", "length", "ended")}
        assert numbers == {
            "reward": f"{means['reward']:.2f}",
            "kl": f"{means['kl']:.2f}",
            "length": f"{means['length']:.0f}",
            "eos": f"{means['ended']:.0%}",
        }
