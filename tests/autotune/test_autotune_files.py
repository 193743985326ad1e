import errno
import os

import pytest

from autotune.files import write_whole


@pytest.mark.parametrize("content", ["σ = 1\n", "σ = 1\n".encode(), lambda file: file.write("σ = 1\n".encode())])
def test_a_file_is_written_whole_into_a_folder_that_is_made(tmp_path, content):
    path = tmp_path / "made" / "file"
    for _ in range(2):  # the second time over the first
        write_whole(path, content)
        assert path.read_bytes() == "σ = 1\n".encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, step, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_on_the_disk_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch):
    log = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: log.append(os.path.isdir(number)) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *names: log.append("renamed") or replace(*names))
    write_whole(tmp_path / "file", "text")
    assert log == ([False, "renamed", True] if os.name == "posix" else [False, "renamed"])
