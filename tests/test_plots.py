"""What pictures show, read from the figures before they are written."""

import pytest

from whittle_nas import plots
from whittle_nas.space.subnetwork import Block, SubNetwork


@pytest.fixture
def figures(monkeypatch):
    """Figures instead of files."""
    found = []
    monkeypatch.setattr(plots, "_save", lambda figure, _: found.append(figure))
    return found


def test_a_shape_is_hatched_where_a_layer_is_as_in_the_whole_model(figures, tmp_path):
    whole = SubNetwork(8, (Block(4, 2, 8, 30),) * 4)
    sub = SubNetwork(8, (Block(4, 2, 8, 15), None, Block(0, 0, 0, 30), Block(2, 1, 8, 30)))
    shapes = {"sub": sub.shares(whole), "all": whole.shares(whole)}
    plots.plot_shapes(tmp_path / "shapes.png", shapes, whole=whole.blocks)
    first, second = figures[0].axes
    assert [panel.get_title() for panel in figures[0].axes] == ["sub", "all"]
    heads, neurons = first.containers
    assert [bar.get_height() for bar in heads] == [1, 0, 0, 0.5]
    assert [bar.get_height() for bar in neurons] == [-0.5, 0, -1, -1]  # downwards
    assert [bool(bar.get_hatch()) for bar in heads] == [True, False, False, False]
    assert [bool(bar.get_hatch()) for bar in neurons] == [False, False, True, True]
    assert all(bar.get_hatch() for bars in second.containers for bar in bars)
    assert "hatched: as in the whole model" in second.get_xlabel()
