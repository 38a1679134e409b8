"""The benchmark of a PPO step: it counts the work that the shipped code does, and reports it under the agreed names."""

import json
import runpy
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost, floor, learning, step
from benchmarks.floor import Size, backward_products, flops, forward_products, matrix_products
from files import read_rows

ROOT = Path(__file__).parents[1]
TINY = Size(32, 2, 2, vocab=64, batch=4, minibatch=2, query_len=9, response_len=60, ppo_epochs=3)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY._asdict().items()]
KEYS = "impl transformers torch threads matmul_precision attn fused_adam mixed_precision params config generate_s "
KEYS += "step_s total_s forward_pass_s optimize_step_s quiet_steps total_s_all foreign_cores_all cpu_s total_s_min "
KEYS += "samples_per_s peak_rss_mb mean_reward objective_kl"


def test_products_of_a_forward_and_a_backward_pass_by_hand():
    size = Size(2, 1, 1, vocab=3, batch=1, minibatch=1, query_len=1, response_len=2, ppo_epochs=1)
    one = forward_products(size, rows=1, new=1, context=1, predicted=1)
    assert flops(one) == 24 + 4 + 4 + 8 + 32 + 32 + 12  # q k v, scores, their mean of v, output; MLP in, out; logits
    assert flops(matrix_products(size)["sampling"]) == 116 + 116 + 8  # the second token attends to one token more
    assert backward_products(Counter({(5, 2, 3, 4): 7})) == Counter({(5, 2, 4, 3): 7, (5, 3, 2, 4): 7})
    square = forward_products(size._replace(hidden=4, layers=3), rows=2, new=4, context=4, predicted=1)
    assert square[2, 4, 4, 4] == 6  # two products of one shape in each layer


def test_counted_products_are_those_of_the_shipped_code():
    args = step.parse(FLAGS)
    (policy, fixed), counted = step.new_models(TINY, step.settings(args)), Counter()
    for model in (policy, fixed.reference):
        model.language_model.set_attn_implementation("eager")  # torch's counter does not know the CPU's fused one

    def counting(part, function):
        def call(*args, **kwargs):
            with FlopCounterMode(display=False) as counter:
                result = function(*args, **kwargs)
            counted["reference" if args[0] is fixed.reference else part] += counter.get_total_flops()
            return result

        return call

    with ExitStack() as stack:
        for part, place in step.PARTS.items():
            if part not in ("rollout", "update"):
                stack.enter_context(patch.object(*place, counting(part, getattr(*place))))
        next(step.new_steps(policy, fixed, step.settings(args)))
    expected = {part: flops(products) for part, products in matrix_products(TINY).items()}
    assert counted["sampling"] == expected["sampling"]
    for part in ("scoring", "reference", "update forward", "update backward"):  # with the value head
        assert 1 <= counted[part] / expected[part] < 1.02, part
    assert sum(counted.values()) == sum(counted[part] for part in expected)


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    """Other tests compare results to the byte."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_report_has_the_agreed_keys_and_its_numbers_agree(monkeypatch, capsys):
    monkeypatch.setitem(floor.SQUARE, "cpu", 64)
    report = step.run(step.parse([*FLAGS, "--steps=1", "--threads=1", "--stages"]))
    assert set(KEYS.split()) <= report.keys()
    assert report["config"] == {**TINY._asdict(), "steps": 1, "lr": 1.41e-5, "seed": 0}
    assert report["params"] == 64 * 32 + 1024 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32 + 33
    assert report["gflop"] == pytest.approx(sum(map(flops, matrix_products(TINY).values())) / 1e9)
    assert report["over_floor"] * report["floor_s"] == pytest.approx(report["total_s"])
    assert report["floor_s"] * report["gflops_squares"] == pytest.approx(report["gflop"])
    assert report["samples_per_s"] * report["total_s"] == pytest.approx(4)
    assert report["sampling_tokens_per_s"] * report["generate_s"] == pytest.approx(4 * 60)
    assert report["update_tokens_per_s"] * report["optimize_step_s"] == pytest.approx(3 * 4 * 69)
    for part, seconds in (("sampling", "generate_s"), ("update", "optimize_step_s")):
        computed = report[f"{part}_over_squares"] * report[seconds] * report["gflops_squares"]
        work = sum(flops(products) for name, products in matrix_products(TINY).items() if part in name)
        assert computed == pytest.approx(work / 1e9)
    assert report["generate_s"] + report["step_s"] == pytest.approx(report["total_s"])
    assert report["forward_pass_s"] + report["optimize_step_s"] < report["step_s"]
    assert report["total_s_all"] == [pytest.approx(report["total_s"], abs=1e-4)]
    assert 0 < report["mean_reward"][0] < 1
    weights = report["params"] * 4 / 2**20
    assert report["static_mb"]["optimizer"] == pytest.approx(2 * weights)
    assert report["static_mb"]["interpreter"] <= report["peak_rss_mb"]
    shown = capsys.readouterr().err.split("\n")
    assert [line.split("  ")[0] for line in shown[1:4]] == ["sampling", "scoring", "reference"]


def test_steps_go_on_until_enough_were_quiet():
    foreign = iter([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])  # the first is not counted
    steps = ({"foreign": cores} for cores in foreign)
    laps = step.timed_steps(steps, step.parse(["--steps=2", "--max-steps=9"]))
    assert [lap["foreign"] for lap in laps] == [1.0, 0.0, 1.0, 0.0]
    busy = ({"foreign": 1.0} for _ in range(9))
    assert len(step.timed_steps(busy, step.parse(["--steps=2", "--max-steps=3"]))) == 3


def test_no_step_is_started_when_the_time_is_up():
    steps = ({"foreign": 0.0} for _ in range(9))
    assert len(step.timed_steps(steps, step.parse(["--steps=3", "--time-limit=0"]))) == 1


def test_ragged_responses_have_every_length_and_nothing_else_is_changed():
    @dataclass
    class Whole:
        mask: torch.Tensor
        logprobs: torch.Tensor

    whole = Whole(torch.ones(2000, 7, dtype=torch.bool), torch.randn(2000, 7))
    cut = step.cut_responses(lambda: whole, seed=0)()
    assert cut.logprobs is whole.logprobs
    assert (cut.mask.long().diff(dim=1) <= 0).all()  # a prefix of each row
    counts = torch.bincount(cut.mask.sum(1), minlength=8)
    assert counts[0] == 0 and (counts[1:] > 200).all()  # 286 expected of each, standard deviation 16


def test_slopes_by_hand():
    assert cost.slope([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1)
    assert cost.slope([1, 2, 4], [5, 20, 80]) == pytest.approx(2)
    assert cost.slope([1, 2, 4], [4, 2, 1]) == pytest.approx(-1)


def test_the_table_of_costs_has_a_row_a_point_and_the_slopes_of_both(tmp_path):
    rows = [
        {"batch": n, "seconds": 0.5 * n, "gflop": n**2, "memory_mb": 100 + n, "above_static_mb": n} for n in (1, 2, 4)
    ]
    lines = cost.table({"batch": rows}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["batch", "1", "0.500", "1.0", "101", "1"],
        ["batch", "2", "1.000", "4.0", "102", "2"],
        ["batch", "4", "2.000", "16.0", "104", "4"],
        ["slope", "1.00", "2.00"],
    ]


def test_each_series_of_costs_grows_in_one_thing_alone():
    for name, (_, sizes) in cost.SERIES.items():
        assert len(sizes) >= 4
        for size in sizes:
            same = {"minibatch": cost.BASE.minibatch} if name == "batch" else {}
            assert size._replace(**{name: getattr(cost.BASE, name)}, **same) == cost.BASE


def test_the_time_to_a_reward_that_every_run_reaches_by_hand():
    """Means of three: ours .2, .5 and .52, theirs .1, .3 and .50; both reach .5, after 30 and 100 s."""

    def run(seconds: int, *rewards: float) -> list[dict]:
        return [{"seconds": n * seconds, "reward": x, "kl": n, "length": 5} for n, x in enumerate(rewards)]

    ours, theirs = run(10, 0.1, 0.2, 0.3, 1.0, 0.26), run(25, 0.0, 0.1, 0.2, 0.6, 0.7)
    assert [row["reward"] for row in learning.smooth(ours)] == pytest.approx([0.2, 0.5, 0.52])
    result = learning.compare({"ours": [ours], "theirs": [theirs]}, step=0.1)
    assert result["reward"] == pytest.approx(0.5)
    assert result["at_reward"]["ours"] == [{"seconds": 30, "reward": pytest.approx(0.5), "kl": 2, "length": 5}]
    assert result["at_reward"]["theirs"] == [{"seconds": 100, "reward": pytest.approx(0.5), "kl": 3, "length": 5}]
    assert result["ratios"] == [pytest.approx(0.3)] and result["median_ratio"] == pytest.approx(0.3)


def test_a_size_is_a_starting_point():
    args = step.parse(["--size=c", "--batch=8"])
    assert Size(*(getattr(args, name) for name in Size._fields)) == step.SIZES["c"]._replace(batch=8)


def test_halves_of_pairs_share_no_prompt_and_lose_no_pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"prompt {i % 30}", "chosen": f"é\u2028{i}", "rejected": "b"} for i in range(100)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path("all.jsonl").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["pairs.py", "all.jsonl"])
    runpy.run_path(str(ROOT / "benchmarks" / "pairs.py"))
    parts = [read_rows(Path(f"pairs_{half}/{part}.jsonl")) for half in "ab" for part in ("train", "validation")]
    prompts = [{row["prompt"] for row in part} for part in parts]
    assert [len(some) for some in prompts] == [12, 3, 12, 3]
    assert len(set.union(*prompts)) == 30
    assert sorted((row for part in parts for row in part), key=rows.index) == rows


def test_wins_of_two_runs_by_hand(tmp_path, monkeypatch, capsys):
    """3 of 4, and 1 of 4 beside equal rewards; Wilson's of 4 of 8: .5 ± Z sqrt(.25/8 + Z²/256) / (1 + Z²/8)."""
    for run, after in {"one": (1, 2, 3, -1), "two": (0, 0, -1, 0.5)}.items():
        (tmp_path / run / "results").mkdir(parents=True)
        lines = ["query,reward_before,reward_after", *(f'"a, b",0,{reward}' for reward in after)]
        (tmp_path / run / "results" / "samples.csv").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wins.py", "one", "two"])
    runpy.run_path(str(ROOT / "benchmarks" / "wins.py"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("one: 3 of 4 = 75% [") and lines[1].startswith("two: 1 of 4 = 25% [")
    assert lines[2] == "all: 4 of 8 = 50% [22%, 78%]"
