"""The command line: parse, seed, run the stages a task needs, dispatch."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait collapse on a shared core

from checkpoint import new_ppo_folder, stage_folder
from config import Config, RunError, UsageError, parse_args


def run(config: Config) -> None:
    """Run one task. Each task's module is imported in its own branch, so that --help does not wait for torch."""
    if config.task in ("generate", "evaluate", "plot"):
        print(f"using {config.output_dir}")
    if config.task == "plot":
        from plot import plot_training

        return print(plot_training(Path(config.output_dir)))
    base_model = config.base_model_name or str(stage_folder(config, "sft"))
    reward_model = config.reward_model_path or str(stage_folder(config, "reward"))
    if config.task == "generate":
        from generate import generate

        return generate(config, reward_model)
    if config.task == "evaluate":
        from evaluation import evaluate

        return evaluate(config, base_model, reward_model)
    run_training(config, base_model, reward_model)


def run_training(config: Config, base_model: str, reward_model: str) -> None:
    """The task sft, reward or train, and before it the stages whose folders are not there yet; each seeds itself."""
    folder = new_ppo_folder(config) if config.task == "train" else None
    from sft import run_reward, run_sft
    from train import train

    if config.task == "sft" or (config.trains_from_scratch and not Path(base_model).exists()):
        run_sft(seeded(config))
    if config.task == "reward" or (config.task == "train" and not Path(reward_model).exists()):
        run_reward(seeded(config), base_model)
    if config.task == "train":
        train(seeded(config), base_model, reward_model, folder)


def seeded(config: Config) -> Config:
    """Seed torch for a stage, so that its result does not depend on whether the stages before it had to run."""
    import torch

    torch.manual_seed(config.seed)
    return config


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 for a request that cannot be met and 1 for work that failed, with one sentence on standard error."""
    try:
        run(parse_args(arguments))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
