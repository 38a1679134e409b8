"""What a change to PPO does on the built-in world: each experiment one command, ending in a figure and what came of it.

    python benchmarks/experiments.py frontier            # or another name of EXPERIMENTS in variants.py, or all
    python benchmarks/experiments.py frontier --seeds 0 1 2

Every run is the demonstration made smaller, with the changes of a row of VARIANTS and no other; all start from the same
language model and classifier, trained once. At the end it is said in how many seeds what was expected is so. A run is a
file below --output: what is there is not trained again, and figures are drawn from it. Results: docs/experiments.md.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import main as command_line  # noqa: E402
from benchmarks.variants import EXPERIMENTS, VARIANTS, Experiment, Variant, config_of  # noqa: E402
from config import Config, RunError  # noqa: E402
from evaluation import add_judgements, evaluate_policy, load_fluency_judge, load_text_judge, summarise  # noqa: E402
from files import write_whole  # noqa: E402
from folders import stage_folder  # noqa: E402
from loading import load_tokenizer  # noqa: E402
from model import PolicyModel  # noqa: E402
from plot import COLOURS, new_figure, save_figure  # noqa: E402
from ppo import penalise_missing_eos  # noqa: E402
from preflight import check_invariants  # noqa: E402
from prompts import batch_of  # noqa: E402
from report import alarms, log_row  # noqa: E402
from run import Prompts, load_models  # noqa: E402
from train import Fixed, new_state, train  # noqa: E402

AXES = {
    "kl_k1": "KL (nats a response)",
    "ratio_max": "largest ratio",
    "ref_perplexity": "perplexity to the reference",
    "explained_variance": "explained variance",
    "grad_norm": "gradient norm",
    "clip_fraction": "clipped (share of tokens)",
    "response_length": "response length (tokens)",
    "distinct_bigrams": "distinct pairs (share of pairs)",
    "reward_reward_fn": "words of praise a response",
}
BASELINE = "Where nothing else is said: β 0.07, ε 0.2, λ 1, 2 epochs of 2 steps."

# --------------------------------------------------------------------------------------------------------------------
# A run
# --------------------------------------------------------------------------------------------------------------------


def models_of(config: Config) -> tuple[PolicyModel, Fixed, Prompts]:
    """As a run of `--task train` has them, on the stages that all share."""
    return load_models(config, *(str(stage_folder(config, stage)) for stage in ("sft", "reward")))


@cache
def judges() -> tuple:
    """The independent judges of `--task evaluate`."""
    config = config_of("baseline", seed=0)
    return load_text_judge(config), load_fluency_judge(config, load_tokenizer(str(stage_folder(config, "sft"))))


@contextmanager
def frozen(module: torch.nn.Module) -> Iterator[None]:
    """Without gradients for its parameters."""
    try:
        module.requires_grad_(False)
        yield
    finally:
        module.requires_grad_(True)


def warm_up(policy: PolicyModel, fixed: Fixed, prompts: Prompts, config: Config, n_updates: int) -> None:
    """Train the value head, and the critic's own trunk if it has one, on rollouts that the run does not see again."""
    config = replace(config, n_updates=n_updates, seed=config.seed + 1000)
    with frozen(policy.language_model):
        for _ in train(new_state(policy, config), fixed, prompts.train, config):
            pass


def patching(variant: Variant):
    """A context in which stands what the variant has patched, if it has."""
    return patch.object(*variant.patched) if variant.patched else nullcontext()


def trained(variant: Variant, policy: PolicyModel, fixed: Fixed, prompts: Prompts, config: Config) -> list[dict]:
    """Train the policy as the variant says; its log rows."""
    if not variant.is_trained:
        return []
    with patching(variant):
        if variant.warm_up:
            warm_up(policy, fixed, prompts, config, variant.warm_up)
        updates = train(new_state(policy, config), fixed, prompts.train, config)
        return [log_row(number, rollout, stats, config) for number, (rollout, stats) in enumerate(updates)]


def start_up_check(name: str) -> str:
    """What a run of `--task train` would say of the variant before its first update."""
    config = config_of(name, seed=0)
    policy, fixed, prompts = models_of(config)
    try:
        with patching(VARIANTS[name]):
            check_invariants(policy, fixed, batch_of(prompts.train, config.batch_size, 0, config.seed), config)
    except RunError as error:
        return f"refuses it: {error}"
    return "sees nothing wrong"


def play(name: str, seed: int) -> dict:
    """A whole run: trained, and judged on held-out prompts, the latter without what the variant has patched."""
    started = time.process_time()
    config = config_of(name, seed)
    torch.manual_seed(seed)
    policy, fixed, prompts = models_of(config)
    history = trained(VARIANTS[name], policy, fixed, prompts, config)
    seconds = time.process_time() - started
    rows = evaluate_policy(policy, fixed, prompts.held_out, config)
    add_judgements(rows, *judges(), fixed.tokenizer.pad_token_id)
    return {
        "config": asdict(config),
        "history": history,
        "alarms": list(alarms(history, config.batch_size).values()) if history else [],
        "figures": summarise(rows),
        "samples": [{column: row[column] for column in ("query", "response", "reward")} for row in rows[:8]],
        "seconds": seconds,
    }


def run_of(name: str, seed: int, folder: Path) -> dict:
    """The run of a variant and seed: as an earlier start has left it, or played now."""
    path = folder / f"{name}-seed-{seed}.json"
    wanted = json.loads(json.dumps(asdict(config_of(name, seed))))
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["config"] == wanted:
            return found
    print(f"--- {name}, seed {seed}", flush=True)
    run = play(name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(run, indent=1))
    return run


def figures_of(run: dict) -> dict[str, float]:
    """What is said of a run: how it was judged at its end, and how it came there, the first third being `early`."""
    history = run["history"]
    figures = run["figures"] | {"seconds": run["seconds"], "alarms": len(run["alarms"])}
    if not history:
        return figures
    third = len(history) // 3

    def mean(column: str, rows: list[dict] = history) -> float:
        return fmean(row[column] for row in rows)

    return figures | {
        "early_reward": mean("reward", history[:third]),
        "early_explained": mean("explained_variance", history[:third]),
        "explained_variance": mean("explained_variance", history[-third:]),
        "entropy": mean("entropy", history[-1:]),
        "clip_fraction": mean("clip_fraction"),
        "ratio_max": max(row["ratio_max"] for row in history),
        "step_kl": mean("approx_kl_k3"),
        "grad_norm": mean("grad_norm"),
    }


# --------------------------------------------------------------------------------------------------------------------
# The best that a price of KL can buy
# --------------------------------------------------------------------------------------------------------------------


def tilted(scores: torch.Tensor, kl_coef: float) -> tuple[torch.Tensor, float]:
    """Weights of samples of ρ, (prompts, samples), that make them samples of π* ∝ ρ exp(s / β); and KL(π* || ρ).

    KL = Σ w log(n w), in nats, the mean over prompts: from n samples each it is log n at most, and an estimate.
    """
    weights = (scores / kl_coef).softmax(1)
    kl = math.log(scores.shape[1]) - torch.special.entr(weights).sum(1)
    return weights, kl.mean().item()


def reference_rows(path: Path, n_prompts: int = 64, n_samples: int = 32) -> torch.Tensor:
    """Of responses of the reference to held-out prompts, reward and whether it ended: (2, prompts, samples)."""
    if not path.exists():
        print("--- responses of the reference", flush=True)
        config = config_of("baseline", seed=0)
        policy, fixed, prompts = models_of(config)
        rows = evaluate_policy(policy, fixed, prompts.held_out[:n_prompts] * n_samples, config)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps([[row["reward"], row["ended"]] for row in rows]))
    pairs = torch.tensor(json.loads(path.read_text(encoding="utf-8")), dtype=torch.float64)
    return pairs.view(n_samples, n_prompts, 2).permute(2, 1, 0).contiguous()


def best_frontier(path: Path) -> list[tuple[float, float]]:
    """KL and reward of π* for prices from 10 to 0.003, by weighing responses of the reference."""
    rewards, ended = reference_rows(path)
    penalty = config_of("baseline", seed=0).missing_eos_penalty
    scores = penalise_missing_eos(rewards.flatten(), ended.flatten().bool(), penalty).view_as(rewards)
    points = []
    for kl_coef in torch.logspace(1, -2.5, 60).tolist():
        weights, kl = tilted(scores, kl_coef)
        points.append((kl, (weights * rewards).sum(1).mean().item()))
    return points


# --------------------------------------------------------------------------------------------------------------------
# Figures, tables, verdicts
# --------------------------------------------------------------------------------------------------------------------


def plain_numbers(side) -> None:
    """At a logarithmic axis, as `save_figure` draws formulas letter by letter."""
    side.set_major_formatter("{x:g}")
    side.set_minor_formatter("")


def draw_curves(axis, column: str, runs: dict[str, list[dict]]) -> None:
    """A column over updates: of each variant the mean over seeds, in a band from the least to the greatest."""
    for colour, (name, seeds) in zip(COLOURS, runs.items(), strict=False):
        by_update = list(zip(*([row[column] for row in run["history"]] for run in seeds), strict=True))
        steps = range(len(by_update))
        axis.plot(steps, [fmean(some) for some in by_update], color=colour, label=VARIANTS[name].label, linewidth=1.2)
        axis.fill_between(steps, *([pick(some) for some in by_update] for pick in (min, max)), color=colour, alpha=0.15)
    if column == "ratio_max":
        axis.set_yscale("log")
        plain_numbers(axis.yaxis)
    if column == "explained_variance":
        axis.set_ylim(-1, 1)
    axis.set(xlabel="update", ylabel=AXES.get(column, column))
    axis.locator_params(axis="x", integer=True)


def draw_frontier(axis, runs: dict[str, list[dict]], best: list[tuple[float, float]]) -> None:
    """Every seed's end as a point, and the line that no policy is above, but for the error of its estimate."""
    axis.plot(*zip(*best, strict=True), color="#999999", linestyle="--", linewidth=1, label="best possible (estimate)")
    for colour, seeds in zip(COLOURS, runs.values(), strict=False):
        points = [(run["figures"]["kl"], run["figures"]["reward"]) for run in seeds]
        axis.plot(*zip(*points, strict=True), "o", color=colour, markersize=4)
    axis.set(xlabel="KL (nats a response)", ylabel="reward", xscale="log", xlim=(0.05, None))
    plain_numbers(axis.xaxis)
    axis.legend(fontsize=7, frameon=False)


def draw(name: str, runs: dict[str, list[dict]], path: Path, output: Path) -> None:
    """The figure of an experiment."""
    experiment = EXPERIMENTS[name]
    runs = {variant: seeds for variant, seeds in runs.items() if VARIANTS[variant].is_trained}
    axes = new_figure(3)
    for axis, column in zip(axes, experiment.panels, strict=False):
        draw_curves(axis, column, runs)
    if name == "frontier":
        draw_frontier(axes[-1], runs, best_frontier(output / "reference.json"))
    axes[0].legend(fontsize=7, frameon=False)
    n_seeds = len(next(iter(runs.values())))
    caption = f"{BASELINE} Lines: means over {n_seeds} seeds; bands: from the least of them to the greatest."
    save_figure(axes[0].figure, path, experiment.title, caption)


def spelled(values: list[float]) -> str:
    """Mean and standard deviation, of seeds, with three digits or so."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    mean = abs(fmean(values))
    form = ".3f" if mean < 0.1 else ".2f" if mean < 100 else ".0f" if mean < 1000 else ".1e"
    return f"{fmean(values):{form}} ± {deviation:{form}}"


def table(experiment: Experiment, runs: dict[str, list[dict]]) -> str:
    """A row a variant, a column a figure, in Markdown."""
    lines = ["| | " + " | ".join(experiment.figures) + " |", "|---" * (len(experiment.figures) + 1) + "|"]
    for name, seeds in runs.items():
        own = [figures_of(run) for run in seeds]
        cells = [spelled([each[key] for each in own]) if key in own[0] else "" for key in experiment.figures]
        lines.append(f"| {VARIANTS[name].label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(experiment: Experiment, runs: dict[str, list[dict]]) -> list[str]:
    """What was expected, and in how many seeds it is so."""
    figures = {name: [figures_of(run) for run in seeds] for name, seeds in runs.items()}
    n_seeds = len(next(iter(runs.values())))
    lines = []
    for claim in experiment.expected:
        count = sum(claim.holds(lambda name, key, seed=seed: figures[name][seed][key]) for seed in range(n_seeds))
        lines.append(f"- {claim.sentence} Held in {count} of {n_seeds} seeds.")
    return lines


def samples(runs: dict[str, list[dict]]) -> list[str]:
    """Of each variant and seed, the responses to two held-out prompts."""
    lines = []
    for name, seeds in runs.items():
        for run in seeds:
            for sample in run["samples"][4:6]:
                text = sample["query"] + " ..." + sample["response"]
                lines.append(f"{VARIANTS[name].label:20} ({sample['reward']:+.2f}) {text}")
    return lines


def report(name: str, seeds: list[int], output: Path, figures: Path) -> None:
    """Run what has not been run, draw, and print what came of it."""
    experiment = EXPERIMENTS[name]
    runs = {variant: [run_of(variant, seed, output) for seed in seeds] for variant in experiment.variants}
    path = figures / f"{name}.png"
    draw(name, runs, path, output)
    print(f"\n## {experiment.title}\n", table(experiment, runs), "\nExpected:\n", sep="\n")
    print(*verdicts(experiment, runs), "", *samples(runs), "", sep="\n")
    for variant in experiment.variants:
        if VARIANTS[variant].patched:
            print(f"of {VARIANTS[variant].label!r} the start-up check {start_up_check(variant)}")
    print(f"figure: {path}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("saved_models/experiments"), help="where the runs are kept")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/experiments", help="where the figures are put")
    args = parser.parse_args()
    config = config_of("baseline", seed=0)
    command_line.run_stages(config, command_line.starting_model(config), str(stage_folder(config, "reward")))
    for name in EXPERIMENTS if args.name == "all" else [args.name]:
        report(name, args.seeds, args.output, args.figures)


if __name__ == "__main__":
    main()
