"""How fast PPO learns on the built-in world, beside TRL 0.11.4: reward over wall-clock time, and over KL.

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==0.11.4 transformers==4.46.3 rich
    python main.py --task train                                      # the models that both start from
    python benchmarks/learning.py trl/bin/python learning/

Both train the same language model for the same classifier's probability, with the same prompts, numbers of rows and
passes, learning rates, losses and KL coefficient, at temperature 1, as TRL scores at no other. They take turns, one run
a seed each, with the same threads, wait policy and precision of matrix products; TRL has eager attention, its fastest
at `medium`. What counts is the time until the mean reward of three updates is one that every run reaches.
Loading is not timed.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from files import read_rows  # noqa: E402

COLOURS = {"this project": "#332288", "TRL 0.11.4": "#e69f00"}


def run_ours(models: Path, folder: Path, seed: int, flags: list[str]) -> list[dict]:
    """Train by main.py; a row an update, with the seconds until its end."""
    stages = ["--base_model_name", str(models / "sft"), "--reward_model_path", str(models / "reward")]
    fixed = ["--preset", "tiny", "--temperature", "1", "--missing_eos_penalty", "0", "--seed", str(seed)]
    command = [sys.executable, str(ROOT / "main.py"), "--task", "train", *fixed, *stages, "--output_dir", str(folder)]
    subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)
    stats, timings = (read_rows(folder / name) for name in ("training_stats.jsonl", "timings.jsonl"))
    rows, seconds = [], 0.0
    for stat, timing in zip(stats, timings, strict=True):
        seconds += timing["seconds_rollout"] + timing["seconds_update"]
        names = {"reward": "reward", "kl": "kl_k1", "length": "response_length"}
        rows.append({"seconds": seconds} | {name: stat[column] for name, column in names.items()})
    return rows


def run_trl(python: str, models: Path, run: Path, prompts: Path, seed: int, log: Path) -> list[dict]:
    from transformers import AutoModelForCausalLM

    from config import Config
    from device import choose_precision, work_of_run

    config = Config(**json.loads((run / "run_config.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(models / "sft")
    script = Path(__file__).with_name("learning_trl.py")
    precision = choose_precision(model, work_of_run(config), config)
    command = [python, script, run / "run_config.json", models, prompts, str(seed), precision, log]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"} | os.environ  # how main.py has threads wait
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return json.loads(log.read_text())


def write_prompts(run: Path, path: Path) -> None:
    """The texts of the prompts that the run trained on."""
    from config import Config
    from loading import load_tokenizer
    from prompts import load_prompts

    config = Config(**json.loads((run / "run_config.json").read_text()))
    prompts = load_prompts(config, load_tokenizer(str(run)), "train", config.n_updates * config.batch_size)
    path.write_text(json.dumps([prompt.text for prompt in prompts]))


def smooth(rows: list[dict], width: int = 3) -> list[dict]:
    """Means of `width` updates up to each, with the seconds of the last."""
    windows = [rows[end - width : end] for end in range(width, len(rows) + 1)]
    names = ("reward", "kl", "length")
    return [{"seconds": w[-1]["seconds"]} | {name: fmean(row[name] for row in w) for name in names} for w in windows]


def at_reward(rows: list[dict], reward: float) -> dict:
    """The first row whose reward is as high."""
    return next(row for row in rows if row["reward"] >= reward)


def compare(runs: dict[str, list[list[dict]]], step: float = 0.01) -> dict:
    """The highest reward, in steps, that every run reaches; by program, its seconds, KL and length at that point."""
    smoothed = {name: [smooth(rows) for rows in seeds] for name, seeds in runs.items()}
    least = min(max(row["reward"] for row in rows) for seeds in smoothed.values() for rows in seeds)
    reward = int(least / step + 1e-9) * step
    found = {name: [at_reward(rows, reward) for rows in seeds] for name, seeds in smoothed.items()}
    first, other = found.values()
    ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(first, other, strict=True)]
    return {"reward": reward, "at_reward": found, "ratios": ratios, "median_ratio": median(ratios)}


def draw(runs: dict[str, list[list[dict]]], result: dict, path: Path) -> None:
    figure = Figure((10, 4), layout="constrained")
    over_time, over_kl = figure.subplots(1, 2)
    for name, seeds in runs.items():
        for number, rows in enumerate(map(smooth, seeds)):
            for axis, column in ((over_time, "seconds"), (over_kl, "kl")):
                label = name if number == 0 else None
                axis.plot(*([row[key] for row in rows] for key in (column, "reward")), color=COLOURS[name], label=label)
    over_time.axhline(result["reward"], color="gray", linewidth=0.8)
    over_time.set(xlabel="seconds", ylabel="reward, mean of three updates")
    over_kl.set(xlabel="KL (nats a response)", ylabel="reward, mean of three updates")
    over_time.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trl_python", help="the Python of an environment with TRL")
    parser.add_argument("folder", type=Path, help="a new folder: the runs, learning.json and learning.png")
    parser.add_argument("--models", type=Path, default=Path("saved_models/tiny"), help="the folder of sft and reward")
    parser.add_argument("--seeds", type=int, default=3)
    args, flags = parser.parse_known_args()  # the rest is for main.py: settings for both
    args.folder.mkdir(parents=True)
    prompts, runs = args.folder / "prompts.json", {name: [] for name in COLOURS}
    ours, trl = runs.values()
    for seed in range(args.seeds):
        run = args.folder / f"ours-{seed}"
        ours.append(run_ours(args.models, run, seed, flags))
        if not prompts.exists():
            write_prompts(run, prompts)
        trl.append(run_trl(args.trl_python, args.models, run, prompts, seed, args.folder / f"trl-{seed}.json"))
    result = compare(runs)
    for name, points in result["at_reward"].items():
        for seed, row in enumerate(points):
            point = f"reward {result['reward']:.2f} after {row['seconds']:.1f} s, KL {row['kl']:.2f}"
            print(f"{name:14} seed {seed}: {point}, length {row['length']:.1f}")
    print(f"time of this project / TRL: {result['median_ratio']:.2f} (median of {len(result['ratios'])})")
    (args.folder / "learning.json").write_text(json.dumps({"result": result, "runs": runs}, indent=1))
    draw(runs, result, args.folder / "learning.png")


if __name__ == "__main__":
    main()
