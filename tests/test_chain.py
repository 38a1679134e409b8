"""What a run leaves and says, from nothing to a policy: the whole chain in micro settings."""

import json
import math
import os
import re
import shlex
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import assert_all_moved, read_log, read_stats
from micro import PPO, SETTINGS, assert_refused, flags, listing, run_main
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import generate
import train
from config import PRESETS
from files import read_rows

pytest_plugins = ["micro"]
pytestmark = pytest.mark.usefixtures("no_figures")

STATISTICS = {
    "step",
    "reward",
    "variance",
    "reward_reward_model",
    "score",
    "kl",
    "kl_k1",
    "kl_k3",
    "kl_coef",
    "entropy",
    "value",
    "return",
    "explained_variance",
    "response_length",
    "distinct_bigrams",
    "ref_perplexity",
    "ended",
    "alarms",
    "loss",
    "policy_loss",
    "value_loss",
    "clip_fraction",
    "value_clip_fraction",
    "approx_kl_k1",
    "approx_kl_k3",
    "ratio",
    "ratio_min",
    "ratio_max",
    "learning_rate",
}


# ----------------------------------------------------------------------------------------------------------------
# What it leaves
# ----------------------------------------------------------------------------------------------------------------


def test_the_chain_leaves_its_stages_and_its_run_and_nothing_else(chain):
    model = {"config.json", "model.safetensors", "run_config.json", "tokenizer.json", "tokenizer_config.json"}
    model |= {"stage.json", "rows.txt", "README.md", "manifest.json"}
    folders = {name: set(os.listdir(chain.root / "saved_models/tiny" / name)) for name in ("sft", "reward", "ppo")}
    assert set(os.listdir(chain.root)) == {"saved_models"}
    assert set(os.listdir(chain.root / "saved_models/tiny")) == set(folders)
    assert folders["sft"] == model | {"generation_config.json", "manifest.json"}
    assert folders["reward"] == model | {"plots", "manifest.json"}
    assert folders["ppo"] == model | {
        "generation_config.json",
        "value_head.safetensors",
        "training_log.csv",
        "training_stats.jsonl",
        "training_stats.json",
        "timings.jsonl",
        "checkpoints",
        "plots",
        "NOTICE.txt",
    }
    assert (chain.root / PPO / "plots/training.png").read_bytes().startswith(b"\x89PNG")


def test_the_policy_loads_without_this_project(chain):
    """Plain transformers gives a model that differs from the one before PPO, and continues a text."""
    assert_all_moved(chain.root / PPO.with_name("sft"), chain.root / PPO, AutoModelForCausalLM)
    policy = AutoModelForCausalLM.from_pretrained(chain.root / PPO)
    tokenizer = AutoTokenizer.from_pretrained(chain.root / PPO)
    ids = tokenizer("The film", return_tensors="pt").input_ids
    continued = policy.generate(ids, max_new_tokens=3, do_sample=False)
    assert continued.shape == (1, ids.shape[1] + 3) and torch.equal(continued[:, :-3], ids)


def test_the_value_head_is_saved_and_has_learned(chain):
    """It starts as zeros."""
    head = load_file(chain.root / PPO / "value_head.safetensors")
    assert {name: list(tensor.shape) for name, tensor in head.items()} == {"weight": [1, 16], "bias": [1]}
    assert all(tensor.abs().max() > 0 for tensor in head.values())


def test_the_resolved_configuration_is_saved(chain):
    saved = json.loads((chain.root / PPO / "run_config.json").read_text())
    assert {name: saved[name] for name in SETTINGS} == SETTINGS
    assert (saved["preset"], saved["kl_coef"], saved["gamma"]) == ("tiny", PRESETS["tiny"]["kl_coef"], 1.0)


def test_the_log_has_a_row_a_response(chain):
    rows = read_log(chain.root / PPO)
    assert list(rows[0]) == ["step", "query", "response", "reward", "reward_reward_model"]
    assert [row["step"] for row in rows] == ["0"] * 4 + ["1"] * 4
    assert all(row["query"] and float(row["reward"]) == float(row["reward_reward_model"]) for row in rows)


def test_the_statistics_have_a_row_a_step_with_every_figure(chain):
    """And with none of what differs from one machine to the next."""
    rows = read_stats(chain.root / PPO)
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert set(row) >= STATISTICS
        assert row.pop("alarms") == []
        assert all(math.isfinite(value) for value in row.values())
    assert not any(re.search("second|time", name) for name in rows[0])


def test_the_statistics_agree_with_the_log_and_the_settings(chain):
    rows, responses = read_stats(chain.root / PPO), read_log(chain.root / PPO)
    for row in rows:
        rewards = [float(r["reward"]) for r in responses if int(r["step"]) == row["step"]]
        assert row["reward"] == pytest.approx(sum(rewards) / 4, abs=1e-5)
    assert rows[0]["kl_k1"] == rows[0]["kl_k3"] == 0 and rows[1]["kl_k3"] > 0
    rate = PRESETS["tiny"]["learning_rate"]
    assert [row["learning_rate"] for row in rows] == pytest.approx([rate, rate / 2], abs=1e-9)
    assert all(0 < row["response_length"] <= 12 and 0 <= row["ended"] <= 1 for row in rows)


def test_timings_are_in_a_file_of_their_own(chain):
    timings = read_rows(chain.root / PPO / "timings.jsonl")
    assert [set(row) for row in timings] == [{"step", "seconds_rollout", "seconds_update", "tokens_per_second"}] * 2


# ----------------------------------------------------------------------------------------------------------------
# What it says
# ----------------------------------------------------------------------------------------------------------------


def test_the_notice_comes_first_and_last_and_is_saved(chain):
    notice = (chain.root / PPO / "NOTICE.txt").read_text().rstrip("\n")
    assert notice.startswith("This is a teaching demonstration") and "--preset gpt2-imdb" in notice
    assert "8,897 parameters" in notice
    assert chain.output.rstrip("\n").endswith(notice)
    assert chain.output.startswith("This is a teaching demonstration")


def test_each_stage_says_how_good_its_model_is_and_where(chain):
    """The words by which the tests elsewhere see that a stage did not run."""
    for line in (
        r"language model: held-out perplexity \d+\.\d\d a token, 8,880 parameters, in saved_models/tiny/sft$",
        r"reward model: held-out accuracy \d+\.\d% on whole texts, .* in saved_models/tiny/reward \(",
    ):
        assert len(re.findall(f"^{line}", chain.output, re.MULTILINE)) == 1


def test_the_run_ends_with_rewards_samples_and_paths(chain):
    number, interval = r"-?\d+\.\d{3}", r"\[[+-]\d+\.\d{3}, [+-]\d+\.\d{3}\]"
    pattern = (
        rf"reward on 4 held-out prompts: {number} before, {number} after; difference [+-]\d+\.\d{{3}}, 95 % interval"
    )
    assert re.search(f"{pattern} {interval}", chain.output)
    for heading in (r"^prompt  '", r"^  before \(", r"^  after  \("):
        assert len(re.findall(heading, chain.output, re.MULTILINE)) == 3
    assert str(PPO / "plots/training.png") in chain.output
    assert "Traceback" not in chain.errors


def test_the_printed_command_generates(chain, workplace, capsys):
    command = re.search("now try: (.*)", chain.output)[1]
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "main.py")
    assert run_main(*arguments) == 0
    prompt = arguments[arguments.index("--prompt") + 1]
    assert capsys.readouterr().out.startswith(prompt)


def test_each_stage_keeps_what_it_says_of_its_model(chain):
    """To the digits that are printed."""
    record = {}
    for stage in ("sft", "reward"):
        record[stage] = json.loads((chain.root / "saved_models/tiny" / stage / "stage.json").read_text())["held_out"]
    assert f"held-out perplexity {record['sft']['perplexity']:.2f} a token" in chain.output
    whole, halves = record["reward"]["accuracy"], record["reward"]["accuracy_on_first_halves"]
    assert f"held-out accuracy {whole:.1%} on whole texts, {halves:.1%} on their first halves" in chain.output


# ----------------------------------------------------------------------------------------------------------------
# The best so far
# ----------------------------------------------------------------------------------------------------------------


def interrupted_at_its_third_update(monkeypatch, *arguments) -> None:
    """A run that has looked at its policy twice, and saved it."""
    real = iter([train.update, train.update, Mock(side_effect=KeyboardInterrupt)])
    with monkeypatch.context() as patch:
        patch.setattr("train.update", lambda *given: next(real)(*given))
        assert run_main("--task", "train", *flags(n_updates=4, eval_every=1), *arguments) == 130


def figures_of(comparison: Path) -> dict:
    return json.loads(comparison.read_text())["splits"]["test"]["figures"]


def test_the_best_so_far_is_a_run(workplace, no_bars, monkeypatch, capsys):
    """To generate and to evaluate, by its own folder or by the run's, while that has no policy of its own."""
    interrupted_at_its_third_update(monkeypatch, "--output_dir", "mine")
    assert not Path("mine/model.safetensors").exists()
    answers = []
    for folder in ("mine", "mine/checkpoints/best", "mine/checkpoints"):
        capsys.readouterr()
        assert run_main("--task", "generate", "--output_dir", folder, "--prompt", "The film", "--temperature", "0") == 0
        said = capsys.readouterr()
        assert said.err.startswith("using mine/checkpoints/best\n")
        answers.append(said.out)
    assert answers[0].startswith("The film") and len(set(answers)) == 1
    best = listing(workplace / "mine/checkpoints/best")
    assert run_main("--task", "evaluate", "--output_dir", "mine/checkpoints/best") == 0
    comparison = workplace / "mine/results/comparison.json"
    assert listing(workplace / "mine/checkpoints/best") == best  # a better one would take the results with it
    own = figures_of(comparison)
    assert own["before"]["kl"] == 0 < own["after"]["kl"] and own["after"]["value_std"] > 0
    assert run_main("--task", "evaluate", "--policies", "a=saved_models/tiny/sft", "--policies", "b=mine") == 0
    assert figures_of(workplace / PPO / "results/comparison.json")["b"] == own["after"]


def test_the_best_so_far_gives_way_to_the_run_that_is_over(workplace, monkeypatch, capsys):
    """Without a flag, it is used only where no run is over; and a path to it says where the policy is then."""
    interrupted_at_its_third_update(monkeypatch)
    best = "saved_models/tiny/ppo-2/checkpoints/best"
    asked = ["--task", "generate", "--prompt", "The film"]
    for expected in (str(PPO), best):
        capsys.readouterr()
        assert run_main(*asked) == 0
        assert capsys.readouterr().err.startswith(f"using {expected}\n")
        if expected == str(PPO):
            (workplace / PPO).rename("elsewhere")
    (workplace / best).parent.rename("gone")
    (workplace / "saved_models/tiny/ppo-2/value_head.safetensors").touch()
    words = f"--output_dir {best} holds no policy any more: that run is over, and has it in saved_models/tiny/ppo-2"
    assert_refused(capsys, workplace, [*asked, "--output_dir", best], words)


def test_the_best_adapter_so_far_is_a_run(workplace, no_bars, monkeypatch, capsys):
    """Its base is named by a path from where the run was started, and found from anywhere."""
    Path("base").symlink_to("saved_models/tiny/sft")
    adapter = ["--base_model_name", "base", "--lora_r", "2", "--learning_rate", "0.01", "--output_dir", "mine"]
    adapter += ["--reward_model_path", "saved_models/tiny/reward", "--max_prompt_length", "12"]
    interrupted_at_its_third_update(monkeypatch, *adapter)
    best = workplace / "mine/checkpoints/best"
    assert json.loads((best / "adapter_config.json").read_text())["base_model_name_or_path"] == str(workplace / "base")
    capsys.readouterr()
    assert run_main("--task", "generate", "--output_dir", "mine", "--prompt", "The film") == 0
    said = capsys.readouterr()
    assert said.err.startswith("using mine/checkpoints/best\n") and said.out.startswith("The film")
    assert run_main("--task", "evaluate", "--output_dir", "mine/checkpoints/best") == 0
    own = figures_of(workplace / "mine/results/comparison.json")
    assert own["before"]["kl"] == 0 < own["after"]["kl"] and own["after"]["value_std"] > 0


# ----------------------------------------------------------------------------------------------------------------
# Another run beside it
# ----------------------------------------------------------------------------------------------------------------


def test_a_second_run_stands_beside_the_first_and_equals_it(workplace, capsys):
    """Same seed, same bytes; the stages are used as they are."""
    before = listing(workplace)
    assert run_main("--task", "train", *flags()) == 0
    after, second = listing(workplace), workplace / "saved_models/tiny/ppo-2"
    assert {name: after[name] for name in before} == before
    for name in ("model.safetensors", "value_head.safetensors", "training_stats.json", "training_log.csv", "README.md"):
        assert (second / name).read_bytes() == (workplace / PPO / name).read_bytes()
    output = capsys.readouterr().out
    assert "language model:" not in output and "reward model:" not in output
    assert output.count(" is there and used as it is: trained with --seed 0 on 200 rows at most, ") == 2


def test_another_seed_gives_another_run(workplace):
    assert run_main("--task", "train", "--seed", "1", *flags()) == 0
    second = workplace / "saved_models/tiny/ppo-2"
    for name in ("model.safetensors", "value_head.safetensors", "training_stats.json"):
        assert (second / name).read_bytes() != (workplace / PPO / name).read_bytes()


def test_an_explicit_folder_is_used_for_the_run_and_found_by_generate(workplace, capsys):
    assert run_main("--task", "train", "--output_dir", "mine", *flags()) == 0
    assert (workplace / "mine/model.safetensors").read_bytes() == (workplace / PPO / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert run_main("--task", "generate", "--output_dir", "mine", "--prompt", "The film") == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("using mine\n") and captured.out.startswith("The film")


def test_a_run_whose_sampler_and_scorer_disagree_stops_before_anything_is_trained_or_written(
    workplace, monkeypatch, capsys
):
    """The sampler at another temperature than the scorer; a dry run is told the same."""
    real, before = generate.sampling_options, listing(workplace)
    monkeypatch.setattr(generate, "sampling_options", lambda config: real(config) | {"temperature": 0.5})
    monkeypatch.setattr("train.update", lambda *_: pytest.fail("an update was made"))
    for flag in ([], ["--dry_run"]):
        assert run_main("--task", "train", *flags(), *flag) == 1
        captured = capsys.readouterr()
        assert "error: sampling and scoring disagree by" in captured.err.splitlines()[-1]
        assert "invariants hold" not in captured.out
    assert listing(workplace) == before


def test_mixed_precision_is_that_of_every_product_in_every_task(workplace, no_bars, monkeypatch):
    """Of sampler, policy, critic, reference and update, and of the policies that are loaded again: GPT-2's layers give
    bfloat16 wherever they are read. Numbers alone would differ by another kernel of attention as well."""
    monkeypatch.setattr("loading.check_can_be_sampled", lambda *_: None)  # which reads a few tokens in float32
    monkeypatch.setattr("evaluation.load_fluency_judge", lambda *_: None)  # a judge's precision is its own
    (workplace / "r.py").write_text("def reward(prompts, responses, rows):\n    return [1.0 for _ in responses]\n")
    found = set()

    def note(module, inputs, output) -> None:
        if isinstance(module, Conv1D):
            found.add((torch.is_grad_enabled(), output.dtype))

    asked = flags(mixed_precision="bf16", critic="separate", reward_fn="r.py:reward", output_dir="mixed", n_updates=1)
    without, with_gradient = (False, torch.bfloat16), (True, torch.bfloat16)
    with register_module_forward_hook(note):
        for arguments, expected in (
            (["train", *asked], {without, with_gradient}),
            (["evaluate", "--output_dir", "mixed"], {without}),
            (["generate", "--output_dir", "mixed", "--prompt", "The film"], {without}),
        ):
            found.clear()
            assert run_main("--task", *arguments) == 0
            assert found == expected, arguments


TASKS = {
    "sft": ["--output_dir", "new"],
    "reward": ["--output_dir", "new", "--base_model_name", "saved_models/tiny/sft"],
    "train": ["--output_dir", "new"],
    "generate": ["--prompt", "The film"],
    "evaluate": [],
    "explain": [],
}


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_multiplies_as_is_fastest_for_its_model(task, precision, workplace, no_bars, monkeypatch, capsys):
    """What is fastest is found for matrices as wide as the model's, and is what the task leaves set: also where a judge
    had to be trained on the way, for which another is the fastest."""
    widths = []
    others = ["medium" if precision == "highest" else "highest"] if task == "evaluate" else []

    def fastest(exact, work, width):
        widths.append(width)
        return others.pop() if others else precision

    monkeypatch.setenv("XDG_STATE_HOME", str(workplace / "state"))
    monkeypatch.setattr("device.exact_precisions", lambda _: ["highest", "medium"])
    monkeypatch.setattr("device.fastest", fastest)
    given = TASKS[task] if task in ("generate", "evaluate", "explain") else [*flags(max_prompt_length=12), *TASKS[task]]
    assert run_main("--task", task, *given) == 0
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cuda.flash_sdp_enabled() == (precision == "highest")
    assert set(widths) == {SETTINGS["n_embd"]}
    if task == "train":
        assert f"float32 products: {precision}\n" in capsys.readouterr().out
