"""What a training step of an instance-wise adapter costs against a plain LoRA, as ratios measured in one run.

    python scripts/bench/train_step.py [--parts gated einsum trl dense] [--device cuda] [--quick]

Variants take turns, round by round, and medians are compared: a busy neighbour then slows both. On a CPU the clock is
process time with one thread: threads that wait for each other on a busy machine burn it too, and ratios come out wrong.
Everything trains as `recllm train` does: on a bf16 model the matrix products of the adapter run in bf16 too (autocast)
over its fp32 weights, in all variants alike; TRL's trainer runs under its own bf16=True. Each part has a process of its
own and prints a line; the last line is one JSON object:

    gated_over_plain, gated_over_plain_memory    a step (forward, backward, AdamW) of the gated adapter against plain
                LoRA of the same rank; by model: SmolLM2, and a wider Llama with random weights. Memory on a GPU is the
                peak; on a CPU the weights plus the bytes that autograd keeps for the backward pass, each storage once
    loop_over_gated               a whole model whose layers loop over the experts, as released code does, against ours
    einsum_layer_over_gated       one linear layer as the product runs it (ILoraVariant in a PEFT layer) against the
                same layer whose variant makes (B, T, K, out) and sums over K, forward and backward from a given
                gradient, both without W x. einsum_with_base_over_gated: the whole layers, with W x. Some 40% of
                the other form's time on a CPU goes into new pages for (B, T, K, out): less in a process that holds
                freed memory of that size
    ours_over_trl                 seconds a real token on prompt/completion data (a prompt of 300 tokens on average, a
                title as the completion): recllm's trainer with the gated adapter against TRL's SFTTrainer with plain
                LoRA, same examples, batch size, dtype, and no gradient checkpointing in either
    dense_targets_per_s_over_single    titles with loss a second: windows of 10 titles against a prompt with 10 titles
                and one title as the completion

With --device cuda the wide model has 1.1 billion random weights in bf16, and the line also holds tokens a second, the
share of the GPU's dense bf16 peak and the peak memory. Floating-point operations a token: 4 · N for forward and the
backward pass of activations (the frozen weights need no gradient), 6 · the adapter's, and for attention, whose operands
all need a gradient, 6 · layers · T · hidden: 12 for the full square (PaLM, Chowdhery et al. 2022, appendix B), of which
a causal model needs half.
"""

import argparse
import copy
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from recllm.data import offline
from recllm.model.adapter import build_adapter
from recllm.model.base_model import load_base_model, load_tokenizer
from recllm.model.chat import answer_ids, encode, prompt_ids
from recllm.model.ilora import ILoraVariant, UsingRows
from recllm.model.sequence_encoder import make_encoder
from recllm.recipe import AdapterSection, EncoderSection, ModelSection
from recllm.train.collator import Collator, TokenizedExamples
from recllm.train.trainer import AdapterTrainer, completion_loss, computing_in, without_cudnn_attention

PARTS = ("gated", "einsum", "trl", "dense")
EXPERTS, RANK, ITEMS = 4, 8, 1000
# Dense bf16 peak in TFLOP/s, from the makers' data sheets, without sparsity; the first name that the device's holds
PEAKS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.0}
Step = Callable[[], None]


def main() -> None:
    """Measure the parts and print."""
    arguments = _arguments()
    line: dict[str, Any] = {
        "bench": "train_step",
        "threads": arguments.threads,
        "device": torch.cuda.get_device_name(0) if arguments.device == "cuda" else "cpu",
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
    }
    for part in arguments.parts:
        # a process each: memory that a part has freed spares the large tensors of another their new pages
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(measure, part, arguments).result()
        print(f"{part}: {json.dumps(found)}", flush=True)
        line |= found
    print(json.dumps(line))


def measure(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a part adds to the last line."""
    torch.set_num_threads(arguments.threads)
    measures = {"gated": measure_gated, "einsum": measure_einsum, "trl": measure_trl, "dense": measure_dense}
    with without_cudnn_attention():
        return measures[part](arguments)


# ---- gated against plain, and against a loop ----


def measure_gated(arguments: argparse.Namespace) -> dict[str, Any]:
    """Step time and memory of plain, gated and looping adapters in two models."""
    found: dict[str, Any] = {"gated_over_plain": {}, "gated_over_plain_memory": {}, "loop_over_gated": {}, "step": {}}
    for name, load in (("smollm2", lambda: _real(arguments)[0]), ("wide", lambda: wide_llama(arguments))):
        base = load().to(arguments.device)
        batch = _random_batch(base.config, arguments)
        tasks, models, memory = {}, {}, {}
        for method in ("plain", "gated", "loop"):
            models[method] = make_model(copy.deepcopy(base), method)
            tasks[method] = training_step(models[method], batch, None if method == "plain" else "representation")
        del base
        for method in models:
            memory[method] = step_memory(models[method], tasks[method], arguments.device)
        seconds = in_turns(tasks, arguments)
        found["gated_over_plain"][name] = _ratio(seconds["gated"], seconds["plain"])
        found["gated_over_plain_memory"][name] = _ratio(memory["gated"], memory["plain"])
        found["loop_over_gated"][name] = _ratio(seconds["loop"], seconds["gated"])
        tokens = batch["input_ids"].numel()
        found["step"][name] = {
            "parameters": _parameters(models["gated"]),
            "tokens": tokens,
            "seconds": {method: round(value, 5) for method, value in seconds.items()},
            "memory_mib": {method: round(value / 2**20) for method, value in memory.items()},
            "tokens_per_s": {method: round(tokens / value, 1) for method, value in seconds.items()},
            "share_of_peak": share_of_peak(models["gated"], arguments, tokens / seconds["gated"]),
        }
        del tasks, models
        gc.collect()
    return found


def make_model(base: Any, method: str) -> Any:
    """A trainable plain LoRA, our gated one, or the same one whose layers loop over the experts."""
    torch.manual_seed(0)
    encoder = make_encoder(EncoderSection(), ITEMS, 200, None)
    section = AdapterSection(method="lora" if method == "plain" else "ilora", r=RANK, num_experts=EXPERTS)
    model = build_adapter(base, section, encoder).to(next(base.parameters()).device).train()
    for module in model.modules():
        if isinstance(module, LoraLayer):  # as in AdapterTrainer.train
            module.cast_input_dtype_enabled = _compute_dtype(base.dtype) is None
    if method == "loop":
        for module in model.modules():
            if isinstance(module, LoraLayer) and "default" in module.lora_variant:
                module.lora_variant["default"] = LoopVariant(model.base_model)
    return model


class LoopVariant(LoraVariant):
    """The formula as a loop: Σ_k K · g_k · B_k (A_k x), an expert at a time."""

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def forward(  # type: ignore[override]  # PEFT's is a static method; this needs the tuner's gates
        self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> Any:
        """`result` (B, T, out) plus each expert's share."""
        weights = self.tuner.gate_rows.weights[active_adapter]  # (B, K)
        down: Any = module.lora_A[active_adapter].weight
        up: Any = module.lora_B[active_adapter].weight
        size = RANK // EXPERTS
        for k in range(EXPERTS):
            part = slice(k * size, (k + 1) * size)
            share = (x @ down[part].T) @ up[:, part].T  # (B, T, out)
            gate = (weights[:, k] * EXPERTS * module.scaling[active_adapter]).to(share)
            result = result + gate[:, None, None] * share
        return result


def training_step(model: Any, batch: dict[str, Any], gate: str | None) -> Step:
    """One whole step on a batch; `gate` names what the gate is given."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    labels = batch["labels"].to(device)
    inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items() if k != "labels"}
    if gate:
        generator = torch.Generator().manual_seed(0)
        inputs[gate] = torch.randn(len(labels), EncoderSection().hidden_size, generator=generator).to(device)

    def step() -> None:
        with computing_in(_compute_dtype(model.dtype), device.type):
            logits = model(**inputs, use_cache=False).logits
        total, count = completion_loss(logits, labels)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_memory(model: Any, step: Step, device: str) -> float:
    """Bytes: peak of a GPU; on a CPU the weights and what autograd keeps for the backward pass."""
    step()  # optimizer states are made in the first
    if device == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - sum(p.numel() * p.element_size() for p in model.parameters())
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - held)  # less the other variants' models, which wait there
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return float(sum(kept.values()) + sum(p.numel() * p.element_size() for p in model.parameters()))


def share_of_peak(model: Any, arguments: argparse.Namespace, tokens_per_s: float) -> float | None:
    """Of the GPU's dense bf16 peak; None on a CPU and on GPUs that the table does not have."""
    if arguments.device != "cuda":
        return None
    name = torch.cuda.get_device_name(0)
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    config = model.config
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = _parameters(model) - adapter
    if not config.tie_word_embeddings:
        frozen -= config.vocab_size * config.hidden_size  # the input embedding is looked up, not multiplied
    attention = 6 * config.num_hidden_layers * arguments.tokens * config.hidden_size
    operations = 4 * frozen + 6 * adapter + attention
    return None if peak is None else round(operations * tokens_per_s / (peak * 1e12), 4)


# ---- one layer ----


class EinsumVariant(LoraVariant):
    """The formula as an einsum: the share of every expert, (B, T, K, out), then the weighted sum over K."""

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def forward(  # type: ignore[override]  # PEFT's is a static method; this needs the tuner's gates
        self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> Any:
        """`result` (B, T, out) plus the sum."""
        down: Any = module.lora_A[active_adapter]
        up: Any = module.lora_B[active_adapter].weight  # (out, R)
        inner = down(module.lora_dropout[active_adapter](x)).unflatten(-1, (EXPERTS, -1))  # (B, T, K, R/K)
        shares = torch.einsum("btkr,okr->btko", inner, up.unflatten(1, (EXPERTS, -1)))  # (B, T, K, out)
        weights = self.tuner.gate_rows.weights[active_adapter]  # (B, K)
        factor = (weights * EXPERTS * module.scaling[active_adapter]).to(shares)
        return result + torch.einsum("btko,bk->bto", shares, factor)


def measure_einsum(arguments: argparse.Namespace) -> dict[str, Any]:
    """One layer of the product against the same layer with the form that makes (B, T, K, out)."""
    width, rows, tokens = (32, 2, 16) if arguments.quick else (2048, 8, 256)
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    model = make_model(one_layer_llama(width, arguments), "gated")
    tuner: Any = model.base_model
    gated = tuner.model.model.layers[0].self_attn.q_proj
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gated.lora_B["default"].weight.normal_(0, 0.02)  # PEFT's zeros would hide a wrong form
    einsum = copy.deepcopy(gated)
    einsum.lora_variant["default"] = EinsumVariant(tuner)
    gated.lora_variant["default"] = ILoraVariant(tuner.gate_rows)
    x = torch.randn(rows, tokens, width, generator=generator).to(device, dtype).requires_grad_()
    none, gradient = torch.zeros_like(x), torch.randn(rows, tokens, width, generator=generator).to(device, dtype)
    given = torch.randn(rows, EncoderSection().hidden_size, generator=generator).to(device)

    def task(layer: Any, with_base: bool) -> Step:
        def step() -> None:
            x.grad = None  # to add to an old one would cost both forms the same, which is no part of the layer
            run_layer(tuner, layer, x, given, None if with_base else none).backward(gradient)

        return step

    agree(*(run_layer(tuner, layer, x, given, None).float() for layer in (gated, einsum)))
    layers = {"ours": gated, "einsum": einsum}
    tasks = {f"{name}{part}": task(layer, bool(part)) for part in ("", "_base") for name, layer in layers.items()}
    seconds = in_turns(tasks, arguments, at_least=30)  # half a second a round: fewer may all fall into one disturbance
    return {
        "einsum_layer_over_gated": _ratio(seconds["einsum"], seconds["ours"]),
        "einsum_with_base_over_gated": _ratio(seconds["einsum_base"], seconds["ours_base"]),
        "einsum_layer": {
            "shape": [rows, tokens, width],
            "adapter_dtype": str(gated.lora_A["default"].weight.dtype).removeprefix("torch."),
            "ms": {name: round(1000 * value, 3) for name, value in seconds.items()},
        },
    }


def run_layer(
    tuner: Any, layer: Any, x: torch.Tensor, representation: torch.Tensor, result: torch.Tensor | None
) -> torch.Tensor:
    """(B, T, out) of one layer under a gate on `representation`: the whole layer, or its adapter added to `result`."""
    autocast = computing_in(_compute_dtype(x.dtype), x.device.type)
    with autocast, UsingRows(tuner.gate_rows, tuner._rows({"representation": representation})):
        if result is None:
            return layer(x)
        cast = layer._cast_input_dtype(x, layer.lora_A["default"].weight.dtype)  # as PEFT's layer does: not in autocast
        return layer.lora_variant["default"].forward(layer, active_adapter="default", x=cast, result=result)


def agree(ours: torch.Tensor, other: torch.Tensor) -> None:
    """The forms compute the same, or nothing is measured."""
    if not torch.allclose(ours, other, rtol=0.05, atol=1e-3 * float(ours.detach().abs().max())):
        raise RuntimeError("the two forms of the layer differ: the benchmark is broken")


def one_layer_llama(width: int, arguments: argparse.Namespace) -> Any:
    """A Llama with one layer of random weights."""
    sizes = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": width // 16}
    return _random_llama(arguments, vocab_size=100, num_key_value_heads=width // 16, **sizes).to(arguments.device)


# ---- against TRL ----


def measure_trl(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds a real token of recllm's trainer and of TRL's, each with its own order of batches and its own loss."""
    from datasets import Dataset as Table
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    base, tokenizer = _real(arguments)
    rng = np.random.default_rng(0)
    mean = 24 if arguments.quick else 300
    count = arguments.rows * (arguments.rounds + 1) * 4
    prompts = [_prompt(tokenizer, int(length), rng) for length in rng.integers(mean // 2, mean * 3 // 2, count)]
    completions = [[{"role": "assistant", "content": str(rng.choice(movielens_titles()))}] for _ in prompts]
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": arguments.rows,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": arguments.device == "cpu",
            "max_steps": 1000,
            "dataloader_pin_memory": False,
        }
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in zip(prompts, completions)]
        theirs = SFTTrainer(
            model=copy.deepcopy(base),
            args=SFTConfig(**common, max_length=None, gradient_checkpointing=False, bf16=arguments.dtype == "bfloat16"),
            train_dataset=Table.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        examples = tokenized([encode(tokenizer, p, c) for p, c in zip(prompts, completions)])
        ours = AdapterTrainer(
            model=make_model(base, "gated"),
            args=TrainingArguments(
                **common, remove_unused_columns=False, label_names=["labels"], train_sampling_strategy="group_by_length"
            ),
            data_collator=WithRepresentation(Collator(int(tokenizer.pad_token_id or 0))),
            train_dataset=examples,
            compute_dtype=_compute_dtype(base.dtype),
        )
        seconds, losses = real_token_seconds({"ours": ours, "trl": theirs}, arguments)
    return {
        "ours_over_trl": _ratio(seconds["ours"], seconds["trl"]),
        "us_a_real_token": {name: round(value * 1e6, 2) for name, value in seconds.items()},
        "first_loss": losses,
    }


class WithRepresentation:
    """Our collator, and random representations for the gate."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, rows: Any) -> dict[str, Any]:
        """One batch."""
        return self.collator(rows) | {"representation": torch.randn(len(rows), EncoderSection().hidden_size)}


def real_token_seconds(
    trainers: dict[str, Any], arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds a token that is not padding, over all rounds: whole epochs would average over lengths, sums do too."""
    batches, optimizers = {}, {}
    losses: dict[str, float] = {}
    spent, tokens = dict.fromkeys(trainers, 0.0), dict.fromkeys(trainers, 0)
    for name, trainer in trainers.items():
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1  # train() would set it
        optimizers[name] = trainer.optimizer
        batches[name] = iter(trainer.get_train_dataloader())
        trainer.model.train()
    for turn in range(arguments.rounds + 1):  # the first warms up
        for name, trainer in trainers.items():
            batch = next(batches[name])
            real = int(batch["attention_mask"].sum())
            started = _now(arguments.device)
            loss = trainer.training_step(trainer.model, batch)
            optimizers[name].step()
            trainer.model.zero_grad()
            if turn:
                spent[name] += _now(arguments.device) - started
                tokens[name] += real
            losses.setdefault(name, round(float(loss), 3))
    return {name: spent[name] / tokens[name] for name in trainers}, losses


# ---- dense windows ----


def measure_dense(arguments: argparse.Namespace) -> dict[str, Any]:
    """Titles with loss a second: a window of 10 against a prompt with 10 titles and one answer."""
    base, tokenizer = _real(arguments)
    rng, titles, number = np.random.default_rng(0), movielens_titles(), 10
    collator = Collator(int(tokenizer.pad_token_id or 0))
    single, dense = [], []
    for _ in range(arguments.rows):
        drawn = [str(title) for title in rng.choice(titles, number + 1, replace=False)]
        told = "I watched these films, oldest first:\n" + "\n".join(drawn[:-1]) + "\n\nWhich film do I watch next?"
        single.append(encode(tokenizer, [_user(told)], [{"role": "assistant", "content": drawn[-1]}]))
        lines = "".join(f"{title}\n" for title in drawn[:-1])
        dense.append(
            encode(
                tokenizer, [_user("List the films that one viewer watched.")], [{"role": "assistant", "content": lines}]
            )
        )
    model = make_model(base, "gated")
    tasks = {}
    for name, encoded in (("single", single), ("dense", dense)):
        examples = tokenized(encoded)
        batch = collator([examples[row] for row in range(len(examples))])
        tasks[name] = training_step(model, batch, "representation")
    seconds = in_turns(tasks, arguments)
    rates = {"single": arguments.rows / seconds["single"], "dense": arguments.rows * number / seconds["dense"]}
    return {
        "dense_targets_per_s_over_single": _ratio(rates["dense"], rates["single"]),
        "targets_per_s": {name: round(rate, 2) for name, rate in rates.items()},
    }


# ---- inputs ----


def _real(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The real model and its tokenizer; with --quick a tiny random one under the same tokenizer."""
    if arguments.quick:
        tokenizer = load_tokenizer(arguments.model)
        return tiny_llama(len(tokenizer), arguments), tokenizer
    model, tokenizer = load_base_model(ModelSection(name_or_path=arguments.model, dtype=arguments.dtype))
    return model.to(arguments.device), tokenizer


def tiny_llama(vocabulary: int, arguments: argparse.Namespace) -> Any:
    """For smoke runs."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return _random_llama(arguments, vocab_size=vocabulary, num_key_value_heads=2, **sizes)


def wide_llama(arguments: argparse.Namespace) -> Any:
    """Random weights: 1.1 billion on a GPU (TinyLlama's shape), a few wide layers on a CPU."""
    if arguments.quick:
        return tiny_llama(1000, arguments)
    layers, vocabulary = (22, 32000) if arguments.device == "cuda" else (4, 8000)
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    return _random_llama(arguments, vocab_size=vocabulary, num_hidden_layers=layers, **sizes)


def _random_llama(arguments: argparse.Namespace, **sizes: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=True)  # type: ignore[arg-type]  # **sizes are ints
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config)
    return model.to(getattr(torch, arguments.dtype)).eval()


def _random_batch(config: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows without padding, the loss on all but the first eighth of each."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, config.vocab_size, (arguments.rows, arguments.tokens))
    length = arguments.tokens - arguments.tokens // 8
    examples = tokenized([(row[:-length].tolist(), row[-length:].tolist()) for row in ids])
    return Collator(0)([examples[row] for row in range(len(examples))])


def tokenized(encoded: list[tuple[list[int], list[int]]]) -> TokenizedExamples:
    """(prompt ids, completion ids) as the trainer's examples."""
    lengths = np.array([len(prompt) + len(completion) for prompt, completion in encoded])
    tokens = np.concatenate([[*prompt, *completion] for prompt, completion in encoded]).astype(np.int32)
    zeros = np.zeros(len(encoded), dtype=np.int64)
    return TokenizedExamples(tokens, lengths, np.array([len(c) for _, c in encoded]), zeros, zeros + 1)


def movielens_titles() -> list[str]:
    """The catalogue's titles."""
    lines = (offline.resolve("offline://movielens-100k") / "ml-100k.item").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[1] for line in lines[1:]]


def _prompt(tokenizer: Any, tokens: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """A chat prompt with films until it has about so many tokens."""
    titles, text = movielens_titles(), "I watched these films, oldest first:\n"
    left = tokens - len(prompt_ids(tokenizer, [_user(text)]))
    while left > 0:
        title = str(rng.choice(titles))
        text, left = f"{text}{title}\n", left - len(answer_ids(tokenizer, f"{title}\n"))
    return [_user(text)]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# ---- measuring ----


def in_turns(tasks: dict[str, Step], arguments: argparse.Namespace, at_least: int = 1) -> dict[str, float]:
    """Median seconds of each task over the rounds, in which each has its turn; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(max(arguments.rounds, at_least) + 1):
        for name, task in tasks.items():
            started = _now(arguments.device)
            task()
            if turn:
                seconds[name].append(_now(arguments.device) - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _now(device: str) -> float:
    """CPU seconds of this process; on a GPU the wall clock once it has caught up."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _compute_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """What `recllm train` computes in on a base model of `dtype`."""
    return torch.bfloat16 if dtype == torch.bfloat16 else None


def _ratio(a: float, b: float) -> float:
    return round(a / b, 4)


def _parameters(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".sequence_encoder." not in name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--model", default="offline://smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.tokens, arguments.rounds = 2, 32, 2
    return arguments


if __name__ == "__main__":
    main()
