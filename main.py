"""The command line: parse, seed, run the stages a task needs, dispatch."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait collapse on a shared core

from checkpoint import new_ppo_folder, new_stage_folder, notice, stage_folder, trained_stage
from config import USES_A_RUN, Config, RunError, UsageError, describe, parse_args

OUT_OF_MEMORY = (
    "out of memory; less is needed with a smaller --mini_batch_size (and a larger --gradient_accumulation_steps), "
    "--max_new_tokens or --max_prompt_length, or with --gradient_checkpointing"
)


def run(config: Config) -> None:
    """Run one task. Each task's module is imported in its own branch, so that --help does not wait for torch."""
    if config.task in USES_A_RUN:
        print(f"using {config.output_dir}")
    if config.task == "plot":
        from plot import plot

        return plot(Path(config.output_dir), notice(config), config.policies)
    base_model, reward_model = starting_model(config), config.reward_model_path or str(stage_folder(config, "reward"))
    if config.task == "generate":
        from generate import generate

        return generate(config, reward_model)
    if config.task == "evaluate":
        from evaluation import evaluate
        from plot import show_comparison

        evaluate(config, base_model, reward_model)
        return show_comparison(Path(config.output_dir), notice(config))
    run_training(config, base_model, reward_model)


def starting_model(config: Config) -> str:
    """The model that PPO starts from: the sft stage's where there is one or is to be one, else --base_model_name."""
    stage = stage_folder(config, "sft")
    from_stage = config.trains_from_scratch or config.sft_first or (stage.exists() and config.task != "sft")
    return str(stage) if from_stage else config.base_model_name


def run_training(config: Config, base_model: str, reward_model: str) -> None:
    """The task sft, reward or train, and before it the stages whose folders are not there yet; each seeds itself."""
    folder = new_ppo_folder(config) if config.task == "train" else new_stage_folder(config)
    print(*filter(None, [notice(config), describe(config)]), sep="\n")
    from classifier import run_reward
    from dataset import with_prompt_column
    from report import check_before_training
    from reward import needs_reward_model
    from sft import run_sft
    from train import train

    config = with_prompt_column(config)
    wants_reward = config.task == "train" and needs_reward_model(config) and not config.reward_model_path
    trains_reward = config.task == "reward" or (wants_reward and not trained_stage(config, reward_model, "reward"))
    check_before_training(config, trains_reward)
    from_stage = base_model == str(stage_folder(config, "sft"))
    if config.task == "sft" or (from_stage and not trained_stage(config, base_model, "sft")):
        run_sft(seeded(config))
    if trains_reward:
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
    except (UsageError, RunError) as error:
        return fail(str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        shortage = ("out of memory", "can't allocate memory", "not enough memory")
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in shortage):
            raise
        return fail(OUT_OF_MEMORY, 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    return 0


def fail(message: str, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
