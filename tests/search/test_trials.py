import pytest

from tests.conftest import uniform
from whittle_nas.errors import ConfigError
from whittle_nas.search.trials import Status, Trial, TrialLog, read_trials
from whittle_nas.space import SearchSpace

SUB = uniform(32, 4, 2, 8, 64, 3)
SPACE = SearchSpace.from_dict({}, SUB)
METRICS = ("val_loss", "num_params")


def write(path, trials):
    log = TrialLog(path, METRICS, SPACE)
    for trial in trials:
        log.append(trial)
    log.close()


def example(number, **changes):
    values = {"val_loss": 1 / 3 + number, "num_params": 123456.0}
    return Trial(number, SUB, Status.complete, {**values, **changes}, blocks=4, seconds=0.25)


def test_round_trip_is_exact(tmp_path):
    failed = Trial(1, SUB, Status.failed, {"num_params": 5.0}, note='out of\nmemory, "all" of it')
    write(tmp_path / "t.csv", [example(0), failed])
    write(tmp_path / "t.csv", [example(2)])  # appended to, without a second header
    found, cut_off = read_trials(tmp_path / "t.csv", METRICS, SPACE)
    assert not cut_off
    assert found[0] == example(0)
    assert found[2] == example(2)
    assert found[1].note == 'out of memory, "all" of it'
    assert found[1].metrics == {"num_params": 5.0}


@pytest.mark.parametrize("bytes_left", [1, 20, 45])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, bytes_left):
    path = tmp_path / "t.csv"
    write(path, [example(0)])
    whole = path.read_bytes()
    write(path, [example(1)])
    path.write_bytes(path.read_bytes()[: len(whole) + bytes_left])
    found, cut_off = read_trials(path, METRICS, SPACE)
    assert cut_off
    assert found == [example(0)]
    write(path, [example(1)])
    assert read_trials(path, METRICS, SPACE) == ([example(0), example(1)], False)


def test_a_file_with_nothing_but_half_a_header(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("trial,stat")
    assert read_trials(path, METRICS, SPACE) == ([], True)
    write(path, [example(0)])
    assert read_trials(path, METRICS, SPACE)[0] == [example(0)]


def test_other_columns_and_nonsense_are_refused(tmp_path):
    write(tmp_path / "t.csv", [example(0)])
    with pytest.raises(ConfigError, match="columns"):
        read_trials(tmp_path / "t.csv", ("val_loss",), SPACE)
    with (tmp_path / "t.csv").open("a") as file:
        file.write("1,complete,a,b,c,d,e,f,g,h,i,j,k\n")
    with pytest.raises(ConfigError, match="line 3"):
        read_trials(tmp_path / "t.csv", METRICS, SPACE)


def test_a_trial_twice_is_refused(tmp_path):
    write(tmp_path / "t.csv", [example(0), example(0)])
    with pytest.raises(ConfigError, match="twice"):
        read_trials(tmp_path / "t.csv", METRICS, SPACE)
