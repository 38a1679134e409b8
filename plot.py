"""Figures from the files that a run wrote."""

import json
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


def read_stats(folder: Path) -> list[dict]:
    """The rows of a run's training_stats.json. Raises UsageError if there is none."""
    try:
        return json.loads((folder / "training_stats.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(f"{folder} holds no training_stats.json of a run") from None


def plot_training(folder: Path, notice: str = "") -> Path:
    """Draw the training curves of a run into plots/training.png, one panel a quantity, and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_stats(folder)
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for name in names:
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
        axis.set(title=title, xlabel="update")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(frameon=False)
    figure.suptitle(f"PPO: {folder}")
    if notice:
        figure.supxlabel(notice.splitlines()[0], fontsize=7, color="gray")
    path = folder / "plots" / "training.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
