"""What came of a run, to be read and looked at: tables and figures of its training curves and its evaluation."""

import json
import math
from pathlib import Path

from config import UsageError

PANELS = {  # title with unit: the columns of training_stats.json that are drawn in it
    "reward": ["reward"],
    "KL to the reference (nats a response)": ["kl_k1", "kl_k3"],
    "entropy (nats a token)": ["entropy"],
    "losses": ["policy_loss", "value_loss"],
    "clip fraction": ["clip_fraction", "value_clip_fraction"],
    "response length (tokens)": ["response_length"],
}

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


def read_json(path: Path):
    """What a file that a run left holds. Raises UsageError if there is none, or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(f"{path.parent} holds no {path.name} of a run") from None


def comparison_table(comparison: dict) -> str:
    """A line a figure, a column a policy; least and greatest values are left to the file.

    Beside two policies: the bound that the second should keep, and whether it does. Beside more: each one's paired
    difference from the first, with its 95 % interval.
    """
    figures = comparison["figures"]
    first, *others = figures
    width = max(10, *(len(name) + 2 for name in figures))
    lines = [" " * 24 + "".join(f"{name:>{width}}" for name in figures) + "   should be" * (len(others) == 1)]
    for name in means(figures[first]):
        values = [own[name] for own in figures.values()]
        line = f"{name:24}" + "".join(f"{value:{width}.3f}" for value in values)
        if len(others) == 1 and name in BOUNDS:
            bound, holds = BOUNDS[name]
            line += f"   {bound}: {'yes' if holds(*values) else 'NO'}"
        if len(others) > 1:
            line += "".join(
                "   {} - {} {:+.3f} [{:+.3f}, {:+.3f}]".format(other, first, *paired[name].values())
                for other, paired in comparison["differences"].items()
                if name in paired
            )
        lines.append(line)
    return "\n".join(lines)


def means(figures: dict) -> list[str]:
    """The names of a policy's figures without the extremes; a standard deviation is among them."""
    return [name for name in figures if not name.endswith(("_min", "_max"))]


def reward_difference(comparison: dict) -> str:
    """A line a policy after the first: both mean rewards on the same prompts, and the interval of the difference."""
    figures, lines = comparison["figures"], []
    first = next(iter(figures))
    for name, paired in comparison["differences"].items():
        lines.append(
            f"reward on {comparison['n_prompts']} held-out prompts: "
            f"{figures[first]['reward']:.3f} {first}, {figures[name]['reward']:.3f} {name}; difference "
            "{:+.3f}, 95 % interval [{:+.3f}, {:+.3f}]".format(*paired["reward"].values())
        )
    return "\n".join(lines)


def sample_pairs(comparison: dict, count: int = 3) -> str:
    """A few prompts with each policy's response to it and the reward."""
    lines = []
    for row in comparison["samples"][:count]:
        lines.append(f"prompt  {row['query']!r}")
        for name in comparison["figures"]:
            lines.append(f"  {name:6} ({row[f'reward_{name}']:+.2f}) {row[f'response_{name}'].strip()}")
    return "\n".join(lines)


def new_figure(n_rows: int, n_columns: int):
    """A figure that needs no screen, and its axes, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        n_rows, n_columns, figsize=(3.5 + 2.9 * (n_columns - 1), 3.25 * n_rows), squeeze=False, constrained_layout=True
    )
    return figure, list(axes.flat)


def save_figure(figure, path: Path, notice: str = "") -> Path:
    """Write a figure with the first line of the notice below it, forget it, and return its path."""
    from matplotlib import pyplot

    if notice:
        figure.supxlabel(notice.splitlines()[0], fontsize=7, color="gray")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def plot_training(folder: Path, notice: str = "") -> Path:
    """Draw the training curves of a run into plots/training.png, one panel a quantity, and return its path."""
    rows = read_json(folder / "training_stats.json")
    figure, axes = new_figure(2, 3)
    for axis, (title, names) in zip(axes, PANELS.items(), strict=True):
        for name in names:
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
        axis.set(title=title, xlabel="update")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(frameon=False)
    figure.suptitle(f"PPO: {folder}")
    return save_figure(figure, folder / "plots/training.png", notice)


def plot_comparison(folder: Path, notice: str = "") -> Path:
    """Draw results/comparison.json into plots/comparison.png: a panel a figure, a bar a policy and split."""
    splits = read_json(folder / "results/comparison.json")["splits"]
    policies = next(iter(splits.values()))["figures"]
    names = [name for name in means(next(iter(policies.values()))) if not name.endswith("_std")]
    figure, axes = new_figure(math.ceil(len(names) / 4), 4)
    for axis, name in zip(axes, names, strict=False):
        for number, (split, comparison) in enumerate(splits.items()):
            heights = [own[name] for own in comparison["figures"].values()]
            axis.bar([x + 0.4 * number for x in range(len(policies))], heights, 0.4, label=split)
        axis.set(title=name, xticks=[x + 0.2 * (len(splits) - 1) for x in range(len(policies))])
        axis.set_xticklabels(list(policies))
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", frameon=False)
    figure.suptitle(f"evaluation: {folder}")
    return save_figure(figure, folder / "plots/comparison.png", notice)


def show_comparison(folder: Path, notice: str = "") -> None:
    """Print what results/comparison.json says of each split, and draw it."""
    for split, comparison in read_json(folder / "results/comparison.json")["splits"].items():
        print(f"{folder} on {comparison['n_prompts']} {split} prompts")
        print(comparison_table(comparison), reward_difference(comparison), sample_pairs(comparison), sep="\n")
    print(f"figures and every sample: {folder / 'results'}\ncomparison: {plot_comparison(folder, notice)}")


def plot(folder: Path, notice: str = "") -> None:
    """The `plot` task: the training curves again, and the comparison where the run has been evaluated."""
    print(plot_training(folder, notice))
    if (folder / "results/comparison.json").exists():
        show_comparison(folder, notice)


def plot_reliability(folder: Path, probabilities: list[float], right: list[bool], bins: int = 10) -> Path:
    """Draw how often a classifier is right against how certain it is: on the diagonal if its certainty is honest."""
    points = reliability(probabilities, right, bins)
    figure, (axis,) = new_figure(1, 1)
    axis.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    axis.scatter([p[0] for p in points], [p[1] for p in points], [10 + 200 * p[2] / len(right) for p in points])
    axis.set(title=f"{folder}: {len(right)} held-out rows", xlabel="certainty", ylabel="share that is right")
    return save_figure(figure, folder / "plots/reliability.png")


def reliability(probabilities: list[float], right: list[bool], bins: int) -> list[tuple[float, float, int]]:
    """Mean certainty, share right and count of the rows in each bin of certainty that has any."""
    grouped: dict[int, list[tuple[float, bool]]] = {}
    for probability, hit in zip(probabilities, right, strict=True):
        grouped.setdefault(min(int(probability * bins), bins - 1), []).append((probability, hit))
    means = lambda rows, i: sum(row[i] for row in rows) / len(rows)  # noqa: E731
    return [(means(rows, 0), means(rows, 1), len(rows)) for _, rows in sorted(grouped.items())]
