"""Random numbers that need no memory: functions of (seed, purpose, number), alike in every process."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import randomness
from randomness import PURPOSES, generator, permutation, uniforms

ROOT = Path(randomness.__file__).parent


def test_the_same_arguments_give_the_same_numbers_whatever_was_drawn_before():
    first = uniforms(3, "sampling", 7, (4, 5))
    uniforms(3, "sampling", 6, (9, 9))
    permutation(3, "steps", 7, 100)
    torch.rand(3)
    assert torch.equal(uniforms(3, "sampling", 7, (4, 5)), first)


def test_every_argument_matters():
    """No two of these share even their first number."""
    seeds, numbers = (0, 1, 2**32 - 1), (0, 1, 2**20)
    draws = [
        uniforms(seed, purpose, number, (1, 1)).item()
        for seed, purpose, number in itertools.product(seeds, PURPOSES, numbers)
    ]
    assert len(set(draws)) == len(draws) == 9 * len(PURPOSES)
    orders = [
        tuple(permutation(seed, purpose, number, 50, part).tolist())
        for seed, purpose, number, part in itertools.product((0, 1), ("prompts", "texts"), (0, 1), (0, 1))
    ]
    assert len(set(orders)) == 16


def test_no_part_is_part_0():
    assert torch.equal(permutation(1, "texts", 2, 20), permutation(1, "texts", 2, 20, part=0))


def test_the_first_rows_do_not_depend_on_how_many_there_are():
    whole = uniforms(0, "sampling", 1, (64, 12))
    assert torch.equal(uniforms(0, "sampling", 1, (3, 12)), whole[:3])
    assert whole.dtype == torch.float64
    assert whole.min() >= 0 and whole.max() < 1
    assert abs(whole.mean() - 0.5) < 0.05


def test_a_permutation_has_every_number_once():
    order = permutation(0, "prompts", 3, 1000)
    assert order.tolist() == generator(0, "prompts", 3).permutation(1000).tolist()
    assert order.element_size() == 4
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() != list(range(1000))


def test_an_unknown_purpose_is_refused():
    with pytest.raises(ValueError, match="not in tuple"):
        uniforms(0, "sampeling", 0, (1, 1))


def test_another_process_draws_the_same():
    """Nothing hangs on a hash that differs from process to process."""
    code = "from randomness import *; print(uniforms(5, 'generate', 2, (1, 3)).tolist())"
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert there.strip() == str(uniforms(5, "generate", 2, (1, 3)).tolist())


@pytest.mark.parametrize("purpose", PURPOSES)
def test_the_key_of_each_number_stays_what_it_is(purpose):
    """NumPy's generator of [seed, place of the purpose, number, part]: else a run that goes on would draw others."""
    places = {"prompts": 0, "sampling": 1, "steps": 2, "evaluation": 3, "generate": 4, "texts": 5, "cuts": 6}
    key = [11, places[purpose], 7]
    assert uniforms(11, purpose, 7, (2, 3)).tolist() == np.random.default_rng([*key, 0]).random((2, 3)).tolist()
    assert permutation(11, purpose, 7, 9, 5).tolist() == np.random.default_rng([*key, 5]).permutation(9).tolist()
