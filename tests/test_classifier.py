"""The reward stage: labelled texts, pairs of answers, and how certain the result is."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from micro import micro_config, review_texts
from tiny_models import letter_tokenizer
from transformers import AutoModelForSequenceClassification

import classifier
import dataset
from classifier import (
    bradley_terry_loss,
    class_batches,
    classifier_batch,
    cut_short,
    held_out_predictions,
    pair_batches,
    pair_loss,
    pair_texts,
    predictions,
    run_reward,
    told_accuracy,
)
from config import UsageError
from folders import notice
from probe import special_ends
from sft import new_tokenizer

pytest_plugins = ["micro"]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("end", "kept"), [(0.01, 1), (0.1, 1), (0.11, 2), (0.95, 10), (0.999, 10)])
def test_a_text_is_cut_at_a_share_of_its_tokens_or_not_at_all(end, kept):
    """Of ten tokens: one for end from 0 to 1/10, two to 2/10, ...; where `whole` is below a half, all."""
    ids = list(range(10))
    assert cut_short(ids, 100, whole=0.5, end=end) == ids[:kept]
    assert cut_short(ids, 100, whole=0.49, end=end) == ids


def test_a_long_text_keeps_its_last_tokens():
    ids = list(range(10))
    assert cut_short(ids, 3, whole=0.0, end=0.0) == [7, 8, 9]
    assert cut_short(ids, 3, whole=0.9, end=0.45) == [2, 3, 4]
    assert cut_short(ids, 3, whole=0.9, end=0.15) == [0, 1]


def test_half_of_the_texts_of_class_batches_are_cut_short_at_any_length():
    """Of ten tokens, all are kept with probability 1/2 + 1/2 x 1/10, and any other number with 1/20."""
    rows = [{"text": "abcdefghij", "label": n % 2} for n in range(100)]
    config = micro_config(reward_batch_size=100)
    batches = class_batches(rows=rows, config=config, tokenizer=Letters(), length=100, device=CPU)
    lengths = []
    for batch in itertools.islice(batches, 40):
        whole = batch["input_ids"].shape[1] - 2
        assert whole == 10
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            start, *cut, end = ids[mask.bool()].tolist()
            assert (start, end) == (90, 91) and cut == list(range(10, 10 + len(cut)))
            lengths.append(len(cut))
    shares = [lengths.count(kept) / len(lengths) for kept in range(1, 11)]
    assert shares[-1] == pytest.approx(0.55, abs=0.03)
    assert shares[:-1] == pytest.approx([0.05] * 9, abs=0.015)


def test_class_batches_keep_texts_and_labels_together_and_repeat_with_their_seed():
    def draw(seed: int) -> list[dict]:
        rows = [{"text": letter * 8, "label": n % 2} for n, letter in enumerate("abcdefghij")]
        config = micro_config(reward_batch_size=4, seed=seed)
        batches = class_batches(rows=rows, config=config, tokenizer=Letters(), length=3, device=CPU)
        return list(itertools.islice(batches, 6))

    for batch in draw(0):
        assert (batch["input_ids"][:, 1] % 2).tolist() == batch["labels"].tolist()  # "a" is 10, "b" is 11, ...
    ids = [[batch["input_ids"].tolist() for batch in draw(seed)] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


def test_where_texts_are_cut_is_drawn_by_the_seed():
    """Of one text alone, whose order cannot differ."""

    def lengths(seed: int) -> list[int]:
        config = micro_config(reward_batch_size=1, seed=seed)
        rows = [{"text": "abcdefghij", "label": 0}]
        batches = class_batches(rows=rows, config=config, tokenizer=Letters(), length=100, device=CPU)
        return [batch["input_ids"].shape[1] for batch in itertools.islice(batches, 20)]

    assert lengths(0) == lengths(0) != lengths(1)


SEVEN = 24  # the id of "7" for `digits`


@pytest.fixture(scope="module")
def digits():
    """One token a letter or space, of which the last three are read."""
    tokenizer = new_tokenizer(["z"], 300, 3)
    assert tokenizer("17").input_ids[1] == SEVEN
    return tokenizer


class ContainsSeven:
    """Predicts label 1 for a text with a 7 in it."""

    device = CPU
    config = SimpleNamespace(num_labels=2)

    def __call__(self, input_ids, attention_mask):
        positive = ((input_ids == SEVEN) & attention_mask.bool()).any(1)
        return SimpleNamespace(logits=torch.stack([~positive, positive], dim=1).float())


class Letters:
    """One token a letter, with a special token, 90, before every text and 91 behind it where they are asked for."""

    pad_token_id = 0

    def __call__(self, texts, add_special_tokens=True):
        if isinstance(texts, str):
            return SimpleNamespace(input_ids=self.encode(texts, add_special_tokens))
        return SimpleNamespace(input_ids=[self.encode(text, add_special_tokens) for text in texts])

    def encode(self, text, add_special_tokens):
        ids = [int(letter, 36) for letter in text]
        return [90, *ids, 91] if add_special_tokens else ids


def test_special_tokens_at_both_ends_are_found():
    assert special_ends(Letters()) == ([90], [91])
    assert special_ends(letter_tokenizer()) == ([], [])


def test_predictions_by_hand():
    """Certainties e / (1 + e) and 2 / 3; of two labels as likely as each other, it is the first."""
    logits = torch.tensor([[0.0, 1.0], [0.6931472, 0.0], [5.0, 5.0], [5.0, 5.0]])
    probability, right = predictions(logits, [1, 1, 1, 0])
    assert probability.tolist() == pytest.approx([0.7310586, 2 / 3, 0.5, 0.5], abs=1e-6)
    assert right.tolist() == [True, False, False, True]


def test_classifier_batches_keep_texts_and_labels_together():
    batch = classifier_batch([[5, 6], [7]], [1, 0], 9, CPU)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6], [7, 9]],
        "attention_mask": [[1, 1], [1, 0]],
        "labels": [1, 0],
    }


def test_held_out_accuracy_is_measured_on_whole_texts_and_on_first_halves(digits):
    """The sevens stand at the end: seen in whole texts, of which the last three tokens are read, not in first halves.

    Over more texts than a batch holds; the logits are 0 and 1, so the certainty is e / (1 + e).
    """
    labelled = [("1 1 1 7", 1), ("7 1 1 1 1", 0), ("1\n1", 0), ("1 1 7 1", 1)] * 30
    rows = [{"text": text, "label": label} for text, label in labelled]
    (probability, right), figures = held_out_predictions(micro_config(), ContainsSeven(), digits, rows)
    assert probability.tolist() == pytest.approx([0.7310586] * 120, abs=1e-6)
    assert right.tolist() == [True] * 120
    assert figures == {"accuracy": 1.0, "accuracy_on_first_halves": 0.5}


def test_the_first_half_of_an_odd_number_of_words_has_the_middle_one(digits):
    rows = [{"text": text, "label": 1} for text in ("1 7 1", "7", "1 1 7")]
    _, figures = held_out_predictions(micro_config(), ContainsSeven(), digits, rows)
    assert figures == {"accuracy": 1.0, "accuracy_on_first_halves": pytest.approx(2 / 3)}
    assert told_accuracy(n_rows=3, **figures) == "100.0% on whole texts, 66.7% on their first halves"


def test_labels_that_are_true_and_false_are_refused():
    with pytest.raises(UsageError, match=r"--label_column 'label' holds \[False, True\], expected 0, 1"):
        classifier.class_names([{"label": True}, {"label": False}], micro_config())


# ----------------------------------------------------------------------------------------------------------------
# Pairs
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "loss", "gradient"),
    [(0.0, 0.693147, -0.5), (1.0, 0.313262, -0.268941), (2.0, 0.126928, -0.119203), (-2.0, 2.126928, -0.880797)],
)
def test_the_bradley_terry_loss_in_closed_form(difference, loss, gradient):
    """-log σ(Δ), and its derivative by the chosen reward, -σ(-Δ); a constant added to both changes nothing."""
    chosen = torch.tensor([difference + 3.0], requires_grad=True)
    value = bradley_terry_loss(chosen, torch.tensor([3.0]))
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert chosen.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_the_bradley_terry_loss_stays_finite_far_out():
    assert bradley_terry_loss(torch.tensor([-1000.0]), torch.tensor([0.0])).item() == pytest.approx(1000.0, abs=1e-3)


class CountsSevens:
    """A reward of 1 for every 7 in a text."""

    device = CPU
    config = SimpleNamespace(num_labels=1)

    def __call__(self, input_ids, attention_mask, labels=None):
        return SimpleNamespace(logits=((input_ids == SEVEN) & attention_mask.bool()).sum(1, keepdim=True).float())


def test_the_first_half_of_a_batch_of_pairs_is_the_chosen_one():
    """Two pairs with Δ = 2 and Δ = -1: (log(1 + exp(-2)) + log(1 + e)) / 2."""
    batch = classifier_batch([[SEVEN, SEVEN], [1], [1], [SEVEN]], [0] * 4, 0, CPU)
    assert pair_loss(CountsSevens(), batch).item() == pytest.approx((0.126928 + 1.313262) / 2, abs=1e-6)


PAIRED = {"chosen_column": "good", "rejected_column": "bad"}


def test_predictions_of_pairs_by_hand(digits):
    """σ(2), σ(1) for the wrong one, and of two answers that are worth the same none is preferred; the prompt is cut."""
    rows = [
        {"text": "7777", "good": good, "bad": bad} for good, bad in [("177", "111"), ("111", "711"), ("117", "711")]
    ]
    (probability, right), figures = held_out_predictions(micro_config(**PAIRED), CountsSevens(), digits, rows)
    assert right.tolist() == [True, False, False]
    assert probability.tolist() == pytest.approx([0.880797, 0.731059, 0.5], abs=1e-6)
    assert figures == {"accuracy": pytest.approx(1 / 3)}
    assert told_accuracy(n_rows=3, **figures) == "33.3% of 3 pairs"


def test_pairs_share_their_prompt(tokenizer):
    row = {"text": "Which film?", "good": "This one.", "bad": "None."}
    sides = pair_texts([row, row | {"good": "It."}], micro_config(**PAIRED), tokenizer)
    assert sides == (["Which film?\nThis one.", "Which film?\nIt."], ["Which film?\nNone."] * 2)


@pytest.mark.parametrize("length", [100, 3])
def test_a_batch_of_pairs_is_the_chosen_texts_then_the_rejected_ones_of_the_same_rows(length, tokenizer):
    """Each row once a pass; of a long text the last tokens."""
    rows = [{"text": f"Film {n}:", "good": f"good {n}", "bad": f"bad {n}"} for n in range(6)]
    config = micro_config(**PAIRED, reward_batch_size=2)
    batches = pair_batches(rows=rows, config=config, tokenizer=tokenizer, length=length, device=CPU)
    seen = []
    for batch in [next(batches) for _ in range(3)]:
        texts = [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        numbers = [int(tokenizer.decode(ids)[-1]) for ids in texts]
        assert numbers[:2] == numbers[2:]
        seen += numbers[:2]
        whole = [f"Film {n}:\n{'good' if i < 2 else 'bad'} {n}" for i, n in enumerate(numbers)]
        assert texts == [tokenizer(text).input_ids[-length:] for text in whole]
    assert sorted(seen) == list(range(6))


def test_the_order_of_pairs_is_drawn_by_the_seed(tokenizer):
    rows = [{"text": f"Film {n}:", "good": "good", "bad": "bad"} for n in range(6)]

    def order(seed: int) -> list[str]:
        config = micro_config(**PAIRED, reward_batch_size=1, seed=seed)
        batches = pair_batches(rows=rows, config=config, tokenizer=tokenizer, length=100, device=CPU)
        return [tokenizer.decode(next(batches)["input_ids"][0]) for _ in range(6)]

    assert order(0) == order(0) != order(1)


def test_a_reward_model_learns_which_answer_is_preferred(chain, tmp_path):
    """The chosen answers call the film good; on held-out pairs, the model knows."""
    rows = [{"text": text[:20], "chosen": " It is good.", "rejected": " It is bad."} for text in review_texts()]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    config = micro_config(
        task="reward",
        dataset_path=str(tmp_path / "pairs.json"),
        chosen_column="chosen",
        reward_steps=40,
        reward_learning_rate=1e-2,
        output_dir=str(tmp_path / "reward"),
    )
    folder = run_reward(config, str(chain.root / "saved_models/tiny/sft"))
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "REWARD"}
    assert (folder / "plots/reliability.png").exists()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = classifier.load_tokenizer(str(folder))
    (_, right), _ = held_out_predictions(config, model, tokenizer, rows[:20])
    assert right.float().mean() > 0.9
    tokenizer.model_max_length = 48
    _, figures = held_out_predictions(config, model, tokenizer, dataset.load_rows(config, "validation"))
    record = json.loads((folder / "stage.json").read_text())
    assert record["held_out"]["rows"] == 20 and record["held_out"]["accuracy"] == figures["accuracy"]
    assert record["trained_on"]["columns"] == ["text", "chosen", "rejected"]


@pytest.mark.parametrize(("chosen", "n_labels"), [("chosen", 2), ("", 3)])
def test_the_reliability_axis_begins_where_the_labels_let_it(chosen, n_labels, chain, tmp_path, monkeypatch):
    """Pairs have two outcomes, though the model has one output; here are three classes."""
    answers = {"chosen": " Yes.", "rejected": " No."}
    rows = [{"text": text[:20], "label": n % 3} | answers for n, text in enumerate(review_texts(60))]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    drawn = []
    monkeypatch.setattr(classifier, "plot_reliability", lambda *_, **options: drawn.append(options))
    data = {"dataset_path": str(tmp_path / "rows.json"), "chosen_column": chosen}
    config = micro_config(task="reward", reward_steps=1, output_dir=str(tmp_path / "reward"), **data)
    run_reward(config, str(chain.root / "saved_models/tiny/sft"))
    assert drawn == [{"n_labels": n_labels, "notice": notice(config)}]


@pytest.mark.parametrize(("n_right", "is_told"), [(5, True), (10, True), (18, False)])
def test_a_reward_model_that_may_only_guess_is_told_on(n_right, is_told, chain, tmp_path, monkeypatch, capsys):
    is_right = torch.arange(20) < n_right
    results = classifier.Predictions(certainty=torch.ones(20), is_right=is_right)
    monkeypatch.setattr(classifier, "held_out_predictions", lambda *_: (results, {"accuracy": n_right / 20}))
    monkeypatch.setattr(classifier, "plot_reliability", lambda *_, **named: "")
    config = micro_config(task="reward", reward_steps=1, output_dir=str(tmp_path / "reward"))
    run_reward(config, str(chain.root / "saved_models/tiny/sft"))
    assert ("warning: the reward model may be no better than chance" in capsys.readouterr().out) == is_told


def test_held_out_texts_are_cut_to_the_length_that_was_learned(chain, tmp_path, monkeypatch):
    """20 tokens here, where the model could read 48."""
    lengths, nothing = [], classifier.Predictions(certainty=torch.ones(2), is_right=torch.ones(2, dtype=torch.bool))
    monkeypatch.setattr(
        classifier,
        "held_out_predictions",
        lambda config, model, tokenizer, *_: (lengths.append(tokenizer.model_max_length), (nothing, {"accuracy": 1.0}))[
            1
        ],
    )
    monkeypatch.setattr(classifier, "plot_reliability", lambda *_, **named: "")
    config = micro_config(task="reward", context_length=20, output_dir=str(tmp_path / "reward"))
    run_reward(config, str(chain.root / "saved_models/tiny/sft"))
    assert lengths == [20]


def test_the_tokenizer_is_saved_as_it_was(chain):
    """Though texts are padded and cut where the accuracy is measured."""
    stages = chain.root / "saved_models/tiny"
    assert (stages / "reward/tokenizer.json").read_bytes() == (stages / "sft/tokenizer.json").read_bytes()
