"""Time whole PPO steps (a rollout and the update on it) on a GPT-2 of random weights, beside the least they can take.

    python benchmarks/step.py --size b --matmul-precision medium --stages

Every prompt has query-len tokens and every response response-len, with no end of sequence, so that another program can
be given the same work. One line of JSON goes to standard output; with --stages a table of a step's parts to standard
error. Times are medians over quiet steps, in which other processes took less than 0.15 cores, or over all if none was.
`over_floor` is a step's time over `floor_s`, which floor.py explains. Linux only. On a GPU each timed part ends when
the device has done its work, so that parts do not overlap.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import main  # noqa: F401, I001  threads and memory as a run has them, set before torch is there

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import train
from benchmarks.floor import Size, flops, matrix_products, measure_floor
from benchmarks.machine import QUIET, cpu_seconds, foreign_cores, peak_mb, wait_quiet
from config import Config, UsageError
from prompts import Prompt
from device import prepare_device, settle_precision, work_of_run
from hub import prepare_config
from loading import load_reference, new_policy
from model import PolicyModel

SIZES = {
    "a": Size(128, 4, 4, 1024, batch=64, minibatch=64, query_len=8, response_len=24, ppo_epochs=4),
    "b": Size(768, 6, 12, 50257, batch=16, minibatch=16, query_len=16, response_len=48, ppo_epochs=4),
    "c": Size(768, 12, 12, 50257, batch=16, minibatch=4, query_len=8, response_len=24, ppo_epochs=4),
    "d": Size(768, 12, 12, 50257, batch=64, minibatch=16, query_len=128, response_len=384, ppo_epochs=4),  # for a GPU
    "e": Size(2048, 24, 16, 50257, batch=64, minibatch=8, query_len=128, response_len=384, ppo_epochs=4),  # likewise
}
PARTS = {  # what is timed, where train.py looks it up: "rollout" holds the two after it, "update" the last four
    "rollout": (train, "collect_rollout"),
    "sampling": (train, "respond"),
    "scoring": (train, "score_responses"),  # or "reference"
    "update": (train, "update"),
    "update forward": (train, "minibatch_loss"),
    "update backward": (torch.Tensor, "backward"),
    "clipping": (torch.nn.utils, "clip_grad_norm_"),
    "optimizer": (torch.optim.Adam, "step"),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--size", choices=SIZES, default="a", help="what the nine numbers after this one are, where not given")
    for name in Size._fields:
        option("--" + name.replace("_", "-"), type=positive)
    option("--steps", type=positive, default=3, help="timed steps; one that is not counted comes first")
    option("--max-steps", type=positive, help="go on until --steps of them were quiet, at most this many")
    option("--time-limit", type=float, default=math.inf, help="start no further step after these seconds")
    option("--wait-quiet", type=float, default=0, help="wait at most these seconds for idle cores before each step")
    option("--device", default="cpu", help="cpu or cuda")
    option("--threads", type=positive, default=2)
    option("--matmul-precision", default="highest", choices=("auto", "highest", "high", "medium"), help="of float32")
    option("--mixed-precision", default="no", choices=("no", "bf16"), help="bf16: autocast, as in a run's own option")
    option("--static-cache", action="store_true", help="as in a run's own option")
    option("--lr", type=float, default=1.41e-5)
    option("--kl-coef", type=float, default=0.2)
    option("--seed", type=int, default=0)
    option("--ragged", action="store_true", help="cut the responses to random lengths before the update")
    option("--stages", action="store_true", help="show where a step's time goes")
    option("--profile", default="", help="write torch.profiler's table of one more step to this file")
    args = parser.parse_args(arguments)
    for name, value in SIZES[args.size]._asdict().items():
        setattr(args, name, getattr(args, name) or value)
    return args


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def settings(args: argparse.Namespace) -> Config:
    model = {"base_model_name": "random", "n_embd": args.hidden, "n_head": args.heads}
    rows = {"batch_size": args.batch, "mini_batch_size": args.minibatch, "ppo_epochs": args.ppo_epochs}
    lengths = {"max_prompt_length": args.query_len, "max_new_tokens": args.response_len}
    others = {"learning_rate": args.lr, "kl_coef": args.kl_coef, "mixed_precision": args.mixed_precision}
    others |= {"device": args.device, "matmul_precision": args.matmul_precision, "seed": args.seed}
    others |= {"static_cache": args.static_cache}
    others |= {"n_updates": 10**6}  # so many that the learning rate stays
    return Config(**model, **rows, **lengths, **others)


def new_models(size: Size, config: Config) -> tuple[PolicyModel, train.Fixed]:
    """Policy and reference as a run loads them; token i is the word `ti`, and EOS an id that the model cannot draw."""
    vocab = {f"t{i}": i for i in range(size.vocab)} | {"<eos>": size.vocab}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    shape = {"vocab_size": size.vocab, "n_embd": size.hidden, "n_layer": size.layers, "n_head": size.heads}
    shape |= {"bos_token_id": None, "eos_token_id": None}  # GPT-2's own would end a response
    gpt2_config = GPT2Config(**shape, n_positions=max(1024, size.query_len + size.response_len))
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(prepare_config(gpt2_config)).save_pretrained(folder)
        policy = new_policy(config, folder, torch.device(config.device))
        reference = load_reference(config, folder, policy)

    def low_ids(prompts: list[str], responses: list[str], rows: list[dict]) -> torch.Tensor:
        low = [[int(word[1:]) < size.vocab // 2 for word in response.split()] for response in responses]
        return torch.tensor(low).float().mean(1)

    return policy, train.Fixed(reference=reference, tokenizer=tokenizer, terms={"reward_fn": low_ids})


@contextmanager
def stopwatch(reference: PolicyModel) -> Iterator[Counter]:
    """Seconds spent in each of the parts, for as long as the block runs."""
    spent = Counter()
    wait = torch.cuda.synchronize if reference.device.type == "cuda" else lambda: None

    def timed(part: str, function):
        def call(*args, **kwargs):
            wait()
            started = time.perf_counter()
            result = function(*args, **kwargs)
            wait()
            spent["reference" if args[0] is reference else part] += time.perf_counter() - started
            return result

        return call

    with ExitStack() as stack:
        for part, place in PARTS.items():
            stack.enter_context(patch.object(*place, timed(part, getattr(*place))))
        yield spent


def cut_responses(collect_rollout: Callable, seed: int) -> Callable:
    """`collect_rollout` with its responses cut to lengths uniform in 1 to the longest."""
    rng = np.random.default_rng(seed)

    def collect(*args) -> train.Rollout:
        rollout = collect_rollout(*args)
        rows, longest = rollout.mask.shape
        lengths = torch.from_numpy(rng.integers(1, longest + 1, (rows, 1)))
        return replace(rollout, mask=(torch.arange(longest) < lengths).to(rollout.mask.device))

    return collect


def random_prompts(config: Config, n: int, vocab: int, seed: int) -> list[Prompt]:
    ids = np.random.default_rng(seed).integers(0, vocab - 1, (n, config.max_prompt_length)).tolist()
    return [Prompt(" ".join(f"t{i}" for i in row), row, {}) for row in ids]


def new_steps(
    policy: PolicyModel, fixed: train.Fixed, config: Config, is_ragged: bool = False
) -> Iterator[dict[str, float]]:
    """Steps of a run, each as it was: seconds in all and in its parts, CPU seconds, foreign cores, reward, KL."""
    vocab = policy.language_model.config.vocab_size
    prompts = random_prompts(config, 100 * config.batch_size, vocab, config.seed)
    state = train.new_state(policy, config)
    with ExitStack() as stack:
        if is_ragged:
            cut = cut_responses(train.collect_rollout, config.seed)
            stack.enter_context(patch.object(train, "collect_rollout", cut))
        spent = stack.enter_context(stopwatch(fixed.reference))
        before, started = cpu_seconds(), time.perf_counter()
        for rollout, _ in train.train(state, fixed, prompts, config):
            parts, total = Counter(spent), time.perf_counter() - started
            load = {"cpu": time.process_time() - before[0], "foreign": foreign_cores(before, total)}
            figures = {"reward": rollout.raw_scores.mean().item(), "kl": rollout.kl.sum(1).mean().item()}
            yield {"total": total, "parts": parts, **load, **figures}
            spent.clear()
            before, started = cpu_seconds(), time.perf_counter()


def timed_steps(steps: Iterator[dict], args: argparse.Namespace) -> list[dict]:
    """One step to warm up, then as many as asked for, or with --max-steps until as many were quiet, in --time-limit."""
    started, laps = time.perf_counter(), []
    next(steps)
    while len(laps) < (args.max_steps or args.steps) and sum(lap["foreign"] < QUIET for lap in laps) < args.steps:
        if laps and time.perf_counter() - started > args.time_limit:
            break
        wait_quiet(args.wait_quiet)
        laps.append(next(steps))
    return laps


def summary(laps: list[dict]) -> dict:
    """The steps' times and results, under the names that the benchmarks of other programs give them."""
    quiet = [lap for lap in laps if lap["foreign"] < QUIET]

    def typical(seconds) -> float:
        return median(seconds(lap["total"], lap["parts"]) for lap in quiet or laps)

    return {
        "generate_s": typical(lambda total, parts: parts["sampling"]),
        "step_s": typical(lambda total, parts: total - parts["sampling"]),
        "total_s": typical(lambda total, parts: total),
        "forward_pass_s": typical(lambda total, parts: parts["scoring"] + parts["reference"]),
        "optimize_step_s": typical(lambda total, parts: parts["update"]),
        "quiet_steps": len(quiet),
        "total_s_all": [round(lap["total"], 4) for lap in laps],
        "foreign_cores_all": [round(lap["foreign"], 2) for lap in laps],
        "cpu_s": median(lap["cpu"] for lap in quiet or laps),
        "total_s_min": min(lap["total"] for lap in quiet or laps),
        "mean_reward": [round(lap["reward"], 4) for lap in laps],
        "objective_kl": [round(lap["kl"], 4) for lap in laps],
    }


def rates(times: dict, size: Size, square: float) -> dict[str, float]:
    """Tokens a second, drawn in sampling and read in the update (prompts, too, in every epoch), and at what share of
    the rate of large square products.
    """
    work = matrix_products(size)
    drawn, read = size.batch * size.response_len, size.batch * (size.query_len + size.response_len) * size.ppo_epochs
    update = flops(work["update forward"]) + flops(work["update backward"])
    return {
        "sampling_tokens_per_s": drawn / times["generate_s"],
        "update_tokens_per_s": read / times["optimize_step_s"],
        "sampling_over_squares": flops(work["sampling"]) / 1e9 / times["generate_s"] / square,
        "update_over_squares": update / 1e9 / times["optimize_step_s"] / square,
    }


def static_mb(policy: PolicyModel, fixed: train.Fixed, interpreter: float) -> dict[str, float]:
    """What of the peak no batch makes larger; the rest of it is activations, logits, and what they leave."""
    weights = weights_mb(policy)
    return {
        "interpreter": interpreter,
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "reference": weights_mb(fixed.reference),
    }


def weights_mb(model: torch.nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def device_figures(device: torch.device) -> dict:
    """Of a GPU: its name, and the most memory that tensors had there, and that torch held for them."""
    if device.type != "cuda":
        return {}
    peaks = {"peak_gpu_mb": torch.cuda.max_memory_allocated(), "held_gpu_mb": torch.cuda.max_memory_reserved()}
    return {"gpu": torch.cuda.get_device_name(device)} | {name: held / 2**20 for name, held in peaks.items()}


def print_parts(laps: list[dict], size: Size, square: float) -> None:
    """Each part's seconds and share of the step; of matrix products also GFLOP, and the ratio to their floor."""
    work, total = matrix_products(size), median(lap["total"] for lap in laps)
    print(f"{'part':16}{'s':>9}{'share':>8}{'GFLOP':>10}{'x floor':>9}", file=sys.stderr)
    for part in laps[0]["parts"]:
        seconds, gflop = median(lap["parts"][part] for lap in laps), flops(work.get(part, Counter())) / 1e9
        products = f"{gflop:10.1f}{seconds * square / gflop:9.2f}" if gflop else ""
        print(f"{part:16}{seconds:9.3f}{seconds / total:8.1%}{products}", file=sys.stderr)


def write_profile(steps: Iterator[dict], file: str) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        next(steps)
    tables = (profiler.key_averages(group_by_input_shape=by_shape) for by_shape in (False, True))
    Path(file).write_text("\n\n".join(table.table("self_cpu_time_total", row_limit=40) for table in tables))


def run(args: argparse.Namespace) -> dict:
    """What is printed as JSON."""
    interpreter = peak_mb()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    size, config = Size(*(getattr(args, name) for name in Size._fields)), settings(args)
    device = prepare_device(config)
    policy, fixed = new_models(size, config)
    settle_precision(policy.language_model, work_of_run(config), config)
    floor = measure_floor(size, torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32, device)
    steps = new_steps(policy, fixed, config, args.ragged)
    laps = timed_steps(steps, args)
    times, peak = summary(laps), peak_mb()
    if args.stages:
        print_parts([lap for lap in laps if lap["foreign"] < QUIET] or laps, size, floor["gflops_squares"])
    if args.profile:
        write_profile(steps, args.profile)
    return {
        "impl": "this project",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "matmul_precision": torch.get_float32_matmul_precision(),
        "attn": policy.language_model.config._attn_implementation,
        "fused_adam": True,
        "mixed_precision": args.mixed_precision,
        "static_cache": args.static_cache,
        "params": sum(p.numel() for p in policy.parameters()),
        "config": {**size._asdict(), "steps": args.steps, "lr": args.lr, "seed": args.seed},
        **times,
        "samples_per_s": size.batch / times["total_s"],
        **rates(times, size, floor["gflops_squares"]),
        **floor,
        "over_floor": times["total_s"] / floor["floor_s"],
        "peak_rss_mb": peak,
        **device_figures(device),
        "static_mb": static_mb(policy, fixed, interpreter),
    }


if __name__ == "__main__":
    try:
        print(json.dumps(run(parse())))
    except UsageError as error:
        sys.exit(f"error: {error}")
