"""Records: round trip, refusals, atomic writes; the tables and pictures made of them; the pages' figures."""

import dataclasses
import io
import json
import re

import pytest
from perf_fakes import TINY, race, record, row, scaling_record
from rich.console import Console

from perf import communication, picture, readme, report, scaling
from perf.cases import PASSES
from perf.record import RESULTS, Record, load, save, slug
from perf.scaling import Point


def printed(found):
    page = Console(file=io.StringIO(), width=140)
    report.show(found, page)
    return page.file.getvalue()


@pytest.mark.parametrize("found", [record(), scaling_record()], ids=lambda found: found.suite)
def test_a_record_comes_back_and_prints_the_same(tmp_path, found):
    save(found, tmp_path / "record.json")
    again = load(tmp_path / "record.json")
    assert again == found
    assert printed(again) == printed(found)


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_an_unknown_schema_is_refused(tmp_path, schema):
    file = tmp_path / "record.json"
    file.write_text(json.dumps({**record().to_json(), "schema": schema}))
    with pytest.raises(ValueError, match=rf"record.json: schema: expected 1, got {schema!r}"):
        load(file)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1}', '{"schema": 1, "races": [3]}'])
def test_a_file_that_is_no_record_is_refused(tmp_path, text):
    file = tmp_path / "record.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"record\.json"):
        load(file)


def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    file = tmp_path / "record.json"
    save(record(), file)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(record(commit="other"), file)
    assert load(file).commit == "0123456789"
    assert list(tmp_path.iterdir()) == [file]


def test_a_table_says_who_was_not_timed_and_why():
    text = printed(record())
    assert "fla window skipped: not installed" in text
    assert "3.2×" in text  # 9.5 ms against 3
    assert "1.67" in text  # 1 GFLOP in 3 ms against 200 GFLOP/s
    assert "WARNING" not in text


def test_disturbed_times_carry_a_warning():
    def told(**more):
        return printed(record(races=[race(TINY, "forward", [row("swat banded", 3.0, **more)])]))

    assert "something else disturbs this machine" in told(spread=0.5)
    assert "swat banded refused: wrong" in told(status="refused", reason="wrong: out")
    loaded = race(TINY, "forward", [row("swat banded", 3.0)])
    object.__setattr__(loaded, "others", 1.5)
    assert "up to 1.50 cores" in printed(record(races=[loaded]))


@pytest.mark.parametrize("found", [record(), scaling_record()], ids=lambda found: found.suite)
def test_a_picture_is_drawn(tmp_path, found):
    pytest.importorskip("matplotlib")
    picture.save(picture.draw(found), tmp_path / "record.png")
    assert (tmp_path / "record.png").read_bytes().startswith(b"\x89PNG")


def test_extrapolated_times_lie_on_the_line_in_useful_work_and_are_marked():
    points = [Point(1, 9.0, 1.0), Point(2, 10.0, 2.0), Point(4, 20.0, 4.0)]
    assert scaling.extrapolate(points, [(4, 4.0), (8, 8.0)]) == [Point(8, 40.0, 8.0, measured=False)]
    assert scaling.extrapolate(points[:1], [(8, 8.0)]) == []
    found = scaling.lengths(scaling_record(), "forward")
    longest = found["swat banded"][-1]
    assert (longest.x, longest.measured) == (2**20, False)
    at = {point.x: point for point in found["swat banded"]}
    assert longest.ms / at[65536].ms == pytest.approx(16, rel=0.01)
    causal = {point.x: point for point in found["SDPA causal"]}
    assert causal[2**20].ms / causal[8192].ms == pytest.approx(128**2, rel=0.01)
    assert "~" in printed(scaling_record())


@pytest.mark.parametrize(
    ("devices", "length", "window"), [(2, 64, 9), (4, 64, 40), (8, 64, 64), (8, 64, 1), (3, 66, 50)]
)
def test_bytes_between_devices_are_those_of_the_tokens_that_the_last_device_lacks(devices, length, window):
    shard, first = length // devices, length - length // devices
    needed = {j for i in range(first, length) for j in range(max(0, i - window + 1), i + 1)}
    per_token = communication.token_bytes(1, 2, 16, 16, 2)
    assert per_token == 2 * 32 * 2
    assert (
        communication.halo_bytes(devices, length, window, per_token)
        == len(needed - set(range(first, length))) * per_token
    )
    assert communication.ring_bytes(devices, length, per_token) == (length - shard) * per_token


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_a_page_quotes_the_committed_record(page):
    blocks = list(readme.BLOCK.finditer(page.read_text()))
    assert blocks, f"{page.name} has no measured block"
    for found in blocks:
        committed = readme.ROOT / found["file"]
        assert committed.parent == RESULTS
        assert found[0] == readme.block(load(committed), found["file"], found["case"]), "run `python -m perf readme`"


def test_a_page_s_block_is_rewritten_and_nothing_else(tmp_path):
    save(record(), tmp_path / "new.json")
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- measured: old.json -->\nold\n<!-- /measured -->\nafter\n")
    assert readme.rewrite(page, tmp_path / "new.json", tmp_path)
    assert not readme.rewrite(page, None, tmp_path)
    text = page.read_text()
    assert re.fullmatch(r"before\n<!-- measured: new.json -->\n.*<!-- /measured -->\nafter\n", text, re.DOTALL)
    assert "| **swat banded** | 3.00 ± 2% | 3.00 ± 2% |" in text
    assert "| SDPA causal | 9.50 ± 2% (3.2×) |" in text
    page.write_text("nothing")
    with pytest.raises(ValueError, match="measured: FILE"):
        readme.rewrite(page, None, tmp_path)


def test_a_block_may_show_one_case(tmp_path):
    other = race(dataclasses.replace(TINY, name="other"), "forward", [row("swat banded", 7.0)])
    save(record(races=[*record().races, other]), tmp_path / "new.json")
    page = tmp_path / "README.md"
    page.write_text("<!-- measured: new.json, case other -->\n<!-- /measured -->\n")
    assert readme.rewrite(page, None, tmp_path)
    assert "| **swat banded** | 7.00 ± 2% |" in page.read_text()
    assert TINY.name not in page.read_text()
    page.write_text("<!-- measured: new.json, case absent -->\n<!-- /measured -->\n")
    with pytest.raises(ValueError, match=r"case: expected one of .*, got 'absent'"):
        readme.rewrite(page, None, tmp_path)


def test_a_device_s_name_makes_a_file_name():
    assert slug(record().device) == "some-cpu-9000"


def test_every_committed_record_is_readable():
    others = ("bench_baseline", "quality-", "fuzz")  # of perf.regression, perf.quality and `swat-flex fuzz`
    files = [file for file in RESULTS.glob("*.json") if not file.name.startswith(others)]
    assert files
    for file in files:
        assert isinstance(load(file), Record)
        assert {race.passes for race in load(file).races} <= set(PASSES)
