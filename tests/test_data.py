"""Packed blocks: which tokens, which bytes, repeatable; and one sentence for each mistake."""

import json
import random
from pathlib import Path

import pytest
import torch
from litgpt import Config
from litgpt.tokenizer import Tokenizer

from whittle_nas.data import MixSource, Part, TextData, load_blocks, load_tokenizer
from whittle_nas.errors import ConfigError

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "über", "zwölf"]


def write_tokenizer(path: Path, *, bos: bool = True, eos: str = "</s>", extra: int = 0) -> Path:
    """A tokenizer of whole words: `<unk> <s> </s>`, then WORDS from id 3 on."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    path.mkdir(parents=True, exist_ok=True)
    names = ["<unk>", "<s>", "</s>", *WORDS, *(f"w{i}" for i in range(extra))]
    model = WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    processor = HFTokenizer(model)
    processor.pre_tokenizer = Whitespace()
    processor.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "X", "add_bos_token": bos, "bos_token": "<s>", "eos_token": eos}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture
def checkpoint_dir(tmp_path):
    return write_tokenizer(tmp_path / "checkpoint")


@pytest.fixture
def config():
    return Config(block_size=32, padded_vocab_size=16, n_layer=1, n_embd=8, n_head=1)


@pytest.fixture
def stories(tmp_path):
    """40 documents of 3 to 12 words; document i starts with a word of its own class."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(40)]
    path = tmp_path / "texts" / "stories.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts)))
    return path, texts


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) + 3 for word in text.split()]


def test_blocks_are_the_stream_of_documents_cut_without_padding(checkpoint_dir, config, stories):
    path, texts = stories
    data = TextData(files=path, block_size=7, shuffle=False, block_bos=False)
    tokens = load_blocks(data, checkpoint_dir, config=config).tokens
    stream = [i for text in texts for i in [1, *ids_of(text), 2]]
    expected = [stream[i : i + 8] for i in range(0, len(stream) - 7, 7)]
    assert tokens.dtype is torch.long
    assert tokens.tolist() == expected


def test_bytes_cover_the_text_of_whole_documents_exactly(checkpoint_dir, config, tmp_path):
    # 3 documents of 4 tokens (BOS, 2 words, EOS): the targets are all but the first BOS
    path = tmp_path / "a.txt"
    path.write_text("über zwölf|one two|three four")
    data = TextData(files=path, separator="|", block_size=11, shuffle=False)
    blocks = load_blocks(data, checkpoint_dir, config=config)
    assert blocks.num_bytes.tolist() == [len("über zwölfone twothree four".encode())]
    halves = load_blocks(
        TextData(files=path, separator="|", block_size=3, shuffle=False, block_bos=False),
        checkpoint_dir,
        config=config,
    )
    assert halves.num_bytes.tolist() == [12, 7, 5]  # targets 1-3, 4-6, 7-9 of 0-11


def test_every_block_has_a_beginning(checkpoint_dir, config, stories):
    """BOS is an input and no target; one that stands there already is not doubled."""
    path, texts = stories
    data = TextData(files=path, block_size=7, shuffle=False)
    blocks = load_blocks(data, checkpoint_dir, config=config)
    stream = [i for text in texts for i in [1, *ids_of(text), 2]]
    expected, left = [], stream
    while len(rest := left[1:] if left[:1] == [1] else left) >= 7:
        expected.append([1, *rest[:7]])
        left = rest[7:]
    assert blocks.tokens.tolist() == expected
    assert blocks.about["block_bos"] is True
    assert "BOS before each" in str(blocks)
    words = " ".join(WORDS[i - 3] for i in blocks.tokens[:, 1:].flatten().tolist() if i > 2)
    assert " ".join(texts).startswith(words)
    # whole documents but the last, of which the rest fills no block
    whole, missing = sum(len(text.encode()) for text in texts), len(left)
    assert whole - 12 * missing <= int(blocks.num_bytes.sum()) <= whole


def test_whether_blocks_have_a_beginning_is_the_tokenizers_choice_and_the_users(tmp_path, config):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight")
    without = write_tokenizer(tmp_path / "without", bos=False)
    with_bos = write_tokenizer(tmp_path / "with")

    def first_column(folder, block_bos):
        data = TextData(files=text, block_size=3, block_bos=block_bos)
        return load_blocks(data, folder, config=config).tokens[:, 0].tolist()

    assert first_column(with_bos, "auto") == [1, 1, 1]
    assert first_column(with_bos, False) == [1, 5, 8]
    assert first_column(without, "auto") == [3, 6]
    assert first_column(without, True) == [1, 1, 1]
    with pytest.raises(ConfigError, match="block_bos='yes' must be"):
        first_column(without, "yes")
    settings = json.loads((without / "tokenizer_config.json").read_text())
    (without / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": None}))
    with pytest.raises(ConfigError, match="names no BOS token"):
        first_column(without, True)


@pytest.mark.parametrize("begins", [True, False])
def test_a_copy_is_read_like_its_source(tmp_path, config, begins):
    """litgpt decides about BOS by the directory's name where tokenizer_config.json does not."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers.processors import TemplateProcessing

    found = []
    for name in ("Llama-3-source", "copy"):
        folder = write_tokenizer(tmp_path / name)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        del settings["add_bos_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if begins:
            processor = HFTokenizer.from_file(str(folder / "tokenizer.json"))
            template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
            processor.post_processor = template
            processor.save(str(folder / "tokenizer.json"))
        found.append(load_tokenizer(folder, config).encode("one two").tolist())
    assert found == [[*([1] if begins else []), 3, 4]] * 2


def test_a_token_that_both_starts_and_ends_stands_once_between_documents(tmp_path, config, stories):
    folder = write_tokenizer(tmp_path / "both", eos="<s>")
    tokens = load_blocks(TextData(files=stories[0], block_size=16), folder, config=config).tokens
    both = (tokens[:, :-1] == 1) & (tokens[:, 1:] == 1)
    assert not both.any()
    assert (tokens == 1).any()


@pytest.mark.parametrize("shuffle", [True, False])
def test_same_seed_same_blocks(checkpoint_dir, config, stories, shuffle):
    def load(seed):
        data = TextData(files=stories[0], block_size=8, num_blocks=9, seed=seed, shuffle=shuffle)
        return load_blocks(data, checkpoint_dir, config=config).tokens

    assert torch.equal(load(1), load(1))
    assert torch.equal(load(1), load(2)) is not shuffle


def test_num_blocks_tokenises_only_what_it_needs(checkpoint_dir, config, stories, monkeypatch):
    calls = []
    original = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, text: calls.append(text) or original(self, text)
    )
    data = TextData(files=stories[0], block_size=8, num_blocks=2)
    assert load_blocks(data, checkpoint_dir, config=config).num_blocks == 2
    assert len(calls) <= 4


def test_train_and_valid_are_disjoint_and_complete():
    from whittle_nas.data.sources import split_rows

    rows = [{"text": str(i)} for i in range(40)]
    picked = {p: split_rows(rows, p, valid_fraction=0.25, seed=3, limit=None)[1] for p in Part}
    assert len(picked[Part.VALID]) == 10
    assert sorted(picked[Part.TRAIN] + picked[Part.VALID]) == list(range(40))
    whole = {p: split_rows(rows, p, valid_fraction=0, seed=3, limit=None)[1] for p in Part}
    assert whole[Part.TRAIN] == whole[Part.VALID] == picked[Part.TRAIN] + picked[Part.VALID]


def test_a_single_text_is_split_at_a_line_break(checkpoint_dir, config, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("one two three four\n" * 20)
    data = TextData(files=path, block_size=4, valid_fraction=0.2, shuffle=False, block_bos=False)
    train, valid = (
        load_blocks(data, checkpoint_dir, config=config, part=part)
        for part in (Part.TRAIN, Part.VALID)
    )
    assert (train.num_blocks, valid.num_blocks) == (16, 4)  # 16 and 4 lines of 4 words


def test_weights_give_shares_of_the_blocks(checkpoint_dir, config, tmp_path):
    for word, count in (("one", 400), ("two", 100)):
        (tmp_path / f"{word}.txt").write_text(f"{word} " * count)
    sources = [
        MixSource(files=tmp_path / "one.txt", weight=1),
        MixSource(files=tmp_path / "two.txt", weight=3),
    ]

    def shares(num_blocks):
        data = TextData(sources=sources, block_size=4, num_blocks=num_blocks)
        tokens = load_blocks(data, checkpoint_dir, config=config).tokens
        return [(tokens == word).any(1).sum().item() for word in (3, 4)]

    assert shares(8) == [2, 6]
    assert shares(None) == [8, 25]  # all of the scarce source, in the same ratio
    assert shares(400) == [8, 25]


def test_pooled_sources_use_all_text(checkpoint_dir, config, tmp_path):
    for word in ("one", "two"):
        (tmp_path / f"{word}.txt").write_text(f"{word} " * 9 + "\n" + f"{word} " * 9)
    sources = [MixSource(files=tmp_path / f"{w}.txt", separator="\n") for w in ("one", "two")]
    blocks = load_blocks(TextData(sources=sources, block_size=10), checkpoint_dir, config=config)
    assert blocks.num_blocks == 4  # 4 documents of 11 tokens: 44 = 4 * 10 + 4
    assert sum((blocks.tokens == 3).any(1)) >= 2


def test_columns_are_joined(checkpoint_dir, config, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"q": "one two", "a": "three"}] * 5))
    data = TextData(files=[path], column=["q", "a"], block_size=4, shuffle=False)
    assert load_blocks(data, checkpoint_dir, config=config).tokens[0].tolist() == [1, 3, 4, 5, 2]


def test_any_litgpt_module_is_a_source(checkpoint_dir, config, tmp_path):
    path = tmp_path / "instruct.json"
    path.write_text(json.dumps([{"instruction": "one two", "input": "", "output": "six"}] * 20))
    arguments = {"json_path": str(path), "val_split_fraction": 0.1, "prompt_style": "falcon"}
    data = TextData(module="JSON", module_args=arguments, block_size=8, block_bos=False)
    train = load_blocks(data, checkpoint_dir, config=config)
    # falcon's style: the instruction, then "Assistant:" (two unknown words), then the answer
    assert train.tokens[0].tolist() == [1, 3, 4, 0, 0, 8, 2, 1, 3]
    assert load_blocks(data, checkpoint_dir, config=config, part=Part.VALID).num_blocks == 1


def test_every_source_decides_what_is_scored(checkpoint_dir, config, tmp_path):
    """A module its validation split, also in a mix; other text what is held out, or all of it."""
    rows = [{"instruction": "one", "input": "", "output": "six"} for _ in range(20)]
    rows[-2:] = [{**row, "output": "seven"} for row in rows[-2:]]
    for name, part in (("train", rows[:-2]), ("val", rows[-2:])):
        (tmp_path / "split").mkdir(exist_ok=True)
        (tmp_path / "split" / f"{name}.json").write_text(json.dumps(part))
    (tmp_path / "text.txt").write_text("two three\n" * 20)
    arguments = {"json_path": str(tmp_path / "split"), "prompt_style": "falcon"}
    module = MixSource(module="JSON", module_args=arguments)
    text = MixSource(files=tmp_path / "text.txt")

    def words(part, *sources, fraction=0.0):
        data = TextData(sources=[*sources], block_size=8, valid_fraction=fraction)
        blocks = load_blocks(data, checkpoint_dir, config=config, part=part)
        return {WORDS[i - 3] for i in blocks.tokens.flatten().tolist() if i > 2}, blocks

    assert words(Part.VALID, module)[0] == {"one", "seven"}
    assert words(Part.TRAIN, module)[0] == {"one", "six"}
    both, blocks = words(Part.VALID, module, text)
    assert both == {"one", "seven", "two", "three"}
    assert blocks.about["splits"] == ["validation split", "all of it"]
    assert "(validation split)" in str(blocks)
    held_out = words(Part.VALID, module, text, fraction=0.5)[1]
    assert held_out.num_blocks < blocks.num_blocks
    assert held_out.about["splits"] == ["validation split", "held-out 50 %"]


@pytest.mark.parametrize("num_documents", [None, 12])
def test_a_data_set_through_datasets(
    checkpoint_dir, config, stories, tmp_path, monkeypatch, num_documents
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    data = TextData(hub=str(stories[0].parent), block_size=8, num_documents=num_documents)
    first, second = (load_blocks(data, checkpoint_dir, config=config) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    all_blocks = load_blocks(
        TextData(files=stories[0], block_size=8), checkpoint_dir, config=config
    )
    assert (first.num_blocks < all_blocks.num_blocks) is (num_documents is not None)


MISTAKES = {
    "no source": ({}, "name a source"),
    "two kinds": ({"files": Path("x"), "hub": "y"}, "exactly one of"),
    "missing file": ({"files": Path("nowhere.txt")}, "nowhere.txt does not exist"),
    "empty file": ({"files": "empty.txt"}, "empty.txt holds no text"),
    "empty documents": ({"files": "blank.jsonl"}, "blank.jsonl holds no text"),
    "too short": ({"files": "short.txt"}, "one block needs 33"),
    "block too large": ({"files": "short.txt", "block_size": 33}, "1..32"),
    "no blocks": ({"files": "short.txt", "num_blocks": 0}, "num_blocks=0"),
    "no column": ({"files": "rows.jsonl", "column": "story"}, "row 1 has no column 'story'"),
    "not JSON": ({"files": "bad.jsonl"}, "line 2 is not JSON"),
    "not text": ({"files": "binary.bin"}, "can't be read as UTF-8"),
    "bad fraction": ({"files": "short.txt", "valid_fraction": 1.0}, "valid_fraction=1.0"),
    "unknown module": ({"module": "Nope"}, "'Nope' is not in litgpt.data, which has Alpaca"),
    "module argument": ({"module": "JSON", "module_args": {"path": "x"}}, "module_args of JSON"),
    "no data set": ({"hub": "./no/such/folder"}, "can't be loaded"),
    "one weight": (
        {"sources": [MixSource(files="short.txt", weight=1), MixSource(files="short.txt")]},
        "every source a positive weight",
    ),
    "source twice": (
        {"files": "short.txt", "sources": [MixSource(files="short.txt")]},
        "list all sources",
    ),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_sentence(checkpoint_dir, config, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("empty.txt").write_text("")
    Path("blank.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    Path("short.txt").write_text("one two three")
    Path("rows.jsonl").write_text('{"text": "one"}\n')
    Path("bad.jsonl").write_text('{"text": "one"}\n{"text": \n')
    Path("binary.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError) as error:
        load_blocks(TextData(**options), checkpoint_dir, config=config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path, config, stories):
    folder = write_tokenizer(tmp_path / "large", extra=10)
    with pytest.raises(
        ConfigError, match="23 tokens and does not fit the model's vocabulary of 16"
    ):
        load_blocks(TextData(files=stories[0]), folder, config=config)


def test_a_missing_or_broken_tokenizer(tmp_path, config, stories):
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        load_blocks(TextData(files=stories[0]), tmp_path, config=config)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="can't be read"):
        load_blocks(TextData(files=stories[0]), tmp_path, config=config)
