"""Tasks of our own over a few lines of local data, quick to run and in need of no network."""

import json
from pathlib import Path

import pytest
import yaml

QUESTIONS = [
    {
        "context": f"def f{n}(self):\n    return",
        "choices": [" None", " self", " the"],
        "gold": n % 3,
    }
    for n in range(8)
]
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "fewshot_split": "test",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_text": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
    "tiny_document": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


def write_task(folder: Path, name: str, **changes) -> None:
    """A task file over `questions.jsonl` in the same folder."""
    files = {"test": str(folder / "questions.jsonl")}
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **TASKS.get(name, TASKS["tiny_choice"]),
        **changes,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture
def task_folder(tmp_path, monkeypatch) -> Path:
    """A folder for `--include_path`, with a data set cache of its own."""
    import datasets

    folder = tmp_path / "tasks"
    folder.mkdir()
    # no writing beyond the test, and no file from an earlier one
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (folder / "questions.jsonl").write_text(lines)
    for name in TASKS:
        write_task(folder, name, **({"tag": "tiny_tag"} if name != "tiny_document" else {}))
    group = {"group": "tiny_group", "task": ["tiny_choice", "tiny_text"]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    return folder
