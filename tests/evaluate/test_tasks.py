import pytest

from tests.evaluate.conftest import write_task
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.presets import PRESETS, TaskChoice, choose_tasks, headline
from whittle_nas.evaluate.tasks import TaskOptions, _folder, _manager, load_tasks


def load(folder, *names, num_fewshot=None, **options):
    choices = choose_tasks(list(names), num_fewshot)
    return load_tasks(choices, TaskOptions(**options), include_path=folder)


def fingerprint(folder, **options) -> str:
    return load(folder, "tiny_choice", **options)[0].fingerprint


def test_presets_are_the_papers_lists():
    assert len(PRESETS["v1"]) == 5
    assert len(PRESETS["v3"]) == 11
    assert all(task.num_fewshot == 0 for task in PRESETS["v1"])
    assert choose_tasks(["v3"])[2] == TaskChoice("arc_challenge", 25, "acc_norm")
    assert choose_tasks(["v3", "v1", "piqa"]) == list(PRESETS["v3"])  # each task once
    assert {task.num_fewshot for task in choose_tasks(["v3"], 2)} == {2}


@pytest.mark.slow
def test_presets_name_tasks_and_metrics_that_lm_eval_has():
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    for task in (task for preset in PRESETS.values() for task in preset):
        settings = index[task.name].cfg
        assert settings is not None
        if "metric_list" in settings:  # a group's metrics are those of its tasks
            known = {metric["metric"] for metric in settings["metric_list"]}
            assert (task.metric or "").partition(",")[0] in known


NAMED_LIKE_FOLDERS = ("hellaswag", "piqa", "arc_easy", "lambada_openai", "winogrande", "gsm8k")


def test_tasks_are_found_without_the_whole_index():
    managers = [_manager([name], None) for name in NAMED_LIKE_FOLDERS]
    assert all(len(manager.all_tasks) < 100 for manager in managers)
    assert {*NAMED_LIKE_FOLDERS} < {*_manager(NAMED_LIKE_FOLDERS, None).all_subtasks}


@pytest.mark.slow
def test_tasks_of_the_small_index_are_those_of_the_whole():
    """Tasks that are named like their folder, and a group, which needs all of them."""
    from lm_eval.tasks import TaskManager

    whole, managers = TaskManager(), {}
    for name in whole.all_subtasks[::20]:
        folder = _folder(name)
        if folder is not None and folder not in managers:
            managers[folder] = TaskManager(include_path=folder, include_defaults=False)
        few = managers.get(folder)
        if few is not None and name in few.all_subtasks:
            assert few.task_index[name] == whole.task_index[name]
    assert _manager(["piqa", "mmlu"], None).task_index == whole.task_index


@pytest.mark.parametrize(
    ("metrics", "wanted", "expected"),
    [
        (["acc_norm,none", "acc,none"], None, "acc,none"),
        (["acc_norm,none", "acc,none"], "acc_norm", "acc_norm,none"),
        (["exact_match,flexible-extract", "exact_match,strict-match"], "exact_match,strict-match",
         "exact_match,strict-match"),
        (["rouge1,none"], None, "rouge1,none"),
        ([], None, None),
    ],
)  # fmt: skip
def test_headline_is_the_wanted_metric_or_the_usual_one(metrics, wanted, expected):
    assert headline(metrics, wanted) == expected


def test_tags_are_spelled_out_and_groups_stay_one(task_folder):
    names = [task.choice.name for task in load(task_folder, "tiny_tag", "tiny_choice")]
    assert names == ["tiny_choice", "tiny_text"]
    (group,) = load(task_folder, "tiny_group")
    assert (group.choice.name, list(group.leaves)) == ("tiny_group", ["tiny_choice", "tiny_text"])


def test_fewshot_numbers_follow_lm_eval(task_folder):
    def shots(**options) -> int:
        (task,) = load(task_folder, "tiny_choice", **options)
        return task.leaves["tiny_choice"].get_config("num_fewshot")

    assert shots() == 0
    assert shots(num_fewshot=2) == 2
    write_task(task_folder, "tiny_choice", num_fewshot=3)
    assert shots() == 3
    assert shots(num_fewshot=2) == 2
    write_task(task_folder, "tiny_choice", num_fewshot=0)
    assert shots(num_fewshot=2) == 0


def test_fingerprint_follows_everything_that_is_asked(task_folder):
    before = fingerprint(task_folder)
    assert before == fingerprint(task_folder)
    found = {before, fingerprint(task_folder, limit=4), fingerprint(task_folder, num_fewshot=1)}
    write_task(task_folder, "tiny_choice", doc_to_text="Q: {{context}}")
    found.add(fingerprint(task_folder))
    write_task(task_folder, "tiny_choice")
    with (task_folder / "questions.jsonl").open("a") as file:
        file.write('{"context": "new", "choices": ["a", "b"], "gold": 0}\n')
    found.add(fingerprint(task_folder))
    assert len(found) == 5


def test_fingerprint_does_not_depend_on_the_folder(task_folder, tmp_path):
    before = fingerprint(task_folder)
    moved = task_folder.rename(tmp_path / "moved")
    write_task(moved, "tiny_choice", tag="tiny_tag")
    assert before == fingerprint(moved)


@pytest.mark.slow
def test_unknown_task_suggests_names(task_folder):
    with pytest.raises(ConfigError, match="'helaswag'; did you mean hellaswag"):
        load(task_folder, "helaswag")
    with pytest.raises(ConfigError, match="tiny_choice"):
        load(task_folder, "tiny_choise")


@pytest.mark.slow
def test_offline_task_names_its_data_set(task_folder):
    with pytest.raises(ConfigError, match=r"'Rowan/hellaswag'.*--include_path.*data_files"):
        load(task_folder, "hellaswag")


def test_missing_local_file(task_folder):
    (task_folder / "questions.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"questions\.jsonl"):
        load(task_folder, "tiny_choice")


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_out_of_range_is_refused(task_folder, limit):
    with pytest.raises(ConfigError, match="--limit"):
        load(task_folder, "tiny_choice", limit=limit)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--include_path"):
        load(tmp_path / "none", "tiny_choice")
