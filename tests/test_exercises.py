"""The notebook's exercises: the answers folded away in it are right, the cells as shipped are not filled in, and wrong
answers are refused, with their mistake by name where it is one of those that are made.
"""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
import torch

import ppo

FOLDER = Path(ppo.__file__).resolve().parent / "notebooks"
SPEC = importlib.util.spec_from_file_location("exercises", FOLDER / "exercises.py")
exercises = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(exercises)

CELLS = nbformat.read(FOLDER / "demo.ipynb", as_version=nbformat.NO_CONVERT).cells
NAMES = ("whiten", "gae", "clipped_loss")
SHORTER = "mask.long().flip(1).cumsum(1).flip(1) > 1"  # where another real token follows


def defined(source: str, name: str):
    """The function that a cell or a folded answer defines."""
    found = {"torch": torch}
    exec(source, found)
    return found[name]


def answer_of(name: str) -> str:
    """What is folded away behind "One answer"."""
    folded = re.compile(r"<details>\n<summary>One answer</summary>\n\n```python\n(.*?)```\n\n</details>", re.DOTALL)
    answers = [block for cell in CELLS if cell.cell_type == "markdown" for block in folded.findall(cell.source)]
    assert len(answers) == len(NAMES)
    return next(answer for answer in answers if answer.startswith(f"def {name}("))


def changed(name: str, before: str, after: str):
    """The folded answer with a piece of it replaced."""
    answer = answer_of(name)
    assert answer.count(before) == 1
    return defined(answer.replace(before, after), name)


@pytest.mark.parametrize("name", NAMES)
def test_the_folded_answers_are_right(name):
    assert exercises.check(defined(answer_of(name), name)) == "Right: these are the numbers of ppo.py."


@pytest.mark.parametrize("name", NAMES)
def test_the_cells_as_shipped_are_not_filled_in(name):
    stub = next(cell.source for cell in CELLS if cell.cell_type == "code" and cell.source.startswith(f"def {name}("))
    assert exercises.check(defined(stub, name)) == "Not filled in yet: the function returns nothing."
    assert any(f"check({name})" in cell.source for cell in CELLS if cell.cell_type == "code")


@pytest.mark.parametrize(
    ("name", "before", "after", "said"),
    [
        # the sign flipped
        ("whiten", "(x - mean) / (", "(mean - x) / (", "the sign is turned."),
        ("gae", "- values[:, t]\n", "- values[:, t]; delta = -delta\n", "the sign is turned."),
        ("clipped_loss", "return -", "return ", "the sign is turned: a loss is minus the gain."),
        # the mask off by one
        ("whiten", "n = mask.sum()", f"mask = {SHORTER}; n = mask.sum()", "the last real token, the EOS"),
        ("gae", "advantages =", f"mask = {SHORTER}; advantages =", "the last real token, the EOS"),
        ("clipped_loss", "gains =", f"mask = {SHORTER}; gains =", "the last real token, the EOS"),
        # the mean over the padding
        (
            "whiten",
            "torch.where(mask, x, 0.0).sum() / n",
            "x.mean(); mask = mask | ~mask; n = x.numel()",
            "what stands",
        ),
        ("clipped_loss", "/ mask.sum()", "/ mask.numel()", "the mean is over the padding, too"),
        ("clipped_loss", "torch.where(mask, gains, 0.0).sum() / mask.sum()", "gains.mean()", "what stands beyond"),
        # and others
        ("whiten", "** 0.5", "** 1.0", "it is divided by the variance, expected its square root."),
        ("whiten", "(variance + 1e-8)", "(variance * n / (n - 1))", "the variance is divided by n - 1, expected n."),
        ("gae", "gamma * lam * advantage", "lam * advantage", "the sum decays by λ alone, expected γλ."),
        ("gae", " + gamma * next_value", "", "δ_t is without γ V_{t+1}."),
        ("gae", "torch.where(mask[:, t], values[:, t], 0.0)", "values[:, t]", "V_{t+1} is read beyond the mask"),
        ("gae", "advantages[:, t] = advantage", "advantages[:, t] = advantage + values[:, t]", "these are the returns"),
        ("clipped_loss", "torch.minimum", "torch.maximum", "of the two gains it is the larger one"),
    ],
)
def test_a_wrong_answer_is_refused_and_its_mistake_is_named(name, before, after, said):
    verdict = exercises.check(changed(name, before, after))
    assert verdict.startswith("Not yet: ") and said in verdict


def test_an_answer_that_is_wrong_where_all_numbers_are_alike_is_not_yet_right():
    verdict = exercises.check(changed("whiten", "(variance + 1e-8)", "(variance)"))
    assert (
        verdict == "Nearly: where all numbers are alike it divides 0 by 0: 1e-8 beside the variance keeps that finite."
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_mistake_that_is_known_by_name_has_numbers_of_its_own(name):
    """Else an answer would be told another's mistake, or a right one would be refused."""
    wrong = exercises.EXERCISES[name].wrong
    assert len(wrong) >= 9
    for sentence, mistake in wrong.items():
        mistaken = lambda mistake=mistake, **given: filled(mistake(**given))  # noqa: E731
        mistaken.__name__ = name
        assert exercises.check(mistaken) == f"Not yet: {sentence}."


def filled(found: torch.Tensor) -> torch.Tensor:
    """With a number where a known mistake leaves open what an answer has."""
    return torch.where(found.isnan(), 9.9, found) if found.dim() else found


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [
        ("whiten", lambda x, mask: (x - x[mask].mean()) / x[mask].std(False), "Nearly: every real token is right"),
        (
            "whiten",
            lambda x, mask: torch.where(mask, x + 1, 0.0),
            r"Not yet: in row 0, token 0 is -1\.3104, expected -1\.8434\.",
        ),
        ("whiten", lambda x, mask: x * float("nan"), r"Not yet: a real token has a number that is none \(NaN\)"),
        ("gae", lambda mask, **_: mask.sum(1), r"Not yet: it returns a tensor of shape \(4,\), expected .* \(4, 5\)"),
        ("clipped_loss", lambda **_: 0.5, r"Not yet: it returns 0\.5, expected a tensor of shape \(\)"),
        ("clipped_loss", lambda **_: torch.tensor(0.5), r"Not yet: it gives 0\.5000, expected -?0\.\d{4}"),
    ],
)
def test_any_other_answer_is_told_where_it_differs(name, answer, said):
    answer.__name__ = name
    assert re.match(said, exercises.check(answer)), exercises.check(answer)


def test_an_answer_may_write_over_its_inputs():
    def whiten(x, mask):
        mean = x[mask].mean()
        x -= mean
        x /= (x[mask].var(False) + 1e-8) ** 0.5
        x[~mask] = 0
        mask[:] = False
        return x

    for _ in range(2):
        assert exercises.check(whiten).startswith("Right")
