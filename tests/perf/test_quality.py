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
from perf.quality.changes import CHANGES
from perf.quality.experiment import KINDS, MULTIPLES, SIZES, VARIANTS, Run, Text, chunks, model_of, read, train_and_read
from perf.quality.softmax import softmax_by_sums
from swat_flex import alibi_slopes, flex_swat
from swat_flex.nn import SwatTransformer
from swat_flex.training import read_corpus

RESULTS = Path(report.__file__).parents[1] / "results"
TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def code():
    return Text.of("code")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_reads_the_same_bytes_at_each_length(variant, code):
    run = train_and_read(variant, 3e-3, 0, TINY, code, torch.device("cpu"))
    assert list(run.loss) == [times * TINY.length for times in MULTIPLES]
    assert all(4 < loss < 12 for loss in run.loss.values())
    assert sum(run.by_position) / 16 == pytest.approx(run.loss[256])
    assert list(run.curve) == [1, 2]


def test_all_variants_start_from_the_same_matrices():
    first = []
    for variant in VARIANTS.values():
        torch.manual_seed(3)
        state = SwatTransformer(model_of(variant, TINY)).state_dict()
        own = ("slopes", "logit_bias", "query_norm.weight", "key_norm.weight")
        first.append({name: x for name, x in state.items() if not name.endswith(own)})
        extra = sum(x.numel() for x in state.values()) - sum(x.numel() for x in first[-1].values())
        assert extra == TINY.layers * (12 * variant.learnt * (1 + variant.unit) + 2 * TINY.hidden // 12 * variant.norm)
    for other in first[1:]:
        assert other.keys() == first[0].keys()
        assert all(torch.equal(other[name], first[0][name]) for name in other)


@pytest.mark.parametrize("window", [5, None])
def test_softmax_by_sums_is_softmax(window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 12, 40, 8, requires_grad=True) for _ in range(3))
    slopes = alibi_slopes(12).requires_grad_()
    ids = torch.arange(40) // 15
    results = []
    for attend in (softmax_by_sums, flex_swat):
        out = attend(3 * q, k, v, window, slopes=slopes, logit_bias=None, document_ids=ids, activation="softmax")
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, slopes))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_trained(name):
    """Every parameter that the change adds or replaces gets a gradient and is the optimizer's."""
    change = CHANGES[name]
    torch.manual_seed(0)
    model = SwatTransformer(model_of(VARIANTS["SWAT recipe"], TINY))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())}])
    change.apply(model, optimizer)
    tokens = torch.randint(264, (2, 16))
    model(tokens, targets=tokens.roll(-1, 1)).backward()
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(model.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    after = model.state_dict()
    assert any(name not in before or not torch.equal(before[name], x) for name, x in after.items())


def test_slopes_in_units_of_three_are_the_same_slopes():
    torch.manual_seed(0)
    model = SwatTransformer(model_of(VARIANTS["SWAT recipe"], TINY))
    tokens = torch.randint(264, (2, 16))
    before = model(tokens)
    CHANGES["slopes at 3 times the rate"].apply(model, torch.optim.AdamW(model.parameters()))
    torch.testing.assert_close(model(tokens), before)


def test_the_same_tokens_are_predicted_whatever_the_row_length(code):
    """A model that sees one token back and no position says the same of each."""
    torch.manual_seed(0)
    model = SwatTransformer(dataclasses.replace(model_of(VARIANTS["SWAT 12:0"], TINY), window=1))
    bits = [read(model, code.reported, TINY, times) for times in MULTIPLES]
    torch.testing.assert_close(bits[0].flatten(), bits[1].flatten(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bits[0].flatten(), bits[2].flatten(), rtol=1e-4, atol=1e-4)


def test_chunks_are_documents_longer_than_asked():
    stream = torch.tensor([0, 7, 7, 0, 7, 7, 7, 7, 0, 7, 0, 7, 7, 7], dtype=torch.uint8)
    assert chunks(stream, 3, 2) == [3, 10]
    assert chunks(stream, 2, 4) == [0, 3, 10, 5]  # a document's second piece after every document's first
    with pytest.raises(ValueError, match="expected 2 pieces of over 4 bytes, got 1"):
        chunks(stream, 4, 2)


@pytest.mark.parametrize("kind", ["code", "prose"])
def test_texts_for_training_choosing_and_reporting_are_apart(kind, tmp_path, monkeypatch):
    if kind == "prose" and not list(Path("/usr/share/vim").glob("vim[0-9]*/doc")):
        pytest.skip("needs Vim's help: Debian's vim-runtime")
    text, whole = Text.of(kind), []
    monkeypatch.setattr(
        "perf.quality.experiment.read_corpus", lambda *given: whole.append(read_corpus(*given)) or whole[0]
    )
    assert Text.of(kind).corpus.fingerprint == text.corpus.fingerprint
    train, held_out = text.corpus.train, text.corpus.held_out
    assert torch.equal(text.reported, whole[0].held_out)
    assert len(train) + len(held_out) == len(whole[0].train)
    assert train[0] == held_out[0] == 0  # both are cut at the borders of documents
    assert 0.01 < len(held_out) / len(whole[0].train) < 0.2
    assert len(chunks(text.reported, 4096, 20)) == 20


def made_up(**losses):
    return [
        Run(name, 3e-3, seed, 1, {16: loss}, [loss] * 16, {2: loss}, 1.0)
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


def test_a_process_of_its_own_trains_the_same_model(code):
    here = train_and_read("SWAT 6:6", 6e-3, 1, TINY, code, torch.device("cpu"))
    (there,) = workers.train_all([("SWAT 6:6", 6e-3, 1)], TINY, "code", 1, torch.device("cpu"))
    assert there.loss == pytest.approx(here.loss, rel=1e-5)


RATES = {"SWAT recipe": 6e-3}  # at which a kind is best here; the others are at 3e-3


@pytest.fixture
def trained(monkeypatch):
    """Tasks that were trained, in order; `trained.limit` of them, then Ctrl-C."""

    class Trained(list):
        limit = 1000

    done = Trained()

    def train_all(missing, size, text, jobs, device):
        for name, rate, seed in missing:
            if len(done) == done.limit:
                raise KeyboardInterrupt
            done.append((name, rate, seed))
            bits = 3.0 + seed / 10 + (rate != RATES.get(name, 3e-3))
            yield Run(
                name, rate, seed, 9, {16: bits, 64: bits, 256: bits + len(done) / 100}, [bits] * 16, {2: bits}, 1.0
            )

    monkeypatch.setattr(quality.workers, "train_all", train_all)
    return done


def test_an_interrupted_experiment_goes_on(tmp_path, trained):
    """What is finished is read, not trained again; the record is read back and drawn."""
    call = ["--size", "tiny", "--seeds", "2", "--kinds", "paper", "--work", str(tmp_path / "work")]
    call += ["--json", str(tmp_path / "r.json")]
    trained.limit = 3
    assert CliRunner().invoke(quality.app, call).exit_code != 0
    trained.limit = 1000
    result = CliRunner().invoke(
        quality.app, [*call, "--png", str(tmp_path / "r.png"), "--page", str(tmp_path / "r.md")]
    )
    assert result.exit_code == 0, result.output
    kinds = KINDS["paper"]
    assert len(trained) == len(set(trained)) == 3 * len(kinds)  # two rates with seed 0, the best with seed 1
    record = report.Record.read(tmp_path / "r.json")
    assert len(record.runs) == 2 * len(kinds)
    assert record.size == TINY
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert (tmp_path / "r.md").read_text() == report.page(record)
    shown = CliRunner().invoke(quality.app, ["--report", str(tmp_path / "r.json")])
    assert "SWAT 6:6, RoPE" in shown.output


def test_each_kind_is_trained_with_its_best_rate(tmp_path, trained):
    call = ["--size", "tiny", "--seeds", "3", "--kinds", "SWAT recipe;SWAT 6:6", "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(quality.app, [*call, "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    record = report.Record.read(tmp_path / "r.json")
    assert {(run.variant, run.learning_rate) for run in record.runs} == {("SWAT recipe", 6e-3), ("SWAT 6:6", 3e-3)}
    assert record.choice["SWAT recipe"] == {3e-3: 4.0, 6e-3: 3.0}
    assert [row[0] for row in report.choices(record)] == ["peak learning rate", "SWAT recipe", "SWAT 6:6"]
    (row,) = (row for row in report.rows_of(record) if row[0] == "SWAT recipe")
    assert row[-3:] == ["3", "0.006", ""]


def test_what_is_finished_can_be_reported(tmp_path, trained):
    """Kinds with all rates tried, with as many seeds as each has; the others wait."""
    call = ["--size", "tiny", "--seeds", "3", "--kinds", "SWAT 12:0;SWAT 8:4", "--work", str(tmp_path / "work")]
    none = CliRunner().invoke(quality.app, [*call, "--finished"])
    assert isinstance(none.exception, ValueError)
    trained.limit = 5
    CliRunner().invoke(quality.app, call)
    result = CliRunner().invoke(quality.app, [*call, "--finished", "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    assert len(trained) == 5
    record = report.Record.read(tmp_path / "r.json")
    assert [(name, len(record.of(name))) for name in record.variants] == [("SWAT 12:0", 2), ("SWAT 8:4", 1)]
    assert record.seeds == "1 to 2"
    assert "1 to 2 seeds (partial" in report.described(record)
    assert "not decided by 1 seed" in " ".join(report.sentences(record))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--size", "huge"], ["--size", "tiny", "'huge'"]),
        (["--kinds", "SWAT 13:0"], ["--kinds", "paper", "'SWAT 13:0'"]),
        (["--rates", "3e-3,0"], ["--rates", "positive", "'3e-3,0'"]),
        (["--text", "verse"], ["--text", "code, prose", "'verse'"]),
    ],
)
def test_a_wrong_option_is_named(arguments, parts, tmp_path):
    result = CliRunner().invoke(quality.app, [*arguments, "--work", str(tmp_path)])
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert all(part in said for part in parts), said


def test_a_file_that_is_no_record_is_refused(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match="expected a quality record of schema 2"):
        report.Record.read(tmp_path / "r.json")


@pytest.mark.parametrize("record", sorted(RESULTS.glob("quality-*.json")), ids=lambda path: path.stem)
def test_the_page_says_what_the_record_says(record):
    assert record.with_suffix(".md").read_text() == report.page(report.Record.read(record))
