"""Checkpoints: whole or absent, whatever happens."""

import os

import pytest
import torch

from swat_flex.training.checkpoint import CheckpointError, checkpoints, load_checkpoint, save_checkpoint


def state(step):
    return {"step": step, "x": torch.arange(1000.0) * step, "config": {"window": (4, None), "name": "a"}}


def test_the_newest_two_are_kept_and_a_folder_means_its_newest(tmp_path):
    for step in (1, 2, 30):
        save_checkpoint(tmp_path / "run", state(step))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000002.pt", "step-00000030.pt"]
    assert sorted(os.listdir(tmp_path / "run")) == ["step-00000002.pt", "step-00000030.pt"]
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded["step"] == 30
    assert torch.equal(loaded["x"], state(30)["x"])
    assert loaded["config"] == state(30)["config"]


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
def test_a_crash_at_any_moment_leaves_the_earlier_ones(tmp_path, monkeypatch, moment):
    save_checkpoint(tmp_path, state(1))

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(moment, crash)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, state(2))
    assert load_checkpoint(tmp_path)["step"] == 1
    save_checkpoint(tmp_path, state(3))
    assert sorted(os.listdir(tmp_path)) == ["step-00000001.pt", "step-00000003.pt"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "other"])
def test_damage_is_found_named_and_leaves_the_one_before(tmp_path, damage):
    save_checkpoint(tmp_path, state(1))
    path = save_checkpoint(tmp_path, state(2))
    whole = path.read_bytes()
    middle = len(whole) // 2
    if damage == "other":
        torch.save({"step": 2}, path)
    else:
        path.write_bytes({
            "cut": whole[:middle],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
            "text": b"not a checkpoint",
        }[damage])  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    message = str(caught.value)
    assert message.startswith("checkpoint: expected a whole checkpoint of swat-flex train, got ")
    assert str(path) in message
    assert message.endswith("move it away to go on from step-00000001.pt")
    assert load_checkpoint(checkpoints(tmp_path)[0])["step"] == 1


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    save_checkpoint(tmp_path, {"step": 1, "x": Evil()})
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="got none in"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no\.pt"):
        load_checkpoint(tmp_path / "no.pt")
