"""The generated reviews: varied, well formed, neutral at first, clear in the end."""

import collections
import functools
import itertools
import math
import random
import re
import time

import pytest

import reviews

SIZE = 20_000
NEGATION = r"\b(not|no|never|nobody|nothing|cannot)\b"
CONTRAST = r"\b(but|although|though|yet|still|even so)\b"


@functools.cache
def corpus() -> list[dict]:
    return reviews.movie_reviews(SIZE, seed=1)


@functools.cache
def corpus_words() -> list[list[str]]:
    return [words(review["text"]) for review in corpus()]


def some_texts() -> list[str]:
    return [review["text"] for review in corpus()[:4000]]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.?]) ", text)


def share(flags) -> float:
    flags = list(flags)
    return sum(map(bool, flags)) / len(flags)


def tokens(text: str, first: int | None) -> set:
    """Returns the words and the pairs of neighbours of a text, or of its first words only."""
    start = words(text)[:first]
    return {*start, *itertools.pairwise(start)}


def fit_judge(train: list[dict], first: int | None = None):
    """Fits naive Bayes to whole reviews or to their first words; returns the function of its accuracy."""
    counts = (collections.Counter(), collections.Counter())
    for review in train:
        counts[review["label"]].update(tokens(review["text"], first))
    weights = {t: math.log((counts[1][t] + 1) / (counts[0][t] + 1)) for t in counts[0] | counts[1]}

    def accuracy(test: list[dict]) -> float:
        scores = (sum(weights.get(token, 0) for token in tokens(r["text"], first)) for r in test)
        return share((score > 0) == r["label"] for score, r in zip(scores, test, strict=True))

    return accuracy


@functools.cache
def judge():
    return fit_judge(corpus()[:6000])


def test_labels_are_balanced_and_every_review_has_text_and_label():
    assert len(corpus()) == SIZE
    assert all(set(review) == {"text", "label"} and review["label"] in (0, 1) for review in corpus())
    assert 0.48 < share(review["label"] for review in corpus()) < 0.52


def test_texts_are_distinct_within_and_across_seeds():
    texts = {review["text"] for review in corpus()}
    assert len(texts) > 19_000
    other = reviews.movie_reviews(2000, seed=2)
    assert share(review["text"] in texts for review in other) < 0.02


def test_no_eight_words_running_are_common():
    runs = collections.Counter()
    for text in corpus_words()[:6000]:
        runs.update({" ".join(text[i : i + 8]) for i in range(len(text) - 7)})
    assert max(runs.values()) < 0.025 * 6000


def test_lengths_and_vocabulary():
    lengths = [len(text) for text in corpus_words()]
    assert 28 < sum(lengths) / SIZE < 34
    assert share(length > 60 for length in lengths) < 0.01
    assert share(length < 8 for length in lengths) < 0.01
    counts = collections.Counter(len(sentences(review["text"])) for review in corpus())
    assert set(counts) == {1, 2, 3, 4, 5}
    assert min(counts.values()) > 0.03 * SIZE and max(counts.values()) < 0.5 * SIZE
    assert 600 <= len({word for text in corpus_words() for word in text}) <= 1000


def test_text_is_well_formed():
    for text in some_texts():
        assert re.fullmatch(r"[A-Za-z',;.? ]+", text), text  # no slot, bracket or slash is left over
        assert not re.search(r"  | [.,;?]|[.,;?]{2}|\ba [aeiou]|\ban [^aeiou]", text, re.IGNORECASE), text
        assert text[-1] in ".?" and all(sentence[0].isupper() for sentence in sentences(text)), text
        assert not re.search(r"\b(\w+) \1\b", text, re.IGNORECASE), text


def test_a_review_repeats_no_sentence_and_keeps_to_one_film():
    single = ["|".join(reviews.RULES[0][rule][0]) for rule in ("genre", "director", "friend", "name")]
    names = {name.lower() for name in reviews.RULES[0]["name"][0]}
    women = {"she", "her"} | {name for name in names if name.endswith("a")}
    men = {"he", "his"} | names - women
    for text in some_texts():
        parts = sentences(text)
        assert len(set(parts)) == len(parts), text
        story = re.sub(r"bury (her|his) brother|meant for a neighbour", "", text)  # other people's relatives
        for choices in single:
            assert len(set(re.findall(rf"\b({choices})\b", story))) <= 1, text
        said = set(words(text))
        assert not (said & women and said & men), text


def test_openings_vary():
    prefixes = collections.Counter(tuple(text[:3]) for text in corpus_words())
    assert max(prefixes.values()) < 0.03 * SIZE
    assert len(prefixes) > 500


def test_first_words_say_little_and_the_whole_review_tells():
    test = corpus()[6000:9000]
    assert fit_judge(corpus()[:6000], first=6)(test) < 0.62
    assert judge()(test) > 0.96


def test_neutral_rules_are_the_same_for_both_labels_and_negate_nothing():
    neutral = ["plan", "plot", "sequel", "fact", "cinema visit", "home visit", *reviews.WORDS[:-3]]
    neutral += [rule for rule in reviews.RULES[0] if rule.endswith((" lead", " place", " deed"))]
    for rule in neutral:
        plain, negated = reviews.RULES[0][rule]
        assert reviews.RULES[1][rule] == (plain, negated) and plain and not negated, rule


def test_both_labels_have_as_many_templates_of_every_rule():
    negative, positive = reviews.RULES
    assert set(negative) == set(positive)
    for rule in negative:
        assert sum(map(len, negative[rule])) == sum(map(len, positive[rule])), rule


@pytest.mark.parametrize("kind, low, high", [("mixed", 0.15, 0.25), ("negated", 0.25, 0.35)])
def test_a_kind_is_the_part_of_the_corpus_that_is_of_it(kind, low, high):
    texts = [review["text"] for review in corpus()]
    chosen = [review["text"] for review in reviews.movie_reviews(500, seed=1, kind=kind)]
    position = -1
    for text in chosen:
        position = texts.index(text, position + 1)
    assert low < len(chosen) / (position + 1) < high
    if kind == "negated":
        assert chosen == [text for text in texts[: position + 1] if re.search(NEGATION, text, re.IGNORECASE)]


@pytest.mark.parametrize("kind, pattern, accuracy", [("mixed", CONTRAST, 0.88), ("negated", NEGATION, 0.93)])
def test_kinds_show_in_the_text_and_their_label_is_clear(kind, pattern, accuracy):
    chosen = reviews.movie_reviews(600, seed=3, kind=kind)
    assert all(re.search(pattern, review["text"], re.IGNORECASE) for review in chosen)
    assert 0.44 < share(review["label"] for review in chosen) < 0.56
    assert judge()(chosen) > accuracy


def test_mixed_reviews_hold_both_sides():
    counts = collections.defaultdict(lambda: [0, 0])
    pure = [r for r in corpus()[:5000] if not re.search(CONTRAST, r["text"], re.IGNORECASE)]
    for review in pure:
        for word in set(words(review["text"])):
            counts[word][review["label"]] += 1
    telling = {word: n[1] > n[0] for word, n in counts.items() if sum(n) > 20 and max(n) > 4 * min(n)}

    def two_sided(part: list[dict]) -> float:
        return share(len({telling[w] for w in words(r["text"]) if w in telling}) == 2 for r in part)

    assert two_sided(reviews.movie_reviews(300, seed=3, kind="mixed")) > 0.8
    assert two_sided(pure) < 0.4


def test_both_labels_use_negations():
    for label in (0, 1):
        texts = [review["text"] for review in corpus()[:4000] if review["label"] == label]
        assert 0.2 < share(re.search(NEGATION, text, re.IGNORECASE) for text in texts) < 0.4


def test_same_seed_same_reviews_and_a_longer_list_starts_with_the_shorter():
    state = random.getstate()
    assert reviews.movie_reviews(200, seed=5) == reviews.movie_reviews(200, seed=5)
    assert reviews.movie_reviews(100, seed=5) == reviews.movie_reviews(200, seed=5)[:100]
    assert reviews.movie_reviews(50, 5, "mixed") == reviews.movie_reviews(90, 5, "mixed")[:50]
    assert reviews.movie_reviews(100, seed=5) != reviews.movie_reviews(100, seed=6)
    assert reviews.movie_reviews(0, seed=5) == []
    assert random.getstate() == state


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match=r"mixed.*negated.*'neutral'"):
        reviews.movie_reviews(3, seed=0, kind="neutral")


def test_generation_is_fast():
    start = time.process_time()
    reviews.movie_reviews(1000, seed=7)
    assert time.process_time() - start < 1
