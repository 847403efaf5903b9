"""Whose a front is, where layers were chosen by a program."""

import pytest
import torch

from whittle_nas.cli.fronts import open_front
from whittle_nas.errors import ConfigError
from whittle_nas.space.front import Front, FrontEntry
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.checkpoint import open_checkpoint


@pytest.mark.parametrize("candidates", ["", "library"])
def test_a_network_that_lacks_any_layer_is_one_of_the_same_weights(
    checkpoint_dir, tmp_path, candidates
):
    checkpoint, path = open_checkpoint(checkpoint_dir), tmp_path / "front.json"
    full = SubNetwork.from_config(checkpoint.config)
    first = checkpoint.info.layer_order[0]
    blocks = (None if at == first else block for at, block in enumerate(full.blocks))
    entry = FrontEntry(0, SubNetwork(full.n_embd, tuple(blocks)), {"val_loss": 1.0})
    front = Front(("val_loss",), (entry,), str(checkpoint_dir), candidates=candidates)
    path.write_text(front.dump())
    assert open_front(checkpoint, path).entries[0].subnetwork == entry.subnetwork
    # where the directory is gone, the rule for layers is that of spaces alone
    path.write_text(front.dump().replace(str(checkpoint_dir), "/gone"))
    if candidates:
        assert open_front(checkpoint, path).entries
    else:
        with pytest.raises(ConfigError, match="belongs to another checkpoint"):
            open_front(checkpoint, path)
    # and other weights in its place are still other ones
    path.write_text(front.dump().replace(str(checkpoint_dir), str(tmp_path / "other")))
    other = checkpoint_dir.rename(tmp_path / "other")
    weights = torch.load(other / "lit_model.pth")
    again = tmp_path / "again"
    again.mkdir()
    for file in other.iterdir():
        (again / file.name).write_bytes(file.read_bytes())
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, again / "lit_model.pth")
    with pytest.raises(ConfigError, match="belongs to another checkpoint"):
        open_front(open_checkpoint(again), path)
