"""Tokens are those of Hugging Face's tokenizer on the same directory."""

import json
import shutil

import pytest
from litgpt.tokenizer import Tokenizer

from tests.conftest import first_of
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.encoding import TextEncoder

TEXTS = ["", "Once upon a time", " a  b ", "x\n\ny ", "é 日本 😀", "<s>", "<s> hi", "a <s> b"]


def encoder_of(directory) -> TextEncoder:
    return TextEncoder(Tokenizer(directory), directory)


@pytest.fixture(params=["stories260K", "babyllama-char361", "gpt2", "neox20b", "bundled"])
def directory(request, tmp_path, bundled, shared_data):
    """Real tokenizers; gpt2 and neox20b get the settings that their models have."""
    if request.param == "bundled":
        return bundled
    if request.param not in ("gpt2", "neox20b"):
        return shared_data / "checkpoints" / request.param
    shutil.copyfile(
        shared_data / "tokenizers" / request.param / "tokenizer.json", tmp_path / "tokenizer.json"
    )
    end = "<|endoftext|>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize("special", first_of([None, True, False]))
def test_tokens_are_hugging_faces(directory, special):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(directory)
    encoder = encoder_of(directory)
    for text in TEXTS:
        options = {} if special is None else {"add_special_tokens": special}
        if special is None and text.startswith(reference.bos_token):
            options = {"add_special_tokens": False}  # as lm-eval's Hugging Face model does
        expected = reference.encode(text, **options)
        assert encoder.encode(text, special) == expected
        assert encoder.encode(text, special) == expected  # now from the cache
        for skip in (True, False):
            assert encoder.decode(expected, skip_special=skip) == reference.decode(
                expected, skip_special_tokens=skip
            )
    assert encoder.prefix_id == reference.bos_token_id


@pytest.mark.parametrize("clean_up", [True, False])
def test_spaces_are_cleaned_up_where_the_tokenizer_asks_for_it(tmp_path, bundled, clean_up):
    from transformers import AutoTokenizer

    shutil.copyfile(bundled / "tokenizer.json", tmp_path / "tokenizer.json")
    settings = json.loads((bundled / "tokenizer_config.json").read_text())
    settings["clean_up_tokenization_spaces"] = clean_up
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    encoder, reference = encoder_of(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = encoder.encode("it is n't here , is it ? it 's not .")
    assert encoder.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert ("here," in encoder.decode(ids)) is clean_up


@pytest.mark.parametrize("add", [True, False])
def test_add_bos_token_decides_whatever_the_tokenizer_file_does(tmp_path, bundled, add):
    shutil.copyfile(bundled / "tokenizer.json", tmp_path / "tokenizer.json")
    settings = json.loads((bundled / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": add}))
    encoder = encoder_of(tmp_path)
    bos = encoder.tokenizer.bos_id
    assert (encoder.encode("import os")[0] == bos) == add
    assert encoder.encode("import os", False)[0] != bos


def test_the_name_of_the_directory_does_not_matter(tmp_path, bundled):
    """litgpt decides about BOS by the name of a Llama 3 directory, which exports don't keep."""
    texts = []
    for name in ("Llama-3.1-8B", "exported"):
        (tmp_path / name).mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(bundled / file, tmp_path / name / file)
        texts.append(encoder_of(tmp_path / name).encode("import os"))
    assert texts[0] == texts[1]


def test_every_end_of_text_token_is_known(tmp_path, bundled):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled / file, tmp_path / file)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    encoder = encoder_of(tmp_path)
    assert encoder.eos_ids == [encoder.tokenizer.eos_id, 5, 7]


def test_chat_template(tmp_path, bundled):
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(bundled / file, tmp_path / file)
    with pytest.raises(ConfigError, match="chat template"):
        encoder_of(tmp_path).chat_template()
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    encoder = encoder_of(tmp_path)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    prompt = encoder.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "[user] hi\n[assistant]"
    assert "messages" in encoder.chat_template()
