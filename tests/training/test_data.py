"""Text into tokens: what is read, what is held out, what a step draws."""

import random

import pytest
import torch

from swat_flex.training.data import SEPARATOR, Corpus, Sampler, read_corpus, rows


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


def documents(stream):
    return bytes(stream.tolist()).split(b"\0")[1:]


def test_a_folder_gives_its_texts_and_nothing_else(tmp_path):
    texts = {f"sub__{i}": f"text {i} é".encode() for i in range(40)}
    write(tmp_path, **texts, picture=b"\x89PNG\0", latin="é".encode("latin-1"), empty=b"")
    write(tmp_path, **{".hidden__a": b"h", "__pycache__/b": b"c", ".c": b"h"})
    corpus = read_corpus(tmp_path)
    assert corpus.documents == 40
    train, held_out = documents(corpus.train), documents(corpus.held_out)
    assert sorted(train + held_out) == sorted(texts.values())
    assert 1 <= len(held_out) < 10


def test_the_split_follows_names_not_places_nor_other_files(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder, **{f"f{i}": str(i).encode() for i in range(60)})
    a, b = read_corpus(tmp_path / "a"), read_corpus(tmp_path / "b")
    assert torch.equal(a.held_out, b.held_out)
    assert a.fingerprint == b.fingerprint
    write(tmp_path / "b", new=b"more")
    c = read_corpus(tmp_path / "b")
    assert c.fingerprint != a.fingerprint
    assert set(documents(a.held_out)) <= {*documents(c.held_out)}
    write(tmp_path / "a", f0=b"1")
    assert read_corpus(tmp_path / "a").fingerprint != a.fingerprint


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_files_still_train_and_hold_out(tmp_path, count):
    write(tmp_path, **{f"f{i}": b"x" * 100 for i in range(count)})
    corpus = read_corpus(tmp_path)
    assert len(corpus.train) > 1
    assert len(corpus.held_out) > 1
    if count == 1:
        assert (len(corpus.train), len(corpus.held_out)) == (96, 6)
        assert torch.equal(read_corpus(tmp_path / "f0").train, corpus.train)


def test_patterns_choose_files_and_errors_name_the_folder(tmp_path):
    write(tmp_path, **{"a.py": b"a", "b.py": b"b", "c.md": b"c"})
    assert read_corpus(tmp_path, "*.py").documents == 2
    with pytest.raises(ValueError, match=r"named '\*\.rs', got none below"):
        read_corpus(tmp_path, "*.rs")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_corpus(tmp_path / "nowhere")


def test_rows_number_their_documents_and_targets_follow():
    stream = torch.tensor([0, 65, 66, 0, 67, 68, 69], dtype=torch.uint8)
    batch = rows(stream, [0, 1], 5)
    assert batch.tokens.tolist() == [[SEPARATOR, 65, 66, SEPARATOR, 67], [65, 66, SEPARATOR, 67, 68]]
    assert batch.targets.tolist() == [[65, 66, SEPARATOR, 67, 68], [66, SEPARATOR, 67, 68, 69]]
    assert batch.document_ids.tolist() == [[1, 1, 1, 2, 2], [0, 0, 1, 1, 1]]


def test_a_step_draws_the_same_rows_whenever_and_on_however_many_ranks():
    stream = torch.randint(1, 256, (5000,), dtype=torch.uint8)
    alone = Sampler(stream, 9, 6, seed=4)
    expected = [alone(step).tokens for step in range(5)]
    for step in random.sample(range(5), 5):
        assert torch.equal(alone(step).tokens, expected[step])
    assert not torch.equal(expected[0], expected[1])
    assert not torch.equal(Sampler(stream, 9, 6, seed=5)(0).tokens, expected[0])
    ranks = [Sampler(stream, 9, 6, seed=4, rank=r, ranks=3)(2).tokens for r in range(3)]
    assert torch.equal(torch.stack(ranks, 1).flatten(0, 1), expected[2])


def test_every_place_of_the_stream_is_drawn():
    stream = torch.arange(1, 8, dtype=torch.uint8)
    sampler = Sampler(stream, 3, 64, seed=0)
    assert sampler(0).tokens[:, 0].unique().tolist() == [1, 2, 3, 4]
    assert sampler(0).targets.max() == 7


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"length": 10}, ["length", "10", "got 10"]),
        ({"batch": 3, "ranks": 2}, ["batch", "multiple of the 2 ranks", "got 3"]),
        ({"batch": 0}, ["batch", "got 0"]),
    ],
)
def test_a_sampler_refuses_what_it_cannot_draw(options, parts):
    with pytest.raises(ValueError, match=parts[0]) as caught:
        Sampler(torch.ones(10, dtype=torch.uint8), **{"length": 4, "batch": 2, "seed": 0, **options})
    assert all(part in str(caught.value) for part in parts), caught.value


def test_the_standard_library_is_the_default():
    corpus = read_corpus()
    assert isinstance(corpus, Corpus)
    assert corpus.documents > 100
    assert 0.01 < len(corpus.held_out) / len(corpus.train) < 0.3
    assert b"import" in bytes(corpus.train[:20000].tolist())
