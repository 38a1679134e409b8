"""PPO by TRL 0.11.4 on the built-in world, for learning.py: run it in an environment of its own (see there)."""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


def new_trainer(settings: dict, models: Path, seed: int) -> PPOTrainer:
    """TRL's trainer with this project's numbers: same models, batches, learning rate, losses and Adam."""

    def load() -> AutoModelForCausalLMWithValueHead:
        base = AutoModelForCausalLM.from_pretrained(models / "sft", attn_implementation="eager")
        return AutoModelForCausalLMWithValueHead.from_pretrained(base, summary_dropout_prob=0.0)

    policy, reference = load(), load()
    shared = ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "gamma", "lam")
    config = PPOConfig(
        **{name: settings[name] for name in shared},
        learning_rate=settings["learning_rate"],
        init_kl_coef=settings["kl_coef"],
        adap_kl_ctrl=False,
        cliprange=settings["clip_range"],
        cliprange_value=settings["clip_range_value"],
        vf_coef=settings["value_coef"],
        max_grad_norm=settings["max_grad_norm"],
        ratio_threshold=1e9,  # never skip a batch
        seed=seed,
        accelerator_kwargs={"cpu": True},
    )
    optimizer = torch.optim.Adam(policy.parameters(), settings["learning_rate"], eps=1e-5, fused=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models / "sft")
    return PPOTrainer(config=config, model=policy, ref_model=reference, tokenizer=tokenizer, optimizer=optimizer)


def new_classifier(models: Path, tokenizer):
    """A function from texts to the probability of the last label."""
    classifier = AutoModelForSequenceClassification.from_pretrained(models / "reward").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models / "reward", padding_side="right")

    @torch.no_grad()
    def rewards(texts: list[str]) -> torch.Tensor:
        encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        logits = classifier(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits
        return logits.softmax(-1)[:, -1]

    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=Path, help="run_config.json of one of this project's runs")
    parser.add_argument("models", type=Path, help="the folder of the stages sft and reward")
    parser.add_argument("prompts", type=Path, help="JSON list of prompts, each a text")
    parser.add_argument("seed", type=int)
    parser.add_argument("precision", help="of float32 products, as torch names it")
    parser.add_argument("log", type=Path, help="written: a row an update")
    args = parser.parse_args()
    settings, prompts = (json.loads(path.read_text()) for path in (args.settings, args.prompts))
    torch.set_float32_matmul_precision(args.precision)
    threads = torch.get_num_threads()
    trainer = new_trainer(settings, args.models, args.seed)
    tokenizer, rewards = trainer.tokenizer, new_classifier(args.models, trainer.tokenizer)
    torch.set_num_threads(threads)  # accelerate may have changed them
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "min_length": -1}
    sampling |= {"max_new_tokens": settings["max_new_tokens"], "pad_token_id": tokenizer.pad_token_id}
    rows, order, seconds = [], [], 0.0
    for step in range(settings["n_updates"]):
        while len(order) < settings["batch_size"]:
            order += torch.randperm(len(prompts)).tolist()
        texts = [prompts[i] for i in order[: settings["batch_size"]]]
        order = order[settings["batch_size"] :]
        started = time.perf_counter()
        trainer.optimizer.param_groups[0]["lr"] = settings["learning_rate"] * (1 - step / settings["n_updates"])
        queries = [torch.tensor(ids) for ids in tokenizer(texts).input_ids]
        responses = trainer.generate(queries, batch_size=len(queries), return_prompt=False, **sampling)
        answers = tokenizer.batch_decode(
            [torch.cat(both) for both in zip(queries, responses, strict=True)], skip_special_tokens=True
        )
        scores = rewards(answers)
        stats = trainer.step(queries, responses, list(scores))
        seconds += time.perf_counter() - started
        length = sum(map(len, responses)) / len(responses)
        row = {"seconds": seconds, "reward": scores.mean().item(), "kl": float(stats["objective/kl"]), "length": length}
        rows.append(row)
        print(step, row, flush=True)
    args.log.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
