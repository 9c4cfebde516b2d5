"""prepare_fineweb.py: exact files from every source, after any interruption, and one clear line for every mistake."""

import contextlib
import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare_fineweb as prep  # noqa: E402
from train_dba import EOS, UNK, ByteTokenizer, GPT2Tokenizer, UserError, WordTokenizer, split_words  # noqa: E402

WIKITEXT2 = os.environ.get("DBA_WIKITEXT2")
KEYS = {"dataset", "revision", "tokenizer", "vocab_size", "eot", "tokens", "documents", "sha256", "text_bytes", "val",
        "vocab"}


@pytest.fixture(autouse=True)
def keep_signals():
    """main() installs handlers, which are not for pytest."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.fixture
def small(monkeypatch):
    """A batch of a few documents, a journal after each: what a kill test needs to hit something."""
    monkeypatch.setattr(prep, "BATCH_CHARS", 600)
    monkeypatch.setattr(prep, "JOURNAL_SECONDS", 0.0)


def gpt2():
    try:
        return GPT2Tokenizer()
    except UserError as e:
        pytest.skip(str(e))


def run(*args):
    assert prep.main([str(a) for a in args]) == 0


def fails(*args):
    """The error line of a run that ends with 1."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert prep.main([str(a) for a in args]) == 1
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.getvalue().endswith(errors[0] + "\n")
    return errors[0]


def usage_error(capsys, *args):
    with pytest.raises(SystemExit) as e:
        run(*args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


def make_texts(n, seed=0):
    rng = random.Random(seed)
    words = ["the", "attention", "naïve", "décor", "0.5", "東京", "cache", *(f"w{i}" for i in range(300))]
    return ["\n".join(" ".join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(rng.randint(1, 4)))
            for _ in range(n)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))
    return path


def write_parquet(path, texts, **columns):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({**columns, "text": texts}), path, row_group_size=3)
    return path


def load(path):
    """Token ids and sidecar, after all that a sidecar promises has been checked."""
    ids, sidecar = np.load(path, mmap_mode="r"), json.loads(path.with_suffix(".json").read_text())
    assert KEYS <= sidecar.keys()
    assert ids.ndim == 1 and ids.dtype == (np.uint16 if sidecar["vocab_size"] <= 65536 else np.uint32)
    assert len(ids) == sidecar["tokens"] and int(ids.max()) < sidecar["vocab_size"]
    assert sidecar["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    return np.array(ids), sidecar


def split(ids, eot):
    """Documents of ids, each without the eot that ends it."""
    assert ids[-1] == eot
    return np.split(ids, np.flatnonzero(ids == eot) + 1)[:-1]


def decoded(ids):
    return [ByteTokenizer().decode(d[:-1]).decode() for d in split(ids, 256)]


def held_out(texts, f):
    """(training, validation) texts by the documented rule."""
    val = [math.floor((i + 1) * f) > math.floor(i * f) for i in range(len(texts))]
    return [t for t, v in zip(texts, val) if not v], [t for t, v in zip(texts, val) if v]


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# -----------------------------------------------------------------------------
# Formats


def test_every_file_type_in_sorted_order(tmp_path):
    corpus = tmp_path / "corpus"
    (corpus / "b").mkdir(parents=True)
    texts = make_texts(12)
    (corpus / "a.txt").write_text(texts[0] + "\r\nx\n", newline="")
    write_jsonl(corpus / "b" / "1.jsonl", texts[1:4])
    write_parquet(corpus / "b" / "2.parquet", texts[4:11], id=list(range(7)))
    (corpus / "c.md").write_text(texts[11])
    (corpus / "ignored.html").write_text("not this one")
    out = tmp_path / "o" / "mix.npy"
    run("--dataset", "text", "--tokenizer", "byte", "--input", corpus, "--output", out, "--val-frac", 0.25)
    train, val = held_out([texts[0] + "\r\nx\n", *texts[1:]], 0.25)
    ids, sidecar = load(out)
    assert decoded(ids) == train
    assert sidecar["val"] == "mix.val.npy" and sidecar["vocab"] is None and sidecar["dataset"] == "text"
    assert (sidecar["documents"], sidecar["text_bytes"]) == (9, sum(len(t.encode()) for t in train))
    assert (sidecar["tokenizer"], sidecar["vocab_size"], sidecar["eot"]) == ("byte", 257, 256)
    ids, sidecar = load(out.with_name("mix.val.npy"))
    assert decoded(ids) == val and sidecar["val"] is None and sidecar["documents"] == 3
    assert set(contents(out.parent)) == {"mix.npy", "mix.json", "mix.val.npy", "mix.val.json"}


def test_gpt2_ids_are_tiktokens(tmp_path):
    bpe, texts = gpt2().bpe, [*make_texts(5), "<|endoftext|> is ordinary text here", "a" * 3000]
    write_jsonl(tmp_path / "t.jsonl", texts)
    run("--dataset", "text", "--input", tmp_path / "t.jsonl", "--out", tmp_path / "g.npy", "--val-frac", 0)
    ids, sidecar = load(tmp_path / "g.npy")
    assert ids.tolist() == [i for t in texts for i in [*bpe.encode_ordinary(t), 50256]]
    assert sidecar["val"] is None and not (tmp_path / "g.val.npy").exists()


def test_no_validation_document_is_null(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", make_texts(5))
    run("--dataset", "text", "--tokenizer", "byte", "--input", tmp_path / "t.jsonl", "--output", tmp_path / "x.npy")
    assert load(tmp_path / "x.npy")[1]["val"] is None and not (tmp_path / "x.val.json").exists()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=9),
       st.sampled_from([0, 0.3, 0.5]))
def test_round_trip(texts, frac):
    texts = ["first", *texts]
    with tempfile.TemporaryDirectory() as folder:
        source, out = write_jsonl(Path(folder, "t.jsonl"), texts), Path(folder, "x.npy")
        run("--dataset", "text", "--tokenizer", "byte", "--input", source, "--output", out, "--val-frac", frac)
        for part, name in zip(held_out(texts, frac), ("x.npy", "x.val.npy")):
            kept = [t for t in part if t.strip()]          # blank documents count for the split, but have no tokens
            assert kept == (decoded(load(out.with_name(name))[0]) if out.with_name(name).exists() else [])


def test_large_vocabulary_takes_uint32(tmp_path):
    (tmp_path / "t.txt").write_text(" ".join(f"w{i}" for i in range(65534)))   # and <eos>, <unk>: 65536, the most
    (tmp_path / "u.txt").write_text(" ".join(f"w{i}" for i in range(65535)))
    for name, dtype in (("t", np.uint16), ("u", np.uint32)):
        run("--dataset", "text", "--tokenizer", "word", "--input", tmp_path / f"{name}.txt",
            "--output", tmp_path / f"{name}.npy")
        ids, sidecar = load(tmp_path / f"{name}.npy")
        assert ids.dtype == dtype and ids[:-1].tolist() == list(range(len(ids) - 1))


# -----------------------------------------------------------------------------
# Splits, --tokens, vocabulary, order


@pytest.mark.parametrize("asked", [1, 500, 501, 5000])
def test_tokens_ends_with_the_document_that_reaches_it(tmp_path, small, asked):
    texts = make_texts(200)
    write_jsonl(tmp_path / "t.jsonl", texts)
    run("--dataset", "text", "--tokenizer", "byte", "--input", tmp_path / "t.jsonl", "--output", tmp_path / "x.npy",
        "--val-frac", 0.3, "--tokens", asked)
    total = seen = 0                                               # the rule, spelled out
    while total < asked:
        if math.floor((seen + 1) * 0.3) == math.floor(seen * 0.3):
            total += len(texts[seen].encode()) + 1
        seen += 1
    train, val = held_out(texts[:seen], 0.3)
    ids, sidecar = load(tmp_path / "x.npy")
    assert decoded(ids) == train and sidecar["tokens"] == total
    assert (decoded(load(tmp_path / "x.val.npy")[0]) if sidecar["val"] else []) == val       # on top


def test_tokens_exactly_reached(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", ["abc", "defg", "h"])
    run("--dataset", "text", "--tokenizer", "byte", "--input", tmp_path / "t.jsonl", "--output", tmp_path / "x.npy",
        "--val-frac", 0, "--tokens", 9)
    assert decoded(load(tmp_path / "x.npy")[0]) == ["abc", "defg"]


def test_a_source_that_ends_early_is_said(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("abc")
    run("--dataset", "text", "--tokenizer", "byte", "--input", tmp_path / "t.txt", "--output", tmp_path / "x.npy",
        "--tokens", "1K")
    assert "note: the source ended at 4 of 1,000 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("has_unk", [False, True])
def test_word_vocabulary_is_of_the_training_part(tmp_path, small, has_unk):
    texts = make_texts(60)
    texts[0] += f" {UNK}" * has_unk
    texts[4] += " only-in-validation"                              # document 4 is held out at 0.2
    write_jsonl(tmp_path / "t.jsonl", texts)
    run("--dataset", "text", "--tokenizer", "word", "--input", tmp_path / "t.jsonl", "--output", tmp_path / "x.npy",
        "--val-frac", 0.2)
    train, val = held_out(texts, 0.2)
    stream = [w for t in train for w in [*split_words(t), EOS]]
    words = json.loads((tmp_path / "x.vocab.json").read_text())
    assert words == list(dict.fromkeys([*stream, UNK])) and "only-in-validation" not in words
    tokenizer = WordTokenizer(words)
    ids, sidecar = load(tmp_path / "x.npy")
    assert ids.tolist() == tokenizer.encode_words(stream).tolist() and sidecar["vocab"] == "x.vocab.json"
    ids, sidecar = load(tmp_path / "x.val.npy")
    assert ids.tolist() == [i for t in val for i in [*tokenizer.encode(t), tokenizer.eot]]
    assert sidecar["vocab"] == "x.vocab.json" and sidecar["eot"] == tokenizer.eot and tokenizer.ids[UNK] in ids


@pytest.mark.parametrize("tokenizer", ["byte", "word"])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, small, tokenizer):
    texts = make_texts(300)
    texts[0] *= 500                                                # the first batch takes by far the longest
    write_jsonl(tmp_path / "t.jsonl", texts)
    for workers in (1, 2, 5):
        run("--dataset", "text", "--tokenizer", tokenizer, "--input", tmp_path / "t.jsonl",
            "--output", tmp_path / f"w{workers}" / "x.npy", "--workers", workers)
    assert contents(tmp_path / "w1") == contents(tmp_path / "w2") == contents(tmp_path / "w5")


def test_reading_ahead_is_bounded():
    class Pool:
        def submit(self, _function, texts):
            return types.SimpleNamespace(result=lambda: (texts,))
    read = []
    items = (read.append(n) or ([n], [False], n) for n in range(100))
    for n, result in enumerate(prep.encode_in_order(Pool(), items, 6)):
        assert result == ([n], [False], n, [n]) and len(read) <= n + 6


# -----------------------------------------------------------------------------
# WikiText-2, sample, hub

ARTICLES = [" \n = One = \n \n first <unk> line \n \n = = Section = = \n \n = Played , W = \n tail \n \n",
            " = Two = \n \n second article \n \n \n"]


def write_wikitext(folder):
    folder.mkdir(parents=True)
    for name, text in (("train", "".join(ARTICLES)), ("valid", " \n = V = \n \n first unseen line \n \n"),
                       ("test", " \n = T = \n \n x \n")):
        (folder / f"wiki.{name}.tokens").write_text(text)
    return folder


def test_wikitext_documents_are_articles(tmp_path):
    folder = write_wikitext(tmp_path / "w")
    assert [t for t, _ in prep.read_articles(folder / "wiki.train.tokens", 0)] == ARTICLES
    first_end = next(prep.read_articles(folder / "wiki.train.tokens", 0))[1]
    assert [t for t, _ in prep.read_articles(folder / "wiki.train.tokens", first_end)] == ARTICLES[1:]
    run("--dataset", "wikitext2", "--input", folder, "--output", tmp_path / "x.npy")
    words = json.loads((tmp_path / "x.vocab.json").read_text())
    ids, sidecar = load(tmp_path / "x.npy")
    assert [words[i] for i in ids] == [*split_words("".join(ARTICLES)), EOS]                 # as one stream
    assert sidecar["documents"] == 2 and sidecar["val"] == "x.val.npy" and words.count(UNK) == 1
    val = load(tmp_path / "x.val.npy")[0]
    assert [words[i] for i in val] == ["=", UNK, "=", EOS, "first", UNK, "line", EOS]


def test_wikitext_keeps_its_validation_split_when_cut(tmp_path):
    folder = write_wikitext(tmp_path / "w")
    run("--dataset", "wikitext2", "--input", folder, "--output", tmp_path / "x.npy", "--tokens", 5)
    assert load(tmp_path / "x.npy")[1]["documents"] == 1 and load(tmp_path / "x.val.npy")[1]["documents"] == 1


@pytest.mark.skipif(not WIKITEXT2, reason="DBA_WIKITEXT2 does not name a folder with the real WikiText-2")
def test_wikitext_numbers(tmp_path):
    run("--dataset", "wikitext2", "--input", WIKITEXT2, "--output", tmp_path / "x.npy")
    ids, sidecar = load(tmp_path / "x.npy")
    assert (len(ids), sidecar["vocab_size"], sidecar["documents"]) == (2_075_677, 33_278, 600)
    stream = [*split_words(Path(WIKITEXT2, "wiki.train.tokens").read_text()), EOS]
    tokenizer = WordTokenizer.build(stream)
    assert tokenizer.words == json.loads((tmp_path / "x.vocab.json").read_text())
    assert np.array_equal(ids, tokenizer.encode_words(stream))
    ids, sidecar = load(tmp_path / "x.val.npy")
    assert sidecar["documents"] == 60
    stream = [*split_words(Path(WIKITEXT2, "wiki.valid.tokens").read_text()), EOS]
    assert np.array_equal(ids, tokenizer.encode_words(stream))


def test_sample_needs_nothing_and_repeats_nothing(tmp_path):
    run("--dataset", "sample", "--output", tmp_path / "s.npy")
    ids, sidecar = load(tmp_path / "s.npy")
    texts = decoded(ids) + decoded(load(tmp_path / "s.val.npy")[0])
    assert len(set(texts)) == len(texts) > 300 and 1_500_000 < sum(map(len, texts)) < 4_000_000
    assert sidecar["tokenizer"] == "byte" and sidecar["documents"] / len(texts) == pytest.approx(0.9, abs=0.01)
    assert any("Return the arc cosine" in t or "Command-line parsing" in t for t in texts)


class Stream:
    """What prepare_fineweb.py uses of datasets.IterableDataset."""

    def __init__(self, texts, log, breaks_at=None):
        self.texts, self.log, self.breaks_at, self.at = texts, log, breaks_at, 0

    def select_columns(self, names):
        assert names == ["text"]
        return self

    def state_dict(self):
        return {"shard_idx": 0, "at": self.at}

    def load_state_dict(self, state):
        self.log.append(("load_state_dict", state["at"]))
        self.at = state["at"]

    def __iter__(self):
        while self.at < len(self.texts):
            if self.at == self.breaks_at:
                raise ConnectionError("Server Disconnected")
            self.at += 1
            yield {"text": self.texts[self.at - 1]}


@pytest.fixture
def hub(monkeypatch):
    """A fake hub: .texts by split, .log of the calls, .breaks_at a row where the connection goes."""
    hub = types.SimpleNamespace(texts={}, log=[], breaks_at=None, sha="c0ffee")

    def load_dataset(*args, **kwargs):
        hub.log.append((args, kwargs))
        return Stream(hub.texts[kwargs["split"]], hub.log, hub.breaks_at)

    class HTTPError(Exception):
        pass

    class HfHubHTTPError(HTTPError, OSError):
        pass

    def dataset_info(repo):
        if hub.sha is None:
            raise HTTPError("Name or service not known")
        return types.SimpleNamespace(sha=hub.sha)

    api = types.ModuleType("huggingface_hub")
    api.HfApi = lambda: types.SimpleNamespace(dataset_info=dataset_info)
    api.errors = types.ModuleType("huggingface_hub.errors")
    api.errors.HfHubHTTPError = HfHubHTTPError
    datasets = types.ModuleType("datasets")
    datasets.load_dataset, datasets.disable_progress_bars = load_dataset, lambda: None
    for module in (api, api.errors, datasets):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return hub


def test_fineweb_streams_and_goes_on_where_the_network_broke(tmp_path, hub, small):
    hub.texts = {"train": make_texts(400)}
    args = ["--dataset", "fineweb-edu", "--tokenizer", "byte", "--tokens", "40K", "--val-frac", 0.1]
    run(*args, "--output", tmp_path / "whole" / "x.npy")
    assert hub.log == [(("HuggingFaceFW/fineweb-edu", "sample-10BT"),
                        {"split": "train", "revision": "c0ffee", "streaming": True})]
    assert load(tmp_path / "whole" / "x.npy")[1]["revision"] == "c0ffee"
    train, val = held_out(hub.texts["train"], 0.1)
    assert decoded(load(tmp_path / "whole" / "x.npy")[0]) == train[:load(tmp_path / "whole" / "x.npy")[1]["documents"]]

    hub.log.clear()
    out = tmp_path / "broken" / "x.npy"
    for hub.breaks_at in (90, 150):
        assert "run the same command again" in fails(*args, "--output", out) and not out.exists()
        hub.sha = "a newer commit"
    hub.breaks_at = None
    run(*args, "--output", out)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    resumed = [entry[1] for entry in hub.log if entry[0] == "load_state_dict"]
    assert len(resumed) == 2 and 0 < resumed[0] <= 90 <= resumed[1] + 60 and resumed[0] < resumed[1]
    assert {entry[1]["revision"] for entry in hub.log if entry[0] != "load_state_dict"} == {"c0ffee"}

    hub.sha = None                                                 # a finished output needs no network
    run(*args, "--output", out)


def test_fineweb_config_by_size():
    assert [prep.fineweb_config(prep.token_count(n)) for n in ("1B", "9B", "20B")] == \
        ["sample-10BT", "sample-10BT", "sample-100BT"]


def test_no_network_is_one_line(tmp_path, hub):
    hub.sha = None
    message = fails("--dataset", "fineweb-edu", "--tokenizer", "byte", "--tokens", "1K", "--output", tmp_path / "x.npy")
    assert "HuggingFaceFW/fineweb-edu" in message and "go online" in message and contents(tmp_path) == {}
    message = fails("--dataset", "wikitext2", "--output", tmp_path / "x.npy")
    assert "Salesforce/wikitext" in message and contents(tmp_path) == {}


def test_wikitext_from_the_hub_becomes_local_files(tmp_path, hub):
    local = write_wikitext(tmp_path / "local")
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        lines = (local / f"wiki.{name}.tokens").read_text().splitlines(keepends=True)
        hub.texts[split] = [line if line.strip() else "" for line in lines]                  # as the hub has them
    run("--dataset", "wikitext2", "--output", tmp_path / "hub" / "x.npy")
    assert [entry[0] for entry in hub.log] == [("Salesforce/wikitext", "wikitext-2-v1")] * 3
    assert all(entry[1]["streaming"] and entry[1]["revision"] == "c0ffee" for entry in hub.log)
    run("--dataset", "wikitext2", "--input", local, "--output", tmp_path / "same" / "x.npy")
    same = contents(tmp_path / "same") | contents(local)
    assert contents(tmp_path / "hub") == same
    hub.sha = None                                                 # the second time needs no network
    run("--dataset", "wikitext2", "--output", tmp_path / "hub" / "y.npy", "--tokenizer", "byte")
    assert len(hub.log) == 3


def test_the_real_datasets_stream_goes_on_anywhere(tmp_path):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("huggingface_hub")
    texts, folder = make_texts(40), tmp_path / "rows"
    folder.mkdir()
    for n in range(4):
        write_parquet(folder / f"{n}.parquet", texts[10 * n:10 * n + 10], id=list(range(10)))
    original = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    try:
        rows = list(prep.read_hub(str(folder), None, "train", None, None))
        assert [t for t, _ in rows] == texts
        for n in (0, 2, 3, 8, 9, 10, 25, 38, 39):
            cursor = json.loads(json.dumps(rows[n][1]))
            assert [t for t, _ in prep.read_hub(str(folder), None, "train", None, cursor)] == texts[n + 1:]
    finally:
        datasets.config.HF_DATASETS_CACHE = original


# -----------------------------------------------------------------------------
# Interruption


def mixed_corpus(folder):
    folder.mkdir()
    texts = make_texts(160)
    (folder / "a.txt").write_text(texts[0])
    write_jsonl(folder / "b.jsonl", texts[1:90])
    write_parquet(folder / "c.parquet", texts[90:159])
    (folder / "d.txt").write_text(texts[159])
    return folder


def child(args, before=lambda: None):
    """A process that runs main(); forked, so that it keeps what a test patched and starts in no time."""
    def target():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        before()
        sys.exit(prep.main([str(a) for a in args]))
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def no_false_finish(out):
    """What a trainer would accept is complete."""
    for path in (out, out.with_name("x.val.npy")):
        if path.with_suffix(".json").exists():
            load(path)


@pytest.mark.parametrize("tokenizer", ["byte", "word", "gpt2"])
def test_killed_at_random_moments(tmp_path, small, monkeypatch, tokenizer):
    if tokenizer == "gpt2":
        gpt2()
    original = prep.encode_batch
    corpus, rng = mixed_corpus(tmp_path / "corpus"), random.Random(tokenizer)
    args = ["--dataset", "text", "--tokenizer", tokenizer, "--input", corpus, "--val-frac", 0.2, "--output"]
    run(*args, tmp_path / "whole" / "x.npy")
    out, kills = tmp_path / "killed" / "x.npy", 0
    monkeypatch.setattr(prep, "read_jsonl", slowed(prep.read_jsonl))
    monkeypatch.setitem(prep.READERS, ".jsonl", prep.read_jsonl)
    while True:
        process = child([*args, out])
        process.join(rng.uniform(0.03, 0.3) * 1.02**kills)                     # a busy machine gets on by less
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        no_false_finish(out)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL and kills < 200
    assert prep.encode_batch is original and kills >= 3
    assert {n: b for n, b in contents(out.parent).items() if n != "x.npy.lock"} == contents(tmp_path / "whole")


def slowed(reader):
    def read(path, start):
        for item in reader(path, start):
            time.sleep(0.003)
            yield item
    return read


@pytest.mark.parametrize("tokenizer, earlier", [("byte", False), ("word", True)])
def test_killed_before_every_sync_rename_and_removal(tmp_path, small, tokenizer, earlier):
    """One kill at the n-th step that reaches the disk, for every n; with `earlier` an output is being replaced."""
    texts = make_texts(4)
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    args = ["--dataset", "text", "--tokenizer", tokenizer, "--input", source, "--val-frac", 0.5, "--output"]
    run(*args, tmp_path / "whole" / "x.npy")
    for n in range(200):
        out = tmp_path / f"kill{n}" / "x.npy"
        if earlier:
            run("--dataset", "text", "--tokenizer", "byte", "--input", source, "--val-frac", 0.3, "--output", out)
            out.with_name("x.vocab.json").write_text("old")
        process = child([*args, out] + ["--overwrite"] * earlier, before=lambda: kill_at(n))
        process.join()
        no_false_finish(out)
        finished = process.exitcode == 0
        if not finished:
            assert process.exitcode == -signal.SIGKILL
            run(*args, out, *["--overwrite"] * earlier)
        assert contents(out.parent) == contents(tmp_path / "whole"), f"killed at step {n}"
        if finished:
            break
    assert n > 20


def kill_at(n):
    """Kills this process before its n-th fsync, rename or unlink."""
    steps = iter(range(n + 1))

    def wrap(function):
        def step(*args, **kwargs):
            if next(steps) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return step
    os.fsync, os.replace, Path.unlink = wrap(os.fsync), wrap(os.replace), wrap(Path.unlink)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_a_resumable_state(tmp_path, signum):
    """The real program, signalled as a terminal or a scheduler does: the whole group."""
    source = write_jsonl(tmp_path / "t.jsonl", make_texts(4000))
    command = ["--dataset", "text", "--tokenizer", "byte", "--input", str(source), "--output"]
    slow = ("import time, prepare_fineweb as p; p.BATCH_CHARS = 600; p.JOURNAL_SECONDS = 0\nr = p.read_jsonl\n"
            "p.READERS['.jsonl'] = lambda *a: (time.sleep(.005) or x for x in r(*a))\nraise SystemExit(p.main())")
    process = subprocess.Popen([sys.executable, "-c", slow, *command, str(tmp_path / "o" / "x.npy")], cwd=ROOT,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    journal = tmp_path / "o" / "x.npy.part.json"
    while process.poll() is None and not (journal.exists() and json.loads(journal.read_bytes())["read"] > 20):
        time.sleep(0.02)
    os.killpg(process.pid, signum)
    err = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + signum and "Traceback" not in err
    assert err.rstrip().endswith("stopped; run the same command again to go on")
    read = json.loads(journal.read_bytes())["read"]
    assert 20 < read < 4000 and not (tmp_path / "o" / "x.npy").exists()
    run(*command, tmp_path / "o" / "x.npy")
    run(*command, tmp_path / "whole" / "x.npy")
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_end_with_a_killed_parent_and_a_dead_worker_is_an_error(tmp_path, small, monkeypatch):
    source = write_jsonl(tmp_path / "t.jsonl", make_texts(2000))
    monkeypatch.setitem(prep.READERS, ".jsonl", slowed(prep.read_jsonl))
    args = ["--dataset", "text", "--tokenizer", "byte", "--input", source, "--output", tmp_path / "x.npy"]

    def workers(parent):
        return [int(p) for p in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]

    for victim in ("parent", "worker"):
        process = child(args)
        while len(pids := workers(process.pid)) < 2:
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(process.pid if victim == "parent" else pids[0], signal.SIGKILL)
        process.join(10)
        assert process.exitcode == (-signal.SIGKILL if victim == "parent" else 1)
        deadline = time.time() + 5
        while any(map(alive, pids)) and time.time() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, pids))


def test_a_full_disk_leaves_a_resumable_state(tmp_path, small, monkeypatch):
    source = write_jsonl(tmp_path / "t.jsonl", make_texts(50))
    args = ["--dataset", "text", "--tokenizer", "word", "--input", source, "--output"]
    run(*args, tmp_path / "whole" / "x.npy")
    sync, calls = os.fsync, iter(range(1000))

    def full(fd):
        if next(calls) == 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)
    monkeypatch.setattr(os, "fsync", full)
    assert "disk full: make room and run the same command again" in fails(*args, tmp_path / "o" / "x.npy")
    assert not (tmp_path / "o" / "x.npy").exists()
    run(*args, tmp_path / "o" / "x.npy")
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


# -----------------------------------------------------------------------------
# Finished outputs and mistakes


def test_finished_is_left_alone(tmp_path, capsys):
    source = write_jsonl(tmp_path / "t.jsonl", make_texts(50))
    out = tmp_path / "o" / "x.npy"
    args = ["--dataset", "text", "--tokenizer", "byte", "--input", source, "--output", out]
    run(*args)
    before = contents(out.parent)
    stat = out.stat()
    run(*args)
    assert "finished already" in capsys.readouterr().out and out.stat() == stat
    message = fails(*args, "--val-frac", 0.5)
    assert "val_frac 0.05 instead of 0.5" in message and "--overwrite" in message and "--output" in message
    assert "tokenizer 'byte' instead of 'word'" in fails(*args, "--tokenizer", "word")
    write_jsonl(tmp_path / "t.jsonl", make_texts(51))
    assert "revision" in fails(*args)
    assert contents(out.parent) == before
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\nbroken\n')
    fails(*args, "--overwrite")                                    # nothing finished is lost to a failure
    assert {k: v for k, v in contents(out.parent).items() if k in before} == before
    write_jsonl(tmp_path / "t.jsonl", ["a", "b"])
    run(*args, "--overwrite")
    assert set(contents(out.parent)) == {"x.npy", "x.json"} and decoded(load(out)[0]) == ["a", "b"]


def test_an_unfinished_run_with_other_settings_is_an_error(tmp_path, small):
    source = tmp_path / "t.jsonl"
    write_jsonl(source, make_texts(50))
    with open(source, "a") as f:
        f.write("broken\n")
    args = ["--dataset", "text", "--input", source, "--output", tmp_path / "x.npy", "--tokenizer"]
    fails(*args, "byte")
    assert "is begun, with tokenizer 'byte' instead of 'word'" in fails(*args, "word")
    write_jsonl(source, make_texts(50))
    run(*args, "word", "--overwrite")
    load(tmp_path / "x.npy")


def test_a_file_without_sidecar_is_not_touched(tmp_path):
    source = write_jsonl(tmp_path / "t.jsonl", make_texts(5))
    (tmp_path / "x.npy").write_bytes(b"mine")
    message = fails("--dataset", "text", "--tokenizer", "byte", "--input", source, "--output", tmp_path / "x.npy")
    assert "without a sidecar x.json" in message and (tmp_path / "x.npy").read_bytes() == b"mine"


def test_two_runs_on_one_output(tmp_path):
    source = write_jsonl(tmp_path / "t.jsonl", make_texts(5))
    with prep.exclusive(tmp_path / "x.npy.lock", "x.npy"):
        message = fails("--dataset", "text", "--tokenizer", "byte", "--input", source, "--output", tmp_path / "x.npy")
    assert "another run is writing" in message and "x.npy" in message


@pytest.mark.parametrize("name, data, expected", [
    ("t.jsonl", b'{"text": "a"}\n{"text": \n', "t.jsonl, line 2: bad JSON"),
    ("t.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', 't.jsonl, line 3: no string in a field "text"'),
    ("t.jsonl", b'{"text": 5}\n', 't.jsonl, line 1: no string in a field "text"'),
    ("t.jsonl", b'["text"]\n', 't.jsonl, line 1: no string in a field "text"'),
    ("t.jsonl", b'{"text": "\xff"}\n', "t.jsonl, line 1: bad JSON or UTF-8"),
    ("t.jsonl", b'{"text": "\\ud800"}\n', "t.jsonl, line 1: bad JSON or UTF-8"),
    ("t.txt", b"abc\xff", "t.txt is not UTF-8 (byte 3)"),
    ("t.txt", b"", "no document with text"),
    ("t.txt", b" \n\n", "no document with text"),
    ("t.jsonl", b"\n", "no document with text"),
    ("t.parquet", b"PAR1 not at all", "t.parquet: can't be read as parquet"),
    ("t.csv", b"a,b", "can't read"),
])
def test_bad_input(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "o").mkdir()
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    message = fails("--dataset", "text", "--tokenizer", "byte", "--input", tmp_path / name,
                    "--output", tmp_path / "o" / "x.npy")
    assert expected in message and not (tmp_path / "o" / "x.npy").exists()


def test_long_lines(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "t.jsonl", ["abc", "d" * 100])
    args = ["--dataset", "text", "--tokenizer", "byte", "--input", source, "--output", tmp_path / "x.npy"]
    monkeypatch.setattr(prep, "LINE_BYTES", 100)
    assert "t.jsonl, line 2: more than 100 bytes" in fails(*args)
    monkeypatch.setattr(prep, "LINE_BYTES", max(map(len, source.read_bytes().splitlines(keepends=True))))
    run(*args)


def test_bad_parquet_columns(tmp_path):
    args = ["--dataset", "text", "--tokenizer", "byte", "--output", tmp_path / "x.npy", "--input"]
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    assert 'a.parquet: no column "text", only body' in fails(*args, tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", ["a", None])
    assert 'b.parquet, row 2: no string in the column "text"' in fails(*args, tmp_path / "b.parquet")


def test_missing_and_empty_inputs(tmp_path):
    args = ["--dataset", "text", "--tokenizer", "byte", "--output", tmp_path / "x.npy", "--input"]
    assert "nowhere does not exist" in fails(*args, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no .txt, .md, .jsonl, .parquet file in" in fails(*args, tmp_path / "empty")
    message = fails("--dataset", "wikitext2", "--output", tmp_path / "x.npy", "--input", tmp_path / "empty")
    assert "wiki.valid.tokens does not exist" in message


def test_a_small_disk_is_noticed_before_the_start(tmp_path, monkeypatch, hub):
    monkeypatch.setattr(prep.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**9))
    message = fails("--dataset", "fineweb-edu", "--tokenizer", "byte", "--tokens", "1B", "--output", tmp_path / "x.npy")
    assert "about 2.01 GB are needed" in message and "1.00 GB are free" in message
    assert hub.log == [] and contents(tmp_path) == {}


@pytest.mark.parametrize("module, package, args", [
    ("datasets", "datasets", ["--dataset", "fineweb-edu", "--tokens", "1K", "--tokenizer", "byte"]),
    ("pyarrow.parquet", "pyarrow", ["--dataset", "text", "--tokenizer", "byte", "--input", "t.parquet"]),
    ("tiktoken", "tiktoken", ["--dataset", "text", "--tokenizer", "gpt2", "--input", "t.parquet"]),
])
def test_missing_packages_are_named(tmp_path, monkeypatch, module, package, args):
    monkeypatch.chdir(tmp_path)
    Path("t.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install {package}" in fails(*args, "--output", "x.npy")


@pytest.mark.parametrize("args, expected", [
    (["--dataset", "sample", "--output", "data/wiki.tokens"], "must end in .npy: write data/wiki.npy instead"),
    (["--dataset", "sample", "--output", "."], "must end in .npy"),
    (["--dataset", "sample"], "--output"),
    (["--output", "x.npy"], "--dataset"),
    (["--dataset", "sample", "--input", "x", "--output", "x.npy"], "takes no --input"),
    (["--dataset", "fineweb-edu", "--input", "x", "--tokens", "1M", "--output", "x.npy"], "takes no --input"),
    (["--dataset", "fineweb-edu", "--output", "x.npy"], "needs --tokens"),
    (["--dataset", "text", "--output", "x.npy"], "needs --input"),
    (["--dataset", "wikitext2", "--val-frac", "0.1", "--output", "x.npy"], "leave out --val-frac"),
    (["--dataset", "wikitext2", "--input", "nowhere", "--output", "x.npy"], "one existing folder"),
    (["--dataset", "sample", "--tokens", "1.5", "--output", "x.npy"], "no number of tokens"),
    (["--dataset", "sample", "--tokens", "0", "--output", "x.npy"], "no number of tokens"),
    (["--dataset", "sample", "--tokens", "many", "--output", "x.npy"], "no number of tokens"),
    (["--dataset", "sample", "--val-frac", "1", "--output", "x.npy"], "--val-frac"),
    (["--dataset", "sample", "--workers", "0", "--output", "x.npy"], "--workers"),
    (["--dataset", "sample", "--over", "--output", "x.npy"], "--over"),
])
def test_usage_errors(capsys, args, expected):
    assert expected in usage_error(capsys, *args)


def test_token_counts():
    assert [prep.token_count(t) for t in ("100M", "1B", "20b", "1.5K", "250000")] == \
        [10**8, 10**9, 2 * 10**10, 1500, 250000]


def test_the_program_itself(tmp_path):
    """Exit codes and streams as a shell sees them; importing alone does nothing."""
    command = [sys.executable, str(ROOT / "prepare_fineweb.py")]
    bad = subprocess.run([*command, "--dataset", "text", "--tokenizer", "byte", "--input", str(tmp_path / "no.txt"),
                          "--output", str(tmp_path / "x.npy")], capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1 and not bad.stdout
    (tmp_path / "t.txt").write_text("some text")
    good = subprocess.run([*command, "--dataset", "text", "--tokenizer", "byte", "--input", str(tmp_path / "t.txt"),
                           "--output", str(tmp_path / "x.npy")], capture_output=True, text=True)
    assert good.returncode == 0 and "10 tokens, 1 documents" in good.stdout and "tok/s" in good.stderr


def test_an_empty_path_is_not_the_working_directory(tmp_path, monkeypatch, capsys):
    """As `--input "$UNSET"` would be, and all the texts that lie there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("calm sea\n" * 100)
    for args in (("--input", "", "--output", "x.npy"), ("--input", "a.txt", "--output", "")):
        assert "path is empty" in usage_error(capsys, "--dataset", "text", "--tokenizer", "byte", *args)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
