import builtins
import contextlib
import errno
import io
import json
import multiprocessing
import os
import sys
import warnings
from pathlib import Path

import platformdirs
import pytest
from autotune_fakes import (
    CPU,
    GPU,
    SPACE,
    VERSIONS,
    Choice,
    Script,
    choices,
    hammer,
    local,
    make_entry,
    make_key,
)

from autotune import (
    Entry,
    Failure,
    Merged,
    Space,
    Store,
    StoreWarning,
    Timing,
    Versions,
    open_store,
    search,
    source_hash,
)


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", StoreWarning)
        yield


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "store"


@contextlib.contextmanager
def one_warning(match):
    with pytest.warns(StoreWarning, match=match) as caught:
        yield
    assert len(caught) == 1


def saved(folder: Path, **changes) -> Path:
    """The file of one entry, the store's only one."""
    assert Store(folder).put(make_entry(**changes))
    (path,) = folder.iterdir()
    return path


def test_what_a_search_found_is_found_by_another_process(folder):
    result = search(SPACE, local(default=Script((4.0,)), fast=Script((1.0,)), faster=Script(does="wrong")))
    entry = Entry.of(make_key(), SPACE, result)
    assert Store(folder).put(entry)
    found = Store(folder).lookup(make_key(), SPACE)
    assert (found.config, found.origin, found.versions) == (Choice("fast"), "user", VERSIONS)
    assert found.entry == entry
    assert found.entry.speedup == 4.0
    assert found.entry.timings[1] == ({"name": "fast"}, Timing(1.0, 0.0, 15))
    assert found.entry.failures == [({"name": "faster"}, Failure("wrong", "2.0 instead of 1.0"))]


def test_a_search_without_winner_has_no_entry():
    result = search(choices("default"), local(default=Script(does="wrong")))
    with pytest.raises(ValueError, match="expected one with a winner"):
        Entry.of(make_key(), SPACE, result)


def test_the_file_is_for_people_too(folder):
    data = json.loads(saved(folder).read_text())
    assert data["winner"] == {"name": "fast"}
    assert data["key"]["device"]["name"] == "Fake CPU"


OTHERS = {
    "tunable": {"tunable": "softmax"},
    "schema": {"schema": 2},
    "source": {"source": "abd"},
    "bucket": {"bucket": {"size": 65}},
    "bucket type": {"bucket": {"size": "64"}},
    "device": {"device": GPU},
    "torch": {"versions": Versions("2.13.0", VERSIONS.triton)},
    "triton": {"versions": Versions(VERSIONS.torch, None)},
}


@pytest.mark.parametrize("other", OTHERS)
def test_each_part_of_the_key_tells_entries_apart(folder, other):
    """Two torch versions side by side, above all."""
    store, theirs = Store(folder), make_key(**OTHERS[other])
    store.put(make_entry(winner="fast"))
    assert Store(folder).lookup(theirs, SPACE).origin == "default"
    store.put(make_entry(theirs, winner="faster"))
    assert Store(folder).lookup(make_key(), SPACE).config == Choice("fast")
    assert Store(folder).lookup(theirs, SPACE).config == Choice("faster")


def test_a_bucket_has_no_order_and_no_floats():
    assert make_key(bucket={"a": 1, "b": None}) == make_key(bucket={"b": None, "a": 1})
    assert make_key(bucket={"a": 1}) != make_key(bucket={"a": True})
    with pytest.raises(TypeError, match="bucket: expected names"):
        make_key(bucket={"a": 0.5})


def test_source_hash_sees_content_not_line_endings(tmp_path):
    unix, windows, other = (tmp_path / name for name in ("unix.py", "windows.py", "other.py"))
    unix.write_bytes(b"a = 1\nb = 2\n")
    windows.write_bytes(b"a = 1\r\nb = 2\r\n")
    other.write_bytes(b"a = 1\nb = 3\n")
    assert source_hash(unix) == source_hash(windows) != source_hash(other)


@pytest.mark.parametrize("stored", [True, False])
def test_from_the_second_lookup_on_no_file_is_touched(folder, stored, monkeypatch):
    if stored:
        saved(folder)
    store = Store(folder)
    first = store.lookup(make_key(), SPACE)
    assert first.origin == ("user" if stored else "default")
    touched = []
    for module, name in [
        (builtins, "open"),
        (io, "open"),
        (os, "open"),
        (os, "stat"),
        (os, "replace"),
        (os, "scandir"),
    ]:
        monkeypatch.setattr(module, name, lambda *args, name=name, **_: touched.append(name))
    assert store.lookup(make_key(), SPACE) is first
    assert not touched


def test_a_lookup_writes_nothing(folder):
    Store(folder).lookup(make_key(), SPACE)
    assert not folder.exists()


def test_put_replaces_what_was_looked_up(folder):
    store = Store(folder)
    assert store.lookup(make_key(), SPACE).origin == "default"
    store.put(make_entry())
    assert store.lookup(make_key(), SPACE).config == Choice("fast")
    store.put(make_entry(winner="faster"))
    assert store.lookup(make_key(), SPACE).config == Choice("faster")


def test_every_truncation_is_a_miss_and_is_kept_aside(folder):
    path = saved(folder)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with one_warning("was not used"):
            assert Store(folder).lookup(make_key(), SPACE).origin == "default"
        (aside,) = folder.iterdir()
        assert aside.suffix == ".aside"
        assert aside.read_bytes() == content[:length]
        aside.unlink()


FOREIGN = {
    "no JSON": b"\x80\x81",
    "another JSON": b'{"rows": 64}',
    "a list": b"[]",
    "a deep list": b"[" * 100_000,
    "another format": {"format": 99},
    "another key": {"key": make_key(bucket={"size": 65}).to_json()},
    "no key": {"key": None},
    "a winner without timing": {"winner": {"name": "faster"}},
    "a time that is none": {"timings": [{"config": {"name": "fast"}, "median_ms": "1", "spread": 0, "rounds": 1}]},
    "an endless time": {"timings": [{"config": {"name": "fast"}, "median_ms": 1e999, "spread": 0, "rounds": 1}]},
    "an unknown failure": {"failures": [{"config": {}, "kind": "bored", "reason": ""}]},
    "a time without zone": {"created": "2026-01-01T00:00:00"},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_entry_is_a_miss(folder, kind):
    path, change = saved(folder), FOREIGN[kind]
    content = change if isinstance(change, bytes) else json.dumps({**json.loads(path.read_bytes()), **change}).encode()
    path.write_bytes(content)
    with one_warning("was not used"):
        assert Store(folder).lookup(make_key(), SPACE).origin == "default"
    (aside,) = folder.iterdir()
    assert aside.read_bytes() == content


def test_an_entry_that_its_space_no_longer_allows_is_a_miss(folder):
    saved(folder, winner="fast")
    with one_warning("expected one of"):
        assert Store(folder).lookup(make_key(), choices("default")).origin == "default"


def test_a_good_entry_written_while_a_torn_one_is_moved_aside_survives(folder, monkeypatch):
    path = saved(folder)
    good = path.read_bytes()
    path.write_bytes(good[:50])
    replace = os.replace

    def overtaken(source, target):
        if str(target).endswith(".aside"):
            path.write_bytes(good)
        replace(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    Store(folder).lookup(make_key(), SPACE)
    assert path.read_bytes() == good


def refuse(code):
    def refused(*_, **__):
        raise OSError(code, os.strerror(code))

    return refused


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_leaves_the_entry_in_memory(folder, call, monkeypatch):
    monkeypatch.setattr(os, call, refuse(errno.ENOSPC))
    store = Store(folder)
    with one_warning(r"No space left.*AUTOTUNE_DIR"):
        assert not store.put(make_entry())
        assert not store.put(make_entry(make_key(bucket={"size": 65}), winner="faster"))
        assert store.lookup(make_key(), SPACE).config == Choice("fast")
        assert store.lookup(make_key(bucket={"size": 65}), SPACE).config == Choice("faster")
    assert not list(folder.iterdir())
    assert len(list(store.entries())) == 2
    monkeypatch.undo()
    assert store.put(make_entry())
    assert len(list(store.entries())) == 2


def test_a_read_only_folder_leaves_the_entry_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EROFS))
    store = Store(tmp_path / "absent")
    with one_warning("Read-only file system"):
        assert not store.put(make_entry())
        assert store.lookup(make_key(), SPACE).config == Choice("fast")


def test_a_torn_entry_in_a_read_only_folder_stays_and_warns_once(folder, monkeypatch):
    path = saved(folder)
    path.write_bytes(b"{")
    monkeypatch.setattr(os, "replace", refuse(errno.EROFS))
    store = Store(folder)
    with one_warning("could not be moved aside"):
        assert store.lookup(make_key(), SPACE).origin == "default"
        assert store.lookup(make_key(), SPACE).origin == "default"
    assert path.exists()


def test_an_unreadable_folder_still_answers(folder, monkeypatch):
    saved(folder)
    monkeypatch.setattr(Path, "read_bytes", refuse(errno.EACCES))
    store = Store(folder)
    with one_warning("cannot be read"):
        assert store.lookup(make_key(), SPACE).origin == "default"
        assert store.lookup(make_key(bucket={}), SPACE).origin == "default"


def test_many_processes_write_and_read_one_store(folder):
    processes, times = 8, 200
    context = multiprocessing.get_context("spawn")
    crowd = [context.Process(target=hammer, args=(folder, n, processes, times)) for n in range(processes)]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join()
    assert [process.exitcode for process in crowd] == [0] * processes
    entries = list(Store(folder).entries())
    assert len(entries) == len(list(folder.iterdir())) == processes * times + 10
    assert {(key.bucket["own"], key.bucket["i"]) for key in (e.key for e in entries) if "own" in key.bucket} == {
        (n, i) for n in range(processes) for i in range(times)
    }


@pytest.fixture
def presets(tmp_path) -> Path:
    """Two presets for one key, of two versions of torch, and one for a GPU."""
    source = Store(tmp_path / "measured")
    source.put(make_entry(make_key(source="old", versions=Versions("2.11.0", None)), "fast", day=1))
    source.put(make_entry(make_key(source="older", versions=Versions("2.12.0", None)), "faster", winner_ms=1.5, day=2))
    source.put(make_entry(make_key(device=GPU), "fast"))
    assert source.export_file(tmp_path / "presets" / "shipped.json") == 3
    return tmp_path / "presets"


def test_a_preset_matches_under_other_versions_and_source_and_the_newest_is_taken(folder, presets):
    found = Store(folder, presets).lookup(make_key(), SPACE)
    assert (found.config, found.origin, found.versions) == (Choice("faster"), "preset", Versions("2.12.0", None))


@pytest.mark.parametrize("other", ["tunable", "schema", "bucket"])
def test_a_preset_must_match_in_all_else(folder, presets, other):
    found = Store(folder, presets).lookup(make_key(**OTHERS[other]), SPACE)
    assert (found.config, found.origin, found.versions) == (Choice("default"), "default", None)


def test_the_users_own_entry_goes_before_a_preset(folder, presets):
    store = Store(folder, presets)
    store.put(make_entry(winner="fast"))
    assert store.lookup(make_key(), SPACE).origin == "user"
    assert store.lookup(make_key(source="new"), SPACE).origin == "preset"


def test_a_preset_that_the_space_no_longer_allows_is_passed_over(folder, presets):
    narrower = choices("default", "fast")
    with one_warning("passed over"):
        found = Store(folder, presets).lookup(make_key(), narrower)
    assert (found.config, found.origin) == (Choice("fast"), "preset")
    stricter = Space(Choice, {"name": ("default", "fast", "faster")}, lambda choice: choice.name == "default")
    with pytest.warns(StoreWarning, match="expected one that is_valid allows"):
        found = Store(folder, presets).lookup(make_key(), stricter)
    assert (found.config, found.origin) == (Choice("default"), "default")


def test_broken_presets_are_passed_over_and_left_alone(folder, presets):
    (presets / "broken.json").write_text("{")
    with one_warning("passed over"):
        assert Store(folder, presets).lookup(make_key(), SPACE).origin == "preset"
    assert sorted(path.name for path in presets.iterdir()) == ["broken.json", "shipped.json"]


def test_export_and_import_carry_everything(folder, tmp_path):
    ours, theirs = Store(folder), Store(tmp_path / "theirs")
    for i in range(3):
        ours.put(make_entry(make_key(bucket={"i": i})))
    assert ours.export_file(tmp_path / "all.json") == 3
    assert theirs.import_file(tmp_path / "all.json") == Merged(added=3, replaced=0, kept=0, unsaved=0)
    assert list(theirs.entries()) == list(ours.entries())
    assert theirs.import_file(tmp_path / "all.json") == Merged(added=0, replaced=0, kept=3, unsaved=0)


@pytest.mark.parametrize(
    ("theirs", "taken"),
    [
        ({"winner_ms": 0.9}, True),
        ({"winner_ms": 1.1, "day": 9}, False),
        ({"winner_ms": 1.1, "day": 9, "clock": "wall"}, True),
        ({"winner_ms": 0.9, "day": 1, "clock": "wall"}, False),
    ],
)
def test_merge_keeps_the_faster_of_one_clock_and_the_newer_of_two(folder, theirs, taken):
    store = Store(folder)
    store.put(make_entry(winner="fast", day=5))
    merged = store.merge([make_entry(winner="faster", **theirs)])
    assert (merged.replaced, merged.kept) == (int(taken), int(not taken))
    assert Store(folder).lookup(make_key(), SPACE).config == Choice("faster" if taken else "fast")
    assert store.lookup(make_key(), SPACE).config == Choice("faster" if taken else "fast")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"entries": [{"format": 1}]}', b"\x80"])
def test_a_file_that_was_not_exported_is_not_imported(folder, tmp_path, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match="expected a file that autotune exported"):
        Store(folder).import_file(tmp_path / "file.json")
    assert not folder.exists()


def test_clear_leaves_what_was_moved_aside(folder):
    saved(folder)
    (folder / "torn.json.1.aside").write_text("{")
    store = Store(folder)
    assert store.clear() == 1
    assert store.lookup(make_key(), SPACE).origin == "default"
    assert [path.name for path in folder.iterdir()] == ["torn.json.1.aside"]


def test_the_folder_is_chosen_when_the_store_is_opened(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOTUNE_DIR", str(tmp_path / "moved"))
    assert open_store().folder == tmp_path / "moved"
    monkeypatch.setenv("AUTOTUNE_DIR", "~/moved")
    assert open_store().folder == Path.home() / "moved"
    monkeypatch.delenv("AUTOTUNE_DIR")
    assert open_store("kernels").folder == platformdirs.user_cache_path("kernels", appauthor=False) / "tuned"


def test_without_platformdirs_the_store_keeps_to_memory_and_says_so_once(monkeypatch, tmp_path):
    monkeypatch.delenv("AUTOTUNE_DIR")
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with one_warning("pip install platformdirs"):
        store = open_store()
        assert not store.holds("matmul")
        assert store.lookup(make_key(), SPACE).origin == "default"
        assert not store.put(make_entry())
        assert store.lookup(make_key(), SPACE).config == Choice("fast")
        assert store.holds("matmul")
    assert store.place == "this process's memory"
    assert store.export_file(tmp_path / "all.json") == len(list(store.entries())) == 1
    assert store.import_file(tmp_path / "all.json") == Merged(added=0, replaced=0, kept=1, unsaved=0)
    assert store.clear() == 1
    assert not list(store.entries())
    monkeypatch.setenv("AUTOTUNE_DIR", str(tmp_path))  # a folder named by hand needs no platformdirs
    assert open_store().folder == tmp_path


def test_devices_differ():
    assert make_key(device=CPU).preset_digest != make_key(device=GPU).preset_digest


def test_holds_tells_whether_a_key_is_worth_building(tmp_path):
    store = Store(tmp_path / "folder", tmp_path / "presets")
    assert not store.holds("matmul")
    store.put(make_entry(make_key("matmul.forward")))
    assert store.holds("matmul.forward")
    assert not store.holds("matmul")
    shipped = Store(tmp_path / "other")
    shipped.put(make_entry(make_key("softmax")))
    (tmp_path / "presets").mkdir()
    shipped.export_file(tmp_path / "presets" / "all.json")
    fresh = Store(tmp_path / "folder", tmp_path / "presets")
    assert fresh.holds("softmax")
    assert not fresh.holds("soft")


def test_holds_counts_what_could_not_be_saved(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "folder")
    assert not store.holds("matmul")
    with pytest.warns(StoreWarning):
        store.put(make_entry(make_key("matmul")))
    assert store.holds("matmul")
