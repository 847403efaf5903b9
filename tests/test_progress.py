"""Lines of progress where stderr is no terminal."""

import io
import re
import threading

from whittle_nas.progress import Lines, bar


class Heard(io.StringIO):
    """A file that says when a line with some word was written."""

    def __init__(self, word: str = "") -> None:
        super().__init__()
        self.word, self.line = word, threading.Event()

    def flush(self) -> None:
        if self.word in self.getvalue():
            self.line.set()


def test_a_line_comes_while_an_item_takes_long(monkeypatch):
    heard = Heard()
    monkeypatch.setattr("sys.stderr", heard)
    with Lines("scoring", 8, seconds=0.01) as lines:
        lines.update(2)
        assert heard.line.wait(60)  # inside the third item
    assert heard.getvalue().splitlines()[0].startswith("scoring: 2/8 (00:00, ")


def test_no_time_is_left_when_all_is_counted(monkeypatch):
    heard = Heard("timing")
    monkeypatch.setattr("sys.stderr", heard)
    with Lines("trials", 2, seconds=0.01) as lines:
        lines.update(2)
        lines.set_description_str("timing the front, 3 left")
        assert heard.line.wait(60)
    last = heard.getvalue().splitlines()[-1]
    assert re.fullmatch(r"timing the front, 3 left: 2/2 \(\d\d:\d\d\)", last)


def test_a_log_file_gets_lines_and_quick_work_leaves_none(monkeypatch):
    heard = Heard()
    monkeypatch.setattr("sys.stderr", heard)
    with bar("trials", 3) as shown:
        assert isinstance(shown, Lines)
        shown.update(3)
    assert heard.getvalue() == ""
