"""`python -m perf.quality` in seconds: every variant trains, the same bytes are read, the statistics are right."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from perf.quality import __main__ as quality
from perf.quality import report, verdict, workers
from perf.quality.experiment import MULTIPLES, SIZES, VARIANTS, Run, chunks, model_of, read, train_and_read
from swat_flex.nn import SwatTransformer
from swat_flex.training import read_corpus

RESULTS = Path(report.__file__).parents[1] / "results"
TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def corpus():
    return read_corpus()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_reads_the_same_bytes_at_each_length(variant, corpus):
    run = train_and_read(variant, TINY, 0, corpus, torch.device("cpu"))
    assert list(run.loss) == [times * TINY.length for times in MULTIPLES]
    assert all(4 < loss < 12 for loss in run.loss.values())
    assert sum(run.by_position) / 16 == pytest.approx(run.loss[256])


def test_all_variants_start_from_the_same_parameters():
    first = []
    for variant in VARIANTS.values():
        torch.manual_seed(3)
        first.append(SwatTransformer(model_of(variant, TINY)).state_dict())
    for other in first[1:]:
        assert other.keys() == first[0].keys()
        assert all(torch.equal(other[name], first[0][name]) for name in other)


def test_the_same_tokens_are_predicted_whatever_the_row_length(corpus):
    """A model that sees one token back and no position says the same of each."""
    torch.manual_seed(0)
    model = SwatTransformer(dataclasses.replace(model_of(VARIANTS["SWAT 12:0"], TINY), window=1))
    bits = [read(model, corpus, TINY, times) for times in MULTIPLES]
    torch.testing.assert_close(bits[0].flatten(), bits[1].flatten(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bits[0].flatten(), bits[2].flatten(), rtol=1e-4, atol=1e-4)


def test_chunks_are_documents_longer_than_asked():
    stream = torch.tensor([0, 7, 7, 0, 7, 7, 7, 7, 0, 7, 0, 7, 7, 7], dtype=torch.uint8)
    assert chunks(stream, 3, 2) == [3, 10]
    with pytest.raises(ValueError, match="expected 2 documents of over 4 bytes, got 1"):
        chunks(stream, 4, 2)


def made_up(**losses):
    return [
        Run(name, seed, 1, {16: loss}, [loss] * 16, 1.0)
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]


def test_an_ordering_holds_where_the_interval_of_the_paired_gain_is_above_zero():
    runs = made_up(**{"SWAT 12:0": (1.0, 2.0, 3.0), "SWAT 8:4": (1.1, 2.1, 3.11), "SWAT 6:6": (1.0, 2.3, 3.0)})
    runs += made_up(**{"sliding softmax, RoPE": (0.5, 1.5, 2.5)})
    outcomes = {(v.worse, v.better): v for v in verdict.verdicts(runs, 16)}
    assert outcomes["SWAT 8:4", "SWAT 12:0"].outcome == "holds"  # the seeds differ by 1, the pairs by 0.1
    assert outcomes["SWAT 6:6", "SWAT 8:4"].outcome == "not decided by 3 seeds"
    assert outcomes["sliding softmax, RoPE", "SWAT 12:0"].outcome == "the reverse holds"
    assert ("SWAT 6:6", "SWAT 6:6, RoPE") not in outcomes


def test_the_interval_is_students():
    mean = verdict.Mean.of([1.0, 2.0, 3.0])
    assert mean.value == 2
    assert mean.half == pytest.approx(4.303 / math.sqrt(3))
    assert verdict.Mean.of([1.0]).half == math.inf


def test_a_process_of_its_own_trains_the_same_model(corpus):
    here = train_and_read("SWAT 6:6", TINY, 1, corpus, torch.device("cpu"))
    (there,) = workers.train_all([("SWAT 6:6", 1)], TINY, 1, torch.device("cpu"))
    assert there.loss == pytest.approx(here.loss, rel=1e-5)


def test_an_interrupted_experiment_goes_on(tmp_path, monkeypatch):
    """What is finished is read, not trained again; the record is read back and drawn."""
    trained = []

    def stop_after_three(missing, size, jobs, device):
        for name, seed in missing[: 3 - len(trained)] if len(trained) < 3 else missing:
            trained.append((name, seed))
            yield Run(name, seed, 9, {16: 3.0 + seed, 64: 3.0, 256: 3.5 + len(trained) / 10}, [3.0] * 16, 1.0)
        if len(trained) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(quality.workers, "train_all", stop_after_three)
    call = ["--size", "tiny", "--seeds", "2", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "r.json")]
    app = quality.app
    assert CliRunner().invoke(app, call).exit_code != 0
    result = CliRunner().invoke(app, [*call, "--png", str(tmp_path / "r.png")])
    assert result.exit_code == 0, result.output
    assert len(trained) == len(set(trained)) == 2 * len(VARIANTS)
    record = report.Record.read(tmp_path / "r.json")
    assert len(record.runs) == 14
    assert record.size == TINY
    assert (tmp_path / "r.png").stat().st_size > 10_000
    shown = CliRunner().invoke(app, ["--report", str(tmp_path / "r.json")])
    assert "SWAT 6:6, RoPE" in shown.output


def test_a_file_that_is_no_record_is_refused(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match="expected a quality record of schema 1"):
        report.Record.read(tmp_path / "r.json")


@pytest.mark.parametrize("record", sorted(RESULTS.glob("quality-*.json")), ids=lambda path: path.stem)
def test_the_page_says_what_the_record_says(record):
    assert record.with_suffix(".md").read_text() == report.page(report.Record.read(record))
