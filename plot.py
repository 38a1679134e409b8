"""What came of a run, to be read and looked at: tables and figures of its training curves and its evaluation."""

import json
import math
import textwrap
from itertools import chain, cycle
from pathlib import Path
from statistics import fmean

from checkpoint import check_writable, run_of
from config import UsageError

PANELS = {  # quantity and unit: the columns of training_stats.json that are drawn; reward has its terms, too
    "reward": ["reward"],
    "KL (nats a response)": ["kl_k1", "kl_k3"],
    "entropy (nats a token)": ["entropy"],
    "policy loss": ["policy_loss"],
    "value loss": ["value_loss"],
    "clipped (share of tokens)": ["clip_fraction", "value_clip_fraction"],
    "response length (tokens)": ["response_length"],
}
UNITS = {"kl": "(nats)", "length": "(tokens)", "vocabulary": "(words)", "ended": "(share)", "positive": "(share)"}
COLOURS = ("#332288", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#000000", "#d55e00", "#999999")

# What training may do to a text and no more: a rising reward with broken text is a failure.
BOUNDS = {
    "reward": ("higher", lambda before, after: after > before),
    "positive": ("on the built-in reviews, at least 90 %", lambda before, after: after >= 0.9),
    "length": ("70 to 130 % of before", lambda before, after: 0.7 <= after / before <= 1.3),
    "distinct_bigrams": ("at least 60 % of before", lambda before, after: after >= 0.6 * before),
    "ended": ("at most 10 points under before", lambda before, after: after >= before - 0.1),
    "kl": ("at most 15 nats", lambda before, after: after <= 15),
    "perplexity": ("at most 1.5 x before", lambda before, after: after <= 1.5 * before),
}


def read_json(path: Path, pick):
    """What `pick` takes from a file that a run left. Raises UsageError if there is none, or it is damaged."""
    try:
        return pick(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError):
        raise UsageError(f"{path.parent} holds no {path.name} of a run, or a damaged one") from None


def comparison_table(comparison: dict) -> str:
    """A line a figure, a column a policy; least and greatest values are left to the file. Beside two, the bound on the
    second and whether it holds; beside more, each one's paired difference from the first, with its 95 % interval.
    """
    figures, differences = comparison["figures"], comparison["differences"]
    first, width = next(iter(figures)), max(10, *(len(name) + 2 for name in figures))
    lines = [" " * 24 + "".join(f"{name:>{width}}" for name in figures) + "   should be" * (len(figures) == 2)]
    for name in [name for name in figures[first] if not name.endswith(("_min", "_max"))]:
        values = [own[name] for own in figures.values()]
        line = f"{name:24}" + "".join(f"{value:{width}.3f}" for value in values)
        if len(figures) == 2 and name in BOUNDS:
            line += "   {}: {}".format(BOUNDS[name][0], "yes" if BOUNDS[name][1](*values) else "NO")
        for other, paired in differences.items() if len(figures) > 2 else ():
            if name in paired:
                line += "   {} - {} {:+.3f} [{:+.3f}, {:+.3f}]".format(other, first, *paired[name].values())
        lines.append(line)
    return "\n".join(lines)


def reward_difference(comparison: dict) -> str:
    """A line a policy after the first: both mean rewards on the same prompts, and the interval of the difference."""
    (first, before), *others = ((name, own["reward"]) for name, own in comparison["figures"].items())
    return "\n".join(
        f"reward on {comparison['n_prompts']} held-out prompts: {before:.3f} {first}, {after:.3f} {name}; difference "
        "{:+.3f}, 95 % interval [{:+.3f}, {:+.3f}]".format(*comparison["differences"][name]["reward"].values())
        for name, after in others
    )


def sample_pairs(comparison: dict, count: int = 3) -> str:
    """A few prompts with each policy's response to it and the reward; those to which all respond alike come last."""
    lines, names = [], comparison["figures"]
    alike = [len({row[f"response_{name}"] for name in names}) == 1 for row in comparison["samples"]]
    for _, row in sorted(zip(alike, comparison["samples"], strict=True), key=lambda pair: pair[0])[:count]:
        lines.append(f"prompt  {row['query']!r}")
        for name in names:
            lines.append(f"  {name:6} ({row[f'reward_{name}']:+.2f}) {row[f'response_{name}'].strip()}")
    return "\n".join(lines)


def new_figure(n_panels: int) -> list:
    """The panels of a figure, three a row."""
    from matplotlib.figure import Figure  # a quarter of a second and 20 MB, for the end of a run

    rows, columns = math.ceil(n_panels / 3), min(n_panels, 3)
    figure = Figure((0.8 + 3 * columns, 1 + 2.4 * rows), layout="constrained")
    return [figure.add_subplot(rows, columns, i + 1) for i in range(n_panels)]


def save_figure(panel, path: Path, title: str, notice: str = "") -> Path:
    """Write a panel's figure with the panel's labels, a title and the notice's gist. Raises UsageError if it cannot."""
    panel.figure.legend(*panel.get_legend_handles_labels(), loc="outside right center", frameon=False)
    panel.figure.suptitle(textwrap.fill(title, int(12 * panel.figure.get_figwidth())), fontsize=10)
    panel.figure.supxlabel(notice.partition("\n")[0].rpartition(".")[0], wrap=True, fontsize=7)
    check_writable(path.parent)
    path.parent.mkdir(exist_ok=True)
    panel.figure.savefig(path, dpi=120)
    return path


def mean_columns(rows: list[dict], most: int = 50) -> dict[str, list[float]]:
    """The columns to be drawn, each value the mean of as many neighbouring updates as leave at most so many points."""
    names = ["step", *chain(*PANELS.values()), *(name for name in rows[0] if name.startswith("reward_"))]
    size = math.ceil(len(rows) / most)
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    return {name: [fmean(row[name] for row in block) for block in blocks] for name in names}


def plot_training(folder: Path, notice: str = "", runs: dict[str, Path] | None = None) -> Path:
    """Draw a run's curves into its plots/training.png, or those of named runs into plots/runs.png; return the path."""
    path, runs = folder / f"plots/{'runs' if runs else 'training'}.png", runs or {folder.name: folder}
    stats = {name: read_json(run / "training_stats.json", mean_columns) for name, run in runs.items()}
    terms = [x for own in stats.values() for x in own if x.startswith("reward_") and own[x] != own["reward"]]
    groups = {"reward": ["reward"]} | {term: [term] for term in terms} | PANELS
    *panels, frontier = new_figure(len(groups) + 1)
    for (name, own), colour, marker in zip(stats.items(), cycle(COLOURS), cycle("osD^vPX*"), strict=False):
        for axis, (label, columns) in zip(panels, groups.items(), strict=True):
            axis.set(xlabel="update", ylabel=label)
            axis.locator_params(axis="x", integer=True)
            for column, dash in zip(columns, "-:", strict=False):
                look = {"color": colour, "marker": marker, "markersize": 4, "markevery": 5, "linewidth": 1}
                axis.plot(own["step"], own.get(column, [math.nan] * len(own["step"])), dash, **look)
            if len(columns) > 1:
                axis.legend(axis.lines[: len(columns)], columns)
        last = math.ceil(len(own["step"]) / 5)  # a run ends where it is on average in its last fifth
        frontier.plot(own["kl_k1"], own["reward"], color=colour, alpha=0.3)
        frontier.plot(fmean(own["kl_k1"][-last:]), fmean(own["reward"][-last:]), marker, color=colour, label=name)
    frontier.set(xlabel="KL (nats a response)", ylabel="reward")
    return save_figure(frontier, path, f"PPO: {', '.join(map(str, runs.values()))}", notice)


def plot_comparison(folder: Path, notice: str = "") -> Path:
    """Draw results/comparison.json into plots/comparison.png: a panel a figure, a bar a policy and split."""
    splits = read_json(folder / "results/comparison.json", lambda content: content["splits"])
    policies = next(iter(splits.values()))["figures"]
    names = [x for x in next(iter(policies.values())) if not x.endswith(("_std", "_min", "_max"))]
    names = [x for x in names if not x.startswith("reward_") or any(p[x] != p["reward"] for p in policies.values())]
    panels, width = new_figure(len(names)), 0.8 / len(policies)
    for axis, name in zip(panels, names, strict=True):
        for i, (policy, colour) in enumerate(zip(policies, cycle(COLOURS), strict=False)):
            places = [x + (i + 0.5) * width - 0.4 for x in range(len(splits))]
            heights = [part["figures"][policy][name] for part in splits.values()]
            errors = [half_interval(part["figures"][policy], name, part["n_prompts"]) for part in splits.values()]
            axis.bar(places, heights, width, yerr=errors, ecolor="gray", capsize=3, color=colour, label=policy)
        axis.set(ylabel=f"{name} {UNITS.get(name, '')}", xticks=range(len(splits)), xticklabels=splits)
    return save_figure(panels[-1], folder / "plots/comparison.png", f"evaluation, 95 % intervals: {folder}", notice)


def half_interval(figures: dict[str, float], name: str, n: int) -> float:
    """1.96 standard errors of a mean over n prompts, or of a share that is not 0 or 1; NaN for anything else."""
    share = figures[name] if UNITS.get(name) == "(share)" else math.nan
    return 1.96 * figures.get(f"{name}_std", math.sqrt(share * (1 - share) or math.nan)) / math.sqrt(n - 1)


def show_comparison(folder: Path, notice: str = "") -> None:
    """Print what results/comparison.json says of each split, and draw it."""
    for split, comparison in read_json(folder / "results/comparison.json", lambda content: content["splits"]).items():
        print(f"{folder} on {comparison['n_prompts']} {split} prompts")
        print(comparison_table(comparison), reward_difference(comparison), sample_pairs(comparison), sep="\n")
    print(f"figures and every sample: {folder / 'results'}\ncomparison: {plot_comparison(folder, notice)}")


def plot(folder: Path, notice: str = "", policies: tuple[str, ...] = ()) -> None:
    """The `plot` task: a run's curves and comparison again, or the curves of several: NAME=FOLDER, or FOLDER alone."""
    runs = dict(map(run_of, policies))
    if len({Path(run) for run in runs.values()}) < len(policies):
        raise UsageError(f"--policies {' '.join(policies)}: expected NAME=FOLDER of each run, each of them once")
    print(plot_training(folder, notice, {name: Path(run) for name, run in runs.items()}))
    if not runs and (folder / "results/comparison.json").exists():
        show_comparison(folder, notice)


def plot_reliability(folder: Path, probabilities: list[float], right: list[bool], bins: int = 10) -> Path:
    """Draw how often a classifier is right against how certain it is: on the diagonal if its certainty is honest."""
    from sklearn.calibration import calibration_curve  # here, as it takes a second to import

    (axis,), (shares, certainties) = new_figure(1), calibration_curve(right, probabilities, n_bins=bins)
    axis.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    axis.plot(certainties, shares, "o")
    axis.set(xlabel="certainty", ylabel="share that is right")
    return save_figure(axis, folder / "plots/reliability.png", f"{folder}: {len(right)} held-out rows")
