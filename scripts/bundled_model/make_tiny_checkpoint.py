"""Train the checkpoint that ships with the package: whittle_nas/assets/pydoc-1m.

A Llama of about a million parameters learns the English that comes with every Python: the topics of
`help()`, the docstrings of the standard library and its longer comments. It is small enough for a
repository and large enough that halving it hurts, which is what the quickstart needs. Same Python
version, same torch, same machine: same bytes.

    python scripts/bundled_model/make_tiny_checkpoint.py --out_dir /tmp/pydoc-1m

Letters: B batch, T tokens in a block, V vocabulary.
"""

import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from jsonargparse import CLI
from litgpt import GPT, Config, Tokenizer
from litgpt.prompts import Default, save_prompt_style
from litgpt.utils import save_config
from stdlib_text import make_splits, read_sources, write_text
from tokenizers import Tokenizer as BPETokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F

NAME = "pydoc-1m"
ASSETS = Path(__file__).resolve().parents[2] / "whittle_nas" / "assets"
TEMPLATE = Path(__file__).with_name("README.template.md")
# Id 0 is what litgpt pads batches with, so no real token may have it.
SPECIAL = ["<pad>", "<s>", "</s>"]
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIG = Config(
    name=NAME,
    block_size=256,
    vocab_size=1024,
    padded_vocab_size=1024,
    n_layer=6,
    n_head=8,
    n_query_groups=4,
    head_size=16,
    n_embd=128,
    intermediate_size=256,
    rotary_percentage=1.0,
    parallel_residual=False,
    bias=False,
    norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP",
)

# --- Tokenizer ----------------------------------------------------------------------------------


def train_tokenizer(documents: list[str]) -> BPETokenizer:
    """A byte-level BPE: every text survives the round trip, and `<s>` goes before each."""
    tokenizer = BPETokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    bos = ("<s>", SPECIAL_IDS["bos_token_id"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return tokenizer


def token_stream(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """`<s> document </s> <s> document </s> ...` as one int64 tensor."""
    return torch.cat([tokenizer.encode(text, eos=True) for text in documents]).long()


# --- Model --------------------------------------------------------------------------------------


def random_batches(
    stream: torch.Tensor, *, batch_size: int, steps: int, seed: int
) -> Iterator[torch.Tensor]:
    """Blocks (B, T + 1) from a new random offset in each epoch, every token once per epoch."""
    generator = torch.Generator().manual_seed(seed)
    length, blocks = CONFIG.block_size + 1, []
    for _ in range(steps):
        if len(blocks) < batch_size:
            offset = int(torch.randint(CONFIG.block_size, (), generator=generator))
            epoch = stream[offset:].unfold(0, length, CONFIG.block_size)
            blocks += epoch[torch.randperm(len(epoch), generator=generator)]
        yield torch.stack(blocks[:batch_size])
        blocks = blocks[batch_size:]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train_model(
    stream: torch.Tensor,
    valid: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    peak: float,
    seed: int,
) -> GPT:
    """Next-token training with AdamW; the validation loss is only looked at."""
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    batches = random_batches(stream, batch_size=batch_size, steps=steps, seed=seed)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        logits = model(batch[:, :-1])  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            nats = nats_per_token(model, valid)
            print(f"step {step + 1:5d}  train {loss.item():.3f}  valid {nats:.3f} nats/token")
    return model


# --- Figures ------------------------------------------------------------------------------------


@torch.no_grad()
def nats_per_token(model: GPT, stream: torch.Tensor, batch_size: int = 16) -> float:
    """Mean cross-entropy over the stream's whole blocks, nats."""
    blocks = stream.unfold(0, CONFIG.block_size + 1, CONFIG.block_size)
    total = 0.0
    for batch in blocks.split(batch_size):
        logits = model(batch[:, :-1])  # (B, T, V)
        total += F.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (len(blocks) * CONFIG.block_size)


def unigram_nats_per_token(train: torch.Tensor, stream: torch.Tensor) -> float:
    """The same of a model that knows only how frequent each token is (add-one smoothing)."""
    counts = torch.bincount(train, minlength=CONFIG.vocab_size) + 1
    return -(counts / counts.sum()).log()[stream[1:]].mean().item()


def measure(out_dir: Path, splits: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """What the checkpoint on disk, rounded as it is, makes of each held-out split."""
    tokenizer, model = Tokenizer(out_dir), GPT(CONFIG)
    model.load_state_dict(torch.load(out_dir / "lit_model.pth", weights_only=True))
    pretrain = token_stream(tokenizer, splits["pretrain"])
    figures = {}
    for key in ("valid", "test"):
        stream, num_bytes = token_stream(tokenizer, splits[key]), len("".join(splits[key]).encode())
        nats = nats_per_token(model, stream)
        unigram = unigram_nats_per_token(pretrain, stream)
        bits = (len(stream) - 1) / num_bytes / math.log(2)  # per byte, for one nat per token
        figures[key] = {
            "tokens": len(stream),
            "nats_per_token": round(nats, 4),
            "perplexity": round(math.exp(nats), 2),
            "unigram_perplexity": round(math.exp(unigram), 2),
            "bits_per_byte": round(nats * bits, 4),
            "unigram_bits_per_byte": round(unigram * bits, 4),
        }
    return figures


# --- Files --------------------------------------------------------------------------------------


def write_json(path: Path, value: object) -> None:
    """Readable JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(out_dir: Path, tokenizer: BPETokenizer) -> None:
    """`tokenizer.json` and what litgpt and Hugging Face want to know about special tokens."""
    tokenizer.save(str(out_dir / "tokenizer.json"))
    roles = ("pad_token", "bos_token", "eos_token")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG.block_size,
    }
    names = dict(zip(roles, SPECIAL, strict=True))
    write_json(out_dir / "tokenizer_config.json", settings | names)
    write_json(out_dir / "generation_config.json", SPECIAL_IDS)


def write_config(out_dir: Path) -> None:
    """The model's sizes as litgpt and as Hugging Face write them."""
    save_config(CONFIG, out_dir)
    save_prompt_style(Default(), out_dir)
    huggingface = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": CONFIG.n_embd,
        "intermediate_size": CONFIG.intermediate_size,
        "num_hidden_layers": CONFIG.n_layer,
        "num_attention_heads": CONFIG.n_head,
        "num_key_value_heads": CONFIG.n_query_groups,
        "head_dim": CONFIG.head_size,
        "vocab_size": CONFIG.padded_vocab_size,
        "max_position_embeddings": CONFIG.block_size,
        "rms_norm_eps": CONFIG.norm_eps,
        "rope_theta": float(CONFIG.rope_base),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    write_json(out_dir / "config.json", huggingface | SPECIAL_IDS)


def write_readme(out_dir: Path, figures: dict) -> None:
    """The figures, for people."""
    rows = [
        f"| {key} | {f['tokens']:,} | {f['perplexity']} | {f['unigram_perplexity']} "
        f"| {f['bits_per_byte']} | {f['unigram_bits_per_byte']} |"
        for key, f in figures["held_out"].items()
    ]
    text = TEMPLATE.read_text(encoding="utf-8").format(
        name=NAME, block_size=CONFIG.block_size, rows="\n".join(rows), **figures
    )
    (out_dir / "README.md").write_text(text, encoding="utf-8")


def main(
    *,
    out_dir: Path = ASSETS / NAME,
    steps: int = 1800,
    batch_size: int = 8,
    peak_learning_rate: float = 6e-3,
    seed: int = 1337,
    threads: int = 2,
) -> None:
    """Make the bundled checkpoint.

    Args:
        out_dir: Where it goes; files of the same names are overwritten.
        steps: Optimizer steps, each over batch_size blocks of 256 tokens.
        batch_size: Blocks per step.
        peak_learning_rate: AdamW's, after the warm-up.
        seed: Of the weights and of the order of the text.
        threads: Of torch; another number sums in another order.
    """
    started = time.perf_counter(), time.process_time()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    out_dir.mkdir(parents=True, exist_ok=True)

    splits = make_splits(read_sources())
    write_text(out_dir, splits)
    write_tokenizer(out_dir, train_tokenizer(splits["pretrain"]))
    write_config(out_dir)
    tokenizer = Tokenizer(out_dir)
    stream, valid = (token_stream(tokenizer, splits[key]) for key in ("pretrain", "valid"))
    print(f"{len(splits['pretrain'])} documents, {len(stream)} tokens")

    model = train_model(
        stream, valid, steps=steps, batch_size=batch_size, peak=peak_learning_rate, seed=seed
    )
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    torch.save(weights, out_dir / "lit_model.pth")
    figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "num_params": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(stream),
        "steps": steps,
        "batch_size": batch_size,
        "held_out": measure(out_dir, splits),
    }
    write_json(out_dir / "figures.json", figures)
    write_readme(out_dir, figures)
    print(json.dumps(figures["held_out"], indent=2))
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    print(f"{wall / 60:.1f} minutes, {cpu / 60:.1f} minutes of CPU time")


if __name__ == "__main__":
    CLI(main, as_positional=False)
