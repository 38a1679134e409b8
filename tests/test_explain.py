"""A look inside an update: every number against plain Python, the epochs against a run's own, a run's updates again."""

import csv
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import assert_close, read_log, read_stats
from micro import PPO, assert_refused, flags, last_line_of_errors, listing, question_flags, run_main
from tiny_models import EOS, brute_force, letter_tokenizer, tiny_policy

import explain
import train
from config import Config
from model import frozen_copy
from prompts import Prompt
from train import Fixed, new_state

pytest_plugins = ["micro"]
pytestmark = pytest.mark.usefixtures("no_figures")
QUERIES = [[5, 3, 8, 2, 9], [4, 7], [6], [2, 2, 10]]
GAMMA, LAM, BETA, PENALTY, CLIP, CLIP_VALUE = 0.95, 0.9, 0.3, 0.7, 0.1, 0.05


def settings(**changes) -> Config:
    """An update that moves far enough for both clips to bind."""
    chosen = {"gamma": GAMMA, "lam": LAM, "kl_coef": BETA, "missing_eos_penalty": PENALTY, "temperature": 0.7}
    chosen |= {"clip_range": CLIP, "clip_range_value": CLIP_VALUE, "value_coef": 0.5, "learning_rate": 3e-3}
    chosen |= {"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 3, "max_new_tokens": 8, "n_updates": 3}
    return Config(**(chosen | changes))


def vowels(prompts, responses, rows) -> torch.Tensor:
    return torch.tensor([sum(map(response.count, "aeiou")) / 2 - 1 for response in responses])


def world(family: str = "gpt2", config: Config | None = None):
    """A state some way from its reference, what is fixed, and prompts."""
    policy, tokenizer = tiny_policy(family), letter_tokenizer()
    fixed = Fixed(reference=frozen_copy(policy), tokenizer=tokenizer, terms={"vowels": vowels})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    prompts = [Prompt(tokenizer.decode(ids), ids, {}) for ids in QUERIES]
    return new_state(policy, config or settings()), fixed, prompts


def traced(family: str = "gpt2", **changes) -> tuple[dict, explain.Course]:
    """The trace of all rows of an update."""
    config = settings(**changes)
    state, fixed, prompts = world(family, config)
    course = explain.course_of(state, fixed, prompts, config)
    return explain.trace_of(course, fixed.tokenizer, config, 0, range(4), title="t", model="m", note=""), course


def column(tokens: list[dict], name: str) -> list[float]:
    return [token[name] for token in tokens]


@pytest.fixture(scope="module", params=["gpt2", "t5"])
def trace(request) -> dict:
    return traced(request.param)[0]


# ----------------------------------------------------------------------------------------------------------------
# Every number of a token, from raw log-probabilities, values and scores, in plain Python
# ----------------------------------------------------------------------------------------------------------------


def test_rewards_and_advantages_are_those_of_the_equations(trace):
    """TD errors, GAE as the sum that it is, not as the recursion, and returns."""
    for row in trace["rows"]:
        tokens = row["tokens"]
        score = row["raw_score"] - (0 if row["has_eos"] else PENALTY)
        assert_close(row["score"], score)
        n = len(tokens)
        values = [*column(tokens, "value"), 0.0]
        rewards = [-BETA * (token["logprob"] - token["ref_logprob"]) for token in tokens]
        assert_close(column(tokens, "kl"), [reward / -BETA for reward in rewards])
        assert_close(column(tokens, "reward_kl"), rewards)
        assert column(tokens, "reward_score") == [0.0] * (n - 1) + [row["score"]]
        rewards[-1] += score
        assert_close(column(tokens, "reward"), rewards)
        errors = [rewards[t] + GAMMA * values[t + 1] - values[t] for t in range(n)]
        assert_close(column(tokens, "td_error"), errors)
        advantages = [sum((GAMMA * LAM) ** (u - t) * errors[u] for u in range(t, n)) for t in range(n)]
        assert_close(column(tokens, "advantage"), advantages)
        assert_close(column(tokens, "return"), [a + v for a, v in zip(advantages, values[:-1], strict=True)])
    assert {row["has_eos"] for row in trace["rows"]} == {True, False}
    assert max(abs(token["kl"]) for row in trace["rows"] for token in row["tokens"]) > 0.05


def test_advantages_are_whitened_over_the_whole_batch(trace):
    advantages = [token["advantage"] for row in trace["rows"] for token in row["tokens"]]
    mean = sum(advantages) / len(advantages)
    variance = sum((a - mean) ** 2 for a in advantages) / len(advantages)
    assert_close(
        [trace["whitening"][name] for name in ("mean", "variance", "n_tokens")], [mean, variance, len(advantages)]
    )
    whitened = [token["whitened"] for row in trace["rows"] for token in row["tokens"]]
    assert_close(whitened, [(a - mean) / math.sqrt(variance + 1e-8) for a in advantages])


def test_the_raw_numbers_of_the_batch_are_those_of_its_rows(trace):
    for row, raw in zip(trace["rows"], trace["batch"]["raw"], strict=True):
        for name in ("logprob", "ref_logprob", "value"):
            assert raw[name] == column(row["tokens"], name)
        assert raw["score"] == row["score"]


def test_without_whitening_the_advantages_are_trained_on_as_they_are():
    trace, _ = traced(whiten_advantages=False, ppo_epochs=1)
    assert trace["whitening"] is None
    for token in (token for row in trace["rows"] for token in row["tokens"]):
        assert token["whitened"] == token["advantage"]


def loss_of(q: float, a: float) -> tuple[float, str]:
    """The clipped surrogate of one token as a loss, and which of its terms counts, case by case."""
    if a > 0 and q > 1 + CLIP:
        return -(1 + CLIP) * a, "clipped above"
    if a < 0 and q < 1 - CLIP:
        return -(1 - CLIP) * a, "clipped below"
    return -q * a, "unclipped"


def test_ratios_losses_and_values_of_every_epoch_are_those_of_the_equations(trace):
    n_tokens = sum(len(row["tokens"]) for row in trace["rows"])
    branches, clipped_values = set(), set()
    for row in trace["rows"]:
        assert len(row["epochs"]) == 4
        for number, epoch in enumerate(row["epochs"]):
            for old, new in zip(row["tokens"], epoch["tokens"], strict=True):
                q, a = math.exp(new["logprob"] - old["logprob"]), old["whitened"]
                assert_close(new["ratio"], q)
                loss, branch = loss_of(new["ratio"], a)
                assert_close([new["policy_loss"], new["share"]], [loss, loss / n_tokens])
                assert (new["branch"], new["is_clipped"]) == (branch, branch != "unclipped")
                low, high = 1 - CLIP, 1 + CLIP
                assert_close([new["unclipped"], new["clipped"]], [-q * a, -min(max(q, low), high) * a])
                near = min(max(new["value"], old["value"] - CLIP_VALUE), old["value"] + CLIP_VALUE)
                errors = [(value - old["return"]) ** 2 for value in (new["value"], near)]
                assert_close([new["value_near_old"], new["value_loss"]], [near, max(errors) / 2])
                assert new["value_is_clipped"] == (errors[1] > errors[0] + 1e-7) or abs(errors[1] - errors[0]) < 1e-5
                assert_close(new["value_change"], new["value"] - old["value"])
                branches.add(new["branch"])
                clipped_values.add(new["value_is_clipped"])
                if number == 0:
                    assert (new["ratio"], new["value_change"], new["branch"]) == (1.0, 0.0, "unclipped")
    assert branches == {"unclipped", "clipped above", "clipped below"} and clipped_values == {True, False}


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_log_probabilities_are_the_models_own(family):
    """Token by token, without padding or cache: the policy's before and after the update."""
    trace, course = traced(family)
    before, _, _ = world(family)
    for row, query in zip(trace["rows"], QUERIES_IN_ORDER, strict=True):
        ids = column(row["tokens"], "id")
        logprobs, values, entropies = brute_force(before.policy, query, ids, 0.7)
        assert_close(column(row["tokens"], "logprob"), logprobs)
        assert_close(column(row["tokens"], "value"), values)
        assert_close(column(row["tokens"], "entropy"), entropies)
        logprobs, values, _ = brute_force(course.after.policy, query, ids, 0.7)
        assert_close(column(row["epochs"][-1]["tokens"], "logprob"), logprobs)
        assert_close(column(row["epochs"][-1]["tokens"], "value"), values)
        assert row["response"] == "".join(token["text"] for token in row["tokens"] if token["id"] > EOS)
        assert (row["tokens"][-1]["text"] == "<eos>") == row["has_eos"] == (ids[-1] == EOS)


QUERIES_IN_ORDER = [QUERIES[place] for place in train.batch_of(range(4), 4, 0, 0)]


# ----------------------------------------------------------------------------------------------------------------
# The update
# ----------------------------------------------------------------------------------------------------------------


def test_shares_add_up_to_the_loss_that_the_update_reports():
    """Of one step an epoch: the first step's loss is that before the update, the second's that after one epoch."""
    trace, _ = traced(mini_batch_size=4, ppo_epochs=2)
    losses = [sum(token["share"] for row in trace["rows"] for token in row["epochs"][k]["tokens"]) for k in (0, 1)]
    first, both = (stats["policy_loss"] for stats in trace["updates"])
    assert_close([first, both], [losses[0], sum(losses) / 2])
    assert abs(losses[0] - losses[1]) > 1e-3
    assert_close([epoch["policy_loss"] for epoch in trace["batch"]["epochs"][:2]], losses)


@pytest.mark.parametrize("changes", [{}, {"target_kl": 1e-4}])
def test_the_epochs_are_those_that_train_goes_through(changes, monkeypatch):
    """To the bit: the policy after each epoch as `train` has it within one update, the last one, and its statistics."""
    _, course = traced(**changes)
    config = settings(**changes)
    state, fixed, prompts = world(config=config)
    seen, real = [], train.accumulate_gradient

    def observed(policy, rollout, rows, config):
        seen.append(explain.scored(policy, rollout, config))
        policy.train()
        return real(policy, rollout, rows, config)

    monkeypatch.setattr(train, "accumulate_gradient", observed)
    rollout, stats = next(train.train(state, fixed, prompts, config))
    assert torch.equal(rollout.response_ids, course.rollout.response_ids)
    assert course.updates[-1] == stats
    if not changes:
        assert len(seen) == 6  # two steps an epoch
        for k in (0, 1, 2):
            assert torch.equal(seen[2 * k].logprobs[rollout.mask], course.outputs[k].logprobs[rollout.mask])
            assert torch.equal(seen[2 * k].values[rollout.mask], course.outputs[k].values[rollout.mask])
    else:
        assert len(seen) < 6
    for ours, theirs in zip(course.after.policy.parameters(), state.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    last = explain.scored(state.policy, rollout, config)
    assert torch.equal(last.logprobs, course.outputs[-1].logprobs)


def test_epochs_without_a_step_are_not_shown():
    """The second step has gone too far for the third: of three epochs of two steps the first alone is whole."""
    trace, course = traced(target_kl=1e-4)
    n_epochs = len(trace["updates"])
    assert n_epochs < 3 and len(trace["batch"]["epochs"]) == n_epochs + 1
    assert all(len(row["epochs"]) == n_epochs + 1 for row in trace["rows"])
    for one, other in pairwise(course.outputs):
        assert not torch.equal(one.logprobs, other.logprobs)
    assert trace["settings"]["target_kl"] == 1e-4
    whole, _ = traced(target_kl=1e6)
    assert len(whole["updates"]) == 3


def test_the_bonus_of_entropy_is_part_of_the_loss_that_the_update_reports():
    """With one step an epoch, whose loss is that before it."""
    trace, _ = traced(mini_batch_size=4, ppo_epochs=2, entropy_coef=0.4)
    for k in (0, 1):
        tokens = [token for row in trace["rows"] for token in row["epochs"][k]["tokens"]]
        losses = [token["policy_loss"] + 0.5 * token["value_loss"] - 0.4 * token["entropy"] for token in tokens]
        logged = (
            trace["updates"][0]["loss"] if k == 0 else 2 * trace["updates"][1]["loss"] - trace["updates"][0]["loss"]
        )
        assert_close(sum(losses) / len(losses), logged)
    assert min(token["entropy"] for token in tokens) > 0.1


@pytest.mark.parametrize(("option", "over", "divisor"), [("normalize_scores", "run", 3), ("whiten_scores", "batch", 4)])
def test_what_became_of_the_scores_is_told(option, over, divisor):
    """The score of each response from its reward, by the definitions."""
    trace, _ = traced(ppo_epochs=1, score_clip=0.9, **{option: True})
    penalised = [row["raw_score"] - (0 if row["has_eos"] else PENALTY) for row in trace["rows"]]
    assert_close(trace["scores"]["penalised"], penalised)
    mean = sum(penalised) / 4
    variance = sum((x - mean) ** 2 for x in penalised) / divisor
    scale = trace["scores"]["scale"]
    assert_close([scale["mean"], scale["variance"]], [mean, variance])
    assert (scale["over"], scale["n_scores"], trace["scores"]["clip"]) == (over, 4, 0.9)
    scores = [min(max((x - mean) / math.sqrt(variance + 1e-8), -0.9), 0.9) for x in penalised]
    assert_close([row["score"] for row in trace["rows"]], scores)
    assert max(map(abs, scores)) == 0.9
    untouched, _ = traced(ppo_epochs=1)
    assert (untouched["scores"]["scale"], untouched["scores"]["clip"]) == (None, None)


def test_the_state_that_is_looked_at_does_not_move():
    config = settings()
    state, fixed, prompts = world(config=config)
    next(train.train(state, fixed, prompts, config))  # so that Adam has moments
    weights = [parameter.clone() for parameter in state.policy.parameters()]
    moments = [own["exp_avg"].clone() for own in state.optimizer.state.values()]
    first = explain.course_of(state, fixed, prompts, config)
    again = explain.course_of(state, fixed, prompts, config)
    assert all(map(torch.equal, weights, state.policy.parameters()))
    assert all(map(torch.equal, moments, (own["exp_avg"] for own in state.optimizer.state.values())))
    assert state.next_update == 1 and first.updates == again.updates
    assert torch.equal(first.outputs[-1].logprobs, again.outputs[-1].logprobs)


def test_the_batch_has_the_means_over_all_of_its_tokens(trace):
    before, after = trace["batch"]["epochs"][0], trace["batch"]["epochs"][-1]
    pairs = [pair for row in trace["rows"] for pair in zip(row["tokens"], row["epochs"][-1]["tokens"], strict=True)]
    assert trace["batch"]["n_rows"] == 4 and trace["batch"]["n_tokens"] == len(pairs)
    d = [old["logprob"] - new["logprob"] for old, new in pairs]
    assert_close(after["kl_k3"], sum(math.exp(-x) - 1 + x for x in d) / len(d))
    assert_close(after["clip_fraction"], sum(new["is_clipped"] for _, new in pairs) / len(d))
    assert_close(after["value_error"], sum(abs(new["value"] - old["return"]) for old, new in pairs) / len(d))
    ratios = [new["ratio"] for _, new in pairs]
    assert (after["ratio_min"], after["ratio_max"]) == (min(ratios), max(ratios))
    assert (before["kl_k3"], before["clip_fraction"], before["ratio"]) == (0.0, 0.0, 1.0)


def test_equations_are_the_lines_of_the_code():
    root = Path(explain.__file__).parent
    for equation in explain.equations():
        lines = (root / equation["file"]).read_text(encoding="utf-8").splitlines()
        source = equation["source"].splitlines()
        found = lines[equation["line"] - 1 : equation["line"] - 1 + len(source)]
        assert [line.strip() for line in found] == [line.strip() for line in source]
        assert not source[0].startswith(("def ", '"""')) and "raise" not in "".join(source[:2])
        assert any(line.strip().startswith("return ") for line in source)
    names = {equation["name"] for equation in explain.equations()}
    assert {"kl_estimate", "shape_rewards", "estimate_advantages", "policy_losses", "value_losses"} <= names


def test_a_trace_is_what_json_can_hold(trace):
    assert json.loads(json.dumps(trace)) == trace


def test_a_token_of_a_tokenizer_that_marks_spaces_keeps_its_space(t5_folder):
    from loading import load_tokenizer

    tokenizer = load_tokenizer(str(t5_folder))
    ids = tokenizer("The film is", add_special_tokens=False).input_ids
    assert "".join(explain.token_text(tokenizer, token) for token in ids) == " The film is"
    assert explain.token_text(tokenizer, tokenizer.eos_token_id) == "</s>"


# ----------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------


def shown(*arguments: str) -> dict:
    """The numbers that the task writes."""
    Path("t.json").unlink(missing_ok=True)
    assert run_main("--task", "explain", *arguments, "--output", "t.json") == 0
    return json.loads(Path("t.json").read_text(encoding="utf-8"))


def test_without_a_run_the_first_update_of_the_built_in_world_is_shown(empty, capsys):
    """The stages are trained as before `train`, and on standard output is the table alone."""
    assert run_main("--task", "explain", *flags()) == 0
    output, errors = capsys.readouterr()
    assert output.startswith("the first update of saved_models/tiny/sft\n") and "teaching demonstration" in errors
    assert sorted(path.name for path in (empty / "saved_models/tiny").iterdir()) == ["reward", "sft"]
    trace = shown(*flags(), "--row", "2", "--row", "0", "--row", "2")
    assert [row["row"] for row in trace["rows"]] == [2, 0]
    assert {token["kl"] for row in trace["rows"] for token in row["tokens"]} == {0.0}
    assert (trace["update"], trace["batch"]["n_rows"], len(trace["updates"])) == (0, 4, 2)


def test_the_prompts_that_are_given_are_the_batch(workplace, capsys):
    """In their order, asked of the run's policy, held to what it began with; the run stays as it is."""
    before = listing(workplace / PPO)
    asked = ["The film", "A comedy that", "My brother"]
    (workplace / "more.txt").write_text(asked[2] + "\n")
    trace = shown("--prompt", asked[0], "--prompt", asked[1], "--prompts", "more.txt", "--learning_rate", "0.01")
    assert [row["prompt"] for row in trace["rows"]] == asked and [row["row"] for row in trace["rows"]] == [0, 1, 2]
    assert trace["batch"]["n_rows"] == 3 and trace["settings"]["learning_rate"] == 0.01
    assert max(abs(token["kl"]) for row in trace["rows"] for token in row["tokens"]) > 1e-6
    tokens = [token for row in trace["rows"] for token in row["tokens"]]
    assert_close(sum(column(tokens, "whitened")), 0.0, atol=1e-4)
    assert len(tokens) == trace["whitening"]["n_tokens"]
    assert f"using {PPO}\n" in capsys.readouterr().err
    assert listing(workplace / PPO) == before


def test_a_runs_policy_and_a_named_model_are_shown_on_the_same_prompts(workplace):
    named = ["--base_model_name", "saved_models/tiny/sft", "--reward_model_path", "saved_models/tiny/reward"]
    named += flags(prompt_tokens=8, max_prompt_length=12)
    trained, start = shown("--row", "1"), shown(*named, "--row", "1")
    assert trained["title"] == f"an update of {PPO}" and start["title"] == "the first update of saved_models/tiny/sft"
    assert trained["rows"][0]["prompt"] == start["rows"][0]["prompt"]
    for trace in (trained, start):
        assert trace["update"] == 0 and [row["row"] for row in trace["rows"]] == [1]


@pytest.fixture(scope="module")
def steps(chain, tmp_path_factory) -> Path:
    """A finished run of four updates, with a checkpoint after each, in the folder `steps` of a workplace."""
    root = tmp_path_factory.mktemp("steps")
    shutil.copytree(chain.root / "saved_models", root / "saved_models")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("run.plot_training", lambda folder, notice="": folder / "plots/training.png")
        changes = flags(n_updates=4, learning_rate=0.01, kl_target=0.1, normalize_scores="")[:-2]
        more = ["--normalize_scores", "--save_every", "1", "--keep_checkpoints", "9", "--output_dir", "steps"]
        assert run_main("--task", "train", *changes, *more) == 0
    return root


@pytest.fixture
def run(steps, tmp_path, monkeypatch) -> Path:
    """That run, in the current directory, to be changed."""
    shutil.copytree(steps / "saved_models", tmp_path / "saved_models")
    shutil.copytree(steps / "steps", tmp_path / "steps")
    monkeypatch.chdir(tmp_path)
    return Path("steps")


def assert_is_what_was_logged(trace: dict, run: Path, number: int) -> None:
    """Texts, scores and the update's statistics, to the bit."""
    rows = [row for row in read_log(run) if row["step"] == str(number)]
    for row in trace["rows"]:
        logged = rows[row["row"]]
        assert (row["prompt"], row["response"]) == (logged["query"], logged["response"])
        assert row["raw_score"] == float(logged["reward"])
    stats = read_stats(run)[number]
    assert {name: stats[name] for name in trace["updates"][-1]} == trace["updates"][-1]
    assert trace["settings"]["kl_coef"] == stats["kl_coef"]
    assert trace["settings"]["learning_rate"] == stats["learning_rate"]
    assert "Response, score and statistics are those of steps/training_log.csv" in trace["note"]


@pytest.mark.parametrize(
    ("kept", "note"),
    [
        (["step_3", "step_4"], "Recomputed from steps/checkpoints/step_3.\n"),
        (["step_1", "step_4"], "Recomputed from steps/checkpoints/step_1, over 2 updates.\n"),
        (["step_4"], "Recomputed from the beginning of the run, over 3 updates, as no checkpoint is near.\n"),
    ],
)
def test_an_update_of_a_run_is_as_it_was(kept, note, run):
    for folder in (run / "checkpoints").iterdir():
        if folder.name not in kept:
            shutil.rmtree(folder)
    before = listing(run)
    trace = shown("--output_dir", "steps", "--update", "3", "--row", "1", "--row", "3")
    assert trace["title"] == "update 3 of steps" and trace["update"] == 3
    assert [row["row"] for row in trace["rows"]] == [1, 3]
    assert trace["note"].startswith(note)
    assert_is_what_was_logged(trace, run, 3)
    assert listing(run) == before


def test_an_update_of_a_run_that_went_on_for_longer_is_as_it_was_then(questions, t5_folder):
    """Of two updates, and then of four, which are more prompts and another learning rate."""
    train = ["--task", "train", "--output_dir", "steps"]
    ends = ["--save_every", "1", "--keep_checkpoints", "4"]
    assert run_main(*train, *question_flags(t5_folder), *ends, "--n_updates", "2") == 0
    assert run_main(*train, "--resume", "--n_updates", "4") == 0
    for number in (1, 3):
        assert_is_what_was_logged(shown("--output_dir", "steps", "--update", str(number)), Path("steps"), number)
    rates = [row["learning_rate"] for row in read_stats(Path("steps"))]
    assert rates[1] == pytest.approx(rates[0] / 2) and rates[3] == pytest.approx(rates[0] / 4)
    trace = shown("--output_dir", "steps", "--update", "0")  # before any checkpoint
    assert trace["note"].startswith("Recomputed from the beginning of the run.\n")
    assert_is_what_was_logged(trace, Path("steps"), 0)
    for folder in Path("steps/checkpoints").iterdir():  # so that updates of either plan are made again
        if folder.name != "step_4":
            shutil.rmtree(folder)
    for number in (2, 3):
        trace = shown("--output_dir", "steps", "--update", str(number), "--row", "2")
        assert trace["note"].startswith(f"Recomputed from the beginning of the run, over {number} updates")
        assert_is_what_was_logged(trace, Path("steps"), number)


def test_numbers_that_are_none_are_null_in_a_file(tmp_path):
    trace, _ = traced(ppo_epochs=1)
    trace["updates"][0]["loss"] = math.nan
    trace["batch"]["epochs"][0]["ratio_max"] = math.inf
    explain.write(trace, tmp_path / "t.json")
    found = json.loads((tmp_path / "t.json").read_text(), parse_constant=pytest.fail)
    assert found["updates"][0]["loss"] is None and found["batch"]["epochs"][0]["ratio_max"] is None


def test_an_update_is_nothing_to_other_tasks(workplace, capsys):
    asked = ["--task", "train", *flags(), "--update", "1", "--dry_run"]
    assert run_main(*asked) == 0
    assert "note: --task train does not read --update" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_by(run):
    (run / "checkpoints/step_2/weights.safetensors").write_bytes(b"")
    trace = shown("--output_dir", "steps", "--update", "2")
    assert trace["note"].startswith("Recomputed from steps/checkpoints/step_1, over 1 update.\n")
    assert_is_what_was_logged(trace, run, 2)


@pytest.mark.parametrize("changes", [["--lora_r", "2"], ["--critic", "separate"]])
def test_an_update_of_a_run_with_new_weights_is_as_it_was(changes, questions, t5_folder):
    """An adapter is drawn at random when the run begins, as it is here; its policy is read, too."""
    train = ["--task", "train", *question_flags(t5_folder), *changes, "--output_dir", "steps"]
    assert run_main(*train, "--keep_checkpoints", "0") == 0
    assert_is_what_was_logged(shown("--output_dir", "steps", "--update", "1", "--row", "2"), Path("steps"), 1)
    assert shown("--output_dir", "steps")["title"] == "an update of steps"


def test_what_differs_from_the_log_is_told(run):
    log = run / "training_log.csv"
    rows = read_log(run)
    rows[5]["response"] = "Something else"  # update 1, row 1
    rows[6]["reward"] = "0.25"
    with log.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows[:7])
    stats = read_stats(run)
    stats[1]["grad_norm"] *= 1.5
    (run / "training_stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stats))
    trace = shown("--output_dir", "steps", "--update", "1", "--row", "0", "--row", "1", "--row", "2", "--row", "3")
    norm = trace["updates"][-1]["grad_norm"]
    assert trace["note"].endswith(
        "It differs from what steps/training_log.csv and training_stats.jsonl have: "
        "the response of row 1 was 'Something else'; "
        "the score of row 2 was 0.25; it has no row 3 of that update; "
        f"the update's grad_norm was {1.5 * norm:.4g}, and is {norm:.4g}."
    )
    stats[1] |= {"kl": 7.0, "explained_variance": 0.5}
    (run / "training_stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stats))
    trace = shown("--output_dir", "steps", "--update", "1", "--row", "0")
    assert "the update's kl was 7, and is" in trace["note"] and "(2 more of its statistics differ)" in trace["note"]


def test_an_update_that_ended_early_says_so(run):
    """Also where its one epoch is not whole: the first step is taken, and the second one finds it too far."""
    asked = ["--output_dir", "steps", "--target_kl", "1e-12"]
    trace = shown(*asked, "--ppo_epochs", "1")
    assert "\n--target_kl ended the update after 1 of its 2 optimizer steps." in trace["note"]
    assert "ended the update" not in shown("--output_dir", "steps", "--target_kl", "9")["note"]


def test_what_cannot_be_shown_is_refused_before_any_work(run, monkeypatch, capsys):
    here = Path.cwd()
    monkeypatch.setattr("explain.scene_of", None)
    task = ["--task", "explain", "--output_dir", "steps"]
    assert_refused(
        capsys, here, [*task, "--update", "4"], "--update 4 is beyond steps, whose 4 updates are counted from 0"
    )
    assert_refused(capsys, here, [*task, "--update", "-2"], "--update is -2, expected a value in [-1, inf)")
    assert_refused(
        capsys, here, [*task, "--update", "1", "--row", "4"], "--row 4 is beyond the batch, whose 4 responses"
    )
    assert_refused(capsys, here, [*task, "--row", "x"], "--row is ['x'], expected whole numbers")
    assert_refused(capsys, here, [*task, "--row", "-1"], "--row is -1, expected a value in [0, inf)")
    assert_refused(
        capsys, here, [*task, "--prompt", "A", "--row", "1"], "--row 1 is beyond the batch, whose 1 responses"
    )
    assert_refused(capsys, here, [*task, "--prompt", " "], "a prompt is empty")
    assert_refused(
        capsys, here, [*task, "--prompt", "A", "--update", "1"], "--update 1 of a run has prompts of its own"
    )
    assert_refused(capsys, here, [*task, "--update", "1", "--kl_coef", "3"], "--update: --kl_coef is 3.0, and the run")
    assert_refused(capsys, here, [*task, "--output", "t.csv"], "expected a name that ends in .html or .json")
    (here / "t.html").write_text("mine")
    assert_refused(capsys, here, [*task, "--output", "t.html"], "--output t.html exists already; name another file")
    assert_refused(capsys, here, [*task, "--top_k", "3"], "are for --task generate")
    nowhere = ["--task", "explain", "--output_dir", "saved_models/tiny/sft"]
    for arguments in (nowhere, [*nowhere, "--update", "0"]):
        assert_refused(capsys, here, arguments, "--output_dir saved_models/tiny/sft holds", "no policy")
    (run / "value_head.safetensors").unlink()
    assert_refused(capsys, here, task, "a run that was not finished, and no policy")


def test_data_that_are_others_now_are_refused(questions, t5_folder, capsys):
    assert run_main("--task", "train", *question_flags(t5_folder), "--output_dir", "steps") == 0
    capsys.readouterr()
    lines = Path("prompts.jsonl").read_text()
    Path("other.jsonl").write_text(lines.replace("cost", "weigh"))
    file = Path("steps/run_config.json")
    file.write_text(file.read_text().replace('"prompts.jsonl"', '"other.jsonl"'))
    task = ["--task", "explain", "--output_dir", "steps", "--update", "1"]
    assert run_main(*task) == 2
    told = "error: steps began with 8 prompts of other rows than the 8 that there are now; give the data as it was"
    assert last_line_of_errors(capsys) == told


def test_a_dry_run_loads_and_shows_nothing(run, capsys):
    before = listing(Path.cwd())
    assert run_main("--task", "explain", "--output_dir", "steps", "--update", "3", "--dry_run") == 0
    assert capsys.readouterr().out == "dry run: update 3 of steps would be shown, with row 0 of its batch\n"
    assert listing(Path.cwd()) == before
