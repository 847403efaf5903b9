"""Finished pairs are kept, and their key holds everything that a result depends on."""

import json
from dataclasses import replace

import pytest
import torch

from tests.conftest import resized
from tests.evaluate.test_tasks import load
from whittle_nas.data import TextData, load_blocks
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.report import merge, scores
from whittle_nas.evaluate.running import RunOptions
from whittle_nas.evaluate.session import ModelOptions, Session, Text, spread
from whittle_nas.evaluate.store import Result
from whittle_nas.evaluate.tasks import TaskOptions
from whittle_nas.space import SubNetwork
from whittle_nas.weights.checkpoint import open_checkpoint
from whittle_nas.weights.identity import fingerprint

CPU = torch.device("cpu")


@pytest.fixture
def session(bundled, task_folder, tmp_path) -> Session:
    checkpoint = open_checkpoint(bundled)
    data = TextData(files=bundled / "valid.jsonl", num_blocks=2, block_size=64)
    return Session(
        checkpoint,
        tmp_path / "out",
        load(task_folder, "tiny_choice", "tiny_text", "tiny_document"),
        Text("valid", load_blocks(data, bundled, config=checkpoint.config)),
        run=RunOptions(bootstrap_iters=10),
    )


@pytest.fixture
def subnetworks(bundled) -> list[SubNetwork]:
    full = SubNetwork.from_config(open_checkpoint(bundled).config)
    return [full, resized(full, n_layer=2), resized(full, n_embd=64)]


def test_interrupted_and_started_again(session, subnetworks):
    pairs = session.pairs(subnetworks)
    assert len(pairs) == 3 * 4
    computed = []

    def stop_after_five(pair, _):
        computed.append(pair)
        if len(computed) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.compute(pairs, CPU, on_pair=stop_after_five)
    left = [pair for pair in pairs if session.find(pair) is None]
    assert left == pairs[5:]
    session.compute(left, CPU, on_pair=lambda pair, _: computed.append(pair))
    assert computed == pairs
    assert all(session.find(pair) for pair in pairs)


def test_an_interruption_while_writing_leaves_nothing(session, subnetworks, monkeypatch):
    (pair, *_) = session.pairs(subnetworks)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(KeyboardInterrupt):
            session.compute([pair], CPU)
    assert session.find(pair) is None
    session.compute([pair], CPU)
    assert session.find(pair) is not None


@pytest.mark.slow
def test_reused_questions_give_the_same_results(session, subnetworks, task_folder):
    """The questions are built for the first sub-network and asked again of the others."""
    first, second, _ = subnetworks
    session.compute(session.pairs([first, second]), CPU)
    kept = [session.find(pair).results for pair in session.pairs([second])]
    for pair in session.pairs([second]):
        pair.path(session.out_dir).unlink()
    session.tasks = load(task_folder, "tiny_choice", "tiny_text", "tiny_document")
    session.compute(session.pairs([second]), CPU)
    again = [session.find(pair).results for pair in session.pairs([second])]
    assert [r["results"] for r in kept] == [r["results"] for r in again]


def test_the_key_follows_everything_that_changes_a_result(session, subnetworks):
    def keys(changed: Session) -> set[str]:
        return {str(pair.path(session.out_dir)) for pair in changed.pairs(subnetworks[:1])}

    before = keys(session)
    assert before == keys(replace(session, model=ModelOptions(batch_size=3)))
    for changes in (
        {"options": TaskOptions(seed=2)},
        {"options": TaskOptions(limit=3)},
        {"options": TaskOptions(system_instruction="be brief")},
        {"run": RunOptions(bootstrap_iters=20)},
        {"model": ModelOptions(dtype=torch.bfloat16)},
        {"model": ModelOptions(max_length=32)},
    ):
        assert not before & keys(replace(session, **changes))
    assert not before & {str(p.path(session.out_dir)) for p in session.pairs(subnetworks[1:])}


def test_fingerprint_of_a_checkpoint(checkpoint_dir, tmp_path):
    before = fingerprint(checkpoint_dir)
    moved = checkpoint_dir.rename(tmp_path / "moved")
    assert fingerprint(moved) == before
    state = torch.load(moved / "lit_model.pth", weights_only=True)
    state["lm_head.weight"][0, 0] += 1
    torch.save(state, moved / "lit_model.pth")
    changed = fingerprint(moved)
    (moved / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert len({before, changed, fingerprint(moved)}) == 3


def test_large_weights_are_sampled(checkpoint_dir, monkeypatch):
    monkeypatch.setattr("whittle_nas.weights.identity.WHOLE", 64)
    monkeypatch.setattr("whittle_nas.weights.identity.PIECE", 8)
    before = fingerprint(checkpoint_dir)
    path = checkpoint_dir / "lit_model.pth"
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
    assert fingerprint(checkpoint_dir) != before


def test_samples_that_were_not_kept_are_asked_again(session, subnetworks):
    (text, choice, *_) = session.pairs(subnetworks)
    session.compute([text, choice], CPU)
    wants = replace(session, run=RunOptions(bootstrap_iters=10, log_samples=True))
    assert wants.find(text) is not None
    assert wants.find(choice) is None
    wants.compute([choice], CPU)
    assert len(wants.find(choice).samples["tiny_choice"]) == 8


def test_a_damaged_file_is_a_clear_error(session, subnetworks):
    (pair, *_) = session.pairs(subnetworks)
    session.compute([pair], CPU)
    pair.path(session.out_dir).write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        session.find(pair)


def test_merged_results_are_read_by_lm_evals_tools(session, subnetworks):
    from lm_eval.utils import make_table

    pairs = session.pairs(subnetworks[:1])
    session.compute(pairs, CPU)
    merged = merge([session.find(pair) for pair in pairs], session.about(subnetworks[0], 1))
    merged = json.loads(json.dumps(merged, default=str))
    table = make_table(merged)
    assert all(name in table for name in ("tiny_choice", "tiny_text", "bits_per_byte", "valid"))
    assert merged["config"]["model_args"]["subnetwork"] == subnetworks[0].to_dict()
    found = {(score.task, score.metric): score for score in scores(merged)}
    assert 0 <= found["tiny_choice", "acc"].value <= 1
    assert found["tiny_choice", "acc"].stderr > 0
    assert found["tiny_document", "bits_per_byte"].higher_is_better is False
    assert found["tiny_choice", "acc"].n_samples == 8


def test_groups_keep_their_parts(bundled, task_folder, tmp_path, subnetworks):
    session = Session(open_checkpoint(bundled), tmp_path / "out", load(task_folder, "tiny_group"))
    (pair,) = session.pairs(subnetworks[:1])
    session.compute([pair], CPU)
    results = session.find(pair).results
    assert set(results["results"]) == {"tiny_group", "tiny_choice", "tiny_text"}


def test_context_bounds(session):
    with pytest.raises(ConfigError, match="--max_length"):
        replace(session, model=ModelOptions(max_length=10**6))


def test_work_is_spread_evenly(session, subnetworks):
    pairs = session.pairs(subnetworks)
    costs = [float(1 + number % 5) for number in range(len(pairs))]
    shares = spread(pairs, costs, 3)
    assert sorted(map(pairs.index, sum(shares, []))) == list(range(len(pairs)))
    loads = [sum(costs[pairs.index(pair)] for pair in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)
    assert spread(pairs, costs, 1) == [pairs]


def test_results_keep_their_numbers(session, subnetworks):
    from whittle_nas.evaluate import store

    (pair, *_) = session.pairs(subnetworks)
    result = Result({"results": {"a": {"acc,none": 0.1 + 0.2}}}, 1.5, None)
    store.write(pair, result, session.out_dir)
    assert store.read(pair, session.out_dir) == result
