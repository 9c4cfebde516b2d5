"""Token files and text: what is wrong with them is said in one line; what is right is split as documented."""

import codecs
import hashlib
import json
import math
import os
import pickle

import numpy as np
import pytest
import torch

import train_dba
from helpers import TINY, TRAIN, assert_done, assert_error, call, edit_sidecar, make_text, read_log, write_tokens
from train_dba import eval_batches, load_data, make_config

RUN = f"--data train.npy {TINY} --steps 2 --warmup-steps 0 --out-dir run"


class Payload:
    """An object whose unpickling makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def byte_ids(n, seed):
    ids = np.random.default_rng(seed).integers(97, 110, n)
    ids[19::20] = 256
    return ids


@pytest.fixture
def folder(tmp_path):
    """Byte tokens: train.npy, whose sidecar names val.npy."""
    write_tokens(tmp_path, "train", byte_ids(600, 0), val="val.npy")
    write_tokens(tmp_path, "val", byte_ids(131, 1))
    return tmp_path


def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])


def word_files(d):
    (d / "vocab.json").write_text(json.dumps(["a", "<eos>", "b", "<unk>"]))
    for name, seed in (("train", 0), ("val", 1)):
        ids = np.random.default_rng(seed).integers(0, 4, 300)
        write_tokens(d, name, ids, tokenizer="word", vocab_size=4, eot=1, vocab="vocab.json", val="val.npy")


def no_vocabulary(d):
    word_files(d)
    (d / "vocab.json").unlink()


def vocabulary_of(text):
    def change(d):
        word_files(d)
        (d / "vocab.json").write_text(text)
    return change


def both_sidecars(**fields):
    return lambda d: [edit_sidecar(d / f"{name}.json", **fields) for name in ("train", "val")]


def objects(d):
    np.save(d / "train.npy", np.array([Payload()] * 600, dtype=object), allow_pickle=True)


def zipped(d):
    with open(d / "train.npy", "wb") as f:
        np.savez(f, ids=np.zeros(600, np.uint16))


def header(text):
    """Change train.npy to one with this header, and so its hash in the sidecar."""
    def change(d):
        raw, ids = text.encode("latin1"), (d / "train.npy").read_bytes()[128:]
        (d / "train.npy").write_bytes(b"\x93NUMPY\x01\0" + len(raw).to_bytes(2, "little") + raw + ids)
        edit_sidecar(d / "train.json", sha256=hashlib.sha256((d / "train.npy").read_bytes()).hexdigest())
    return change


def shape(text):
    return header("{'descr': '<u2', 'fortran_order': False, 'shape': " + text + "}\n")


def sidecar(text):
    return lambda d: (d / "train.json").write_text(text)


def promised(d):
    shape(f"({2**52},)")(d)
    edit_sidecar(d / "train.json", tokens=2**52)


def endless(d):
    word_files(d)
    (d / "vocab.json").unlink()
    (d / "vocab.json").symlink_to("/dev/zero")


def words_elsewhere(name):
    return lambda d: (word_files(d), edit_sidecar(d / "train.json", vocab=name))


def backwards(name):
    return lambda d: np.save(d / f"{name}.npy", np.load(d / f"{name}.npy")[::-1])


BROKEN = {
    "header of 60,000 characters": (shape("(600,)" + " " * 60_000), "train.npy"),
    "header that doesn't parse": (shape("(600, 0x"), "train.npy"),
    "header of an open text": (shape("(600, '"), "train.npy"),
    "header of an open long text": (shape('(600, """'), "train.npy"),
    "header nested": (shape("(" * 3000), "train.npy"),
    "header of code": (shape("__import__('os').mkdir('payload-ran')"), "train.npy"),
    "negative shape": (shape("(-5,)"), "-5"),
    "huge shape": (shape(f"({10**30},)"), "1000000"),
    "huge shape, promised": (promised, "bytes"),
    "other byte order": (header("{'descr': '>u2', 'fortran_order': False, 'shape': (600,)}\n"), ">u2"),
    "a record": (header("{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (600,)}\n"), "train.npy"),
    "sidecar nested": (sidecar("[" * 100_000), "train.json"),
    "sidecar of a number too long": (sidecar('{"tokens": ' + "9" * 10_000 + "}"), "train.json"),
    "sidecar of 2 MB": (sidecar(" " * 2**21 + "{}"), "train.json"),
    "tokens a text": (lambda d: edit_sidecar(d / "train.json", tokens="600"), "train.json.tokens"),
    "tokens infinite": (lambda d: edit_sidecar(d / "train.json", tokens=float("inf")), "train.json.tokens"),
    "tokens negative": (lambda d: edit_sidecar(d / "train.json", tokens=-600), "train.json.tokens"),
    "bytes a list": (lambda d: edit_sidecar(d / "val.json", text_bytes=[5]), "val.json.text_bytes"),
    "val in another folder": (lambda d: edit_sidecar(d / "train.json", val="../val.npy"), "train.json.val"),
    "val a path": (lambda d: edit_sidecar(d / "train.json", val=str(d / "val.npy")), "train.json.val"),
    "val the folder above": (lambda d: edit_sidecar(d / "train.json", val=".."), "train.json.val"),
    "vocabulary in another folder": (words_elsewhere("../vocab.json"), "train.json.vocab"),
    "vocabulary not named": (words_elsewhere(None), "train.json"),
    "vocabulary without end": (endless, "vocab.json"),
    "vocabulary that no text has": (vocabulary_of('["a", "<eos>", "\\ud800", "<unk>"]'), "vocab.json"),
    "vocabulary nested": (vocabulary_of("[" * 100_000), "vocab.json"),
    "ids in another order": (backwards("train"), "train.npy holds other ids"),
    "ids of val in another order": (backwards("val"), "val.npy holds other ids"),
    "val of the same ids": (lambda d: write_tokens(d, "val", np.load(d / "train.npy")), "hold the same"),
    "val the file itself": (lambda d: edit_sidecar(d / "train.json", val="train.npy"), "hold the same"),
    "missing": (lambda d: (d / "train.npy").unlink(), "train.npy"),
    "a folder": (lambda d: ((d / "train.npy").unlink(), (d / "train.npy").mkdir()), "train.npy"),
    "empty": (lambda d: (d / "train.npy").write_bytes(b""), "train.npy"),
    "half": (lambda d: cut(d / "train.npy", 600), "train.npy"),
    "odd length": (lambda d: cut(d / "train.npy", -1), "train.npy"),
    "header cut": (lambda d: cut(d / "train.npy", 50), "train.npy"),
    "magic cut": (lambda d: cut(d / "train.npy", 3), "train.npy"),
    "garbage": (lambda d: (d / "train.npy").write_bytes(bytes(range(256)) * 5), "train.npy"),
    "objects": (objects, "train.npy"),
    "a pickle": (lambda d: (d / "train.npy").write_bytes(pickle.dumps(Payload())), "train.npy"),
    "an npz": (zipped, "train.npy"),
    "floats": (lambda d: np.save(d / "train.npy", np.zeros(600)), "float64"),
    "signed": (lambda d: np.save(d / "train.npy", np.zeros(600, np.int32)), "int32"),
    "two axes": (lambda d: np.save(d / "train.npy", np.zeros((600, 1), np.uint16)), "train.npy"),
    "no sidecar": (lambda d: (d / "train.json").unlink(), "train.json"),
    "sidecar cut": (lambda d: cut(d / "train.json", 40), "train.json"),
    "sidecar not text": (lambda d: (d / "train.json").write_bytes(b"\xff\xfe\x00"), "train.json"),
    "sidecar a list": (lambda d: (d / "train.json").write_text("[]"), "train.json"),
    "sidecar lacks": (lambda d: (d / "train.json").write_text('{"tokenizer": "byte"}'), "vocab_size"),
    "tokens disagree": (lambda d: edit_sidecar(d / "train.json", tokens=599), "599"),
    "id beyond the vocabulary": (lambda d: write_tokens(d, "train", [*byte_ids(600, 0), 257], val="val.npy"), "257"),
    "id beyond it in val": (lambda d: write_tokens(d, "val", [*byte_ids(600, 0), 4000]), "4000"),
    "vocabulary size disagrees": (both_sidecars(vocab_size=300), "300"),
    "unknown tokenizer": (both_sidecars(tokenizer="bpe9"), "bpe9"),
    "no vocabulary": (no_vocabulary, "vocab.json"),
    "vocabulary cut": (vocabulary_of('["a", "<eos>"'), "vocab.json"),
    "vocabulary without <unk>": (vocabulary_of('["a", "<eos>", "b", "c"]'), "<unk>"),
    "vocabulary with a word twice": (vocabulary_of('["a", "<eos>", "a", "<unk>"]'), "vocabulary"),
    "vocabulary too small": (vocabulary_of('["a", "<eos>", "<unk>"]'), "3"),
    "vocabulary a number": (vocabulary_of("5"), "vocab"),
    "vocabulary of lists": (vocabulary_of('[["a"], "<eos>", "<unk>", "b"]'), "vocab"),
    "val missing": (lambda d: (d / "val.npy").unlink(), "val.npy"),
    "val sidecar missing": (lambda d: (d / "val.json").unlink(), "val.json"),
    "val cut": (lambda d: cut(d / "val.npy", -1), "val.npy"),
    "val empty": (lambda d: (d / "val.npy").write_bytes(b""), "val.npy"),
    "val of one token": (lambda d: write_tokens(d, "val", [97]), "validation"),
    "val of no tokens": (lambda d: write_tokens(d, "val", []), "val"),
    "val not a name": (lambda d: edit_sidecar(d / "train.json", val=5), "5"),
    "val of another tokenizer": (lambda d: edit_sidecar(d / "val.json", tokenizer="gpt2"), "vocabular"),
}


@pytest.mark.parametrize("change, word", BROKEN.values(), ids=BROKEN)
def test_broken_token_files(folder, change, word):
    change(folder)
    assert_error(call(RUN, folder), word)
    assert not (folder / "run").exists() and not (folder / "payload-ran").exists()


@pytest.mark.parametrize("flags, word", {
    "--tokenizer gpt2": "--tokenizer",
    "--tokenizer word": "--tokenizer",
    "--block 600": "--block",
    "--block 1000000000000": "--block",
    "--val-data text.txt": ".npy",
    "--val-data nowhere.npy": "nowhere.npy",
    "--val-data other.npy": "vocabular",
    "--val-frac 0.0001": "validation",
}.items())
def test_flags_that_do_not_fit_token_files(folder, flags, word):
    make_text(folder)
    write_tokens(folder, "other", [1, 2, 3] * 30, tokenizer="gpt2", vocab_size=50257, eot=50256)
    assert_error(call(f"{RUN} {flags}", folder), word)
    assert not (folder / "run").exists()


def test_val_data_with_another_vocabulary_of_the_same_size(tmp_path):
    word_files(tmp_path)
    write_tokens(tmp_path, "other", [0, 1, 2, 3] * 20, tokenizer="word", vocab_size=4, eot=1, vocab="other_vocab.json")
    (tmp_path / "other_vocab.json").write_text(json.dumps(["b", "<eos>", "a", "<unk>"]))
    assert_error(call(f"{RUN} --val-data other.npy", tmp_path), "vocabular")


@pytest.mark.parametrize("content, flags, word", [
    (b"17 4 203 9\n" * 300, "", "token ids"),
    (b"17\n4\n203\n" * 300, "--tokenizer word", "token ids"),
    (b"[17, 4, 203, 9]\n" * 300, "--tokenizer word", "token ids"),
    (b"abc \xff\xfe def " * 100, "--tokenizer byte", "UTF-8"),
    (np.arange(600, dtype=np.uint16).tobytes(), "--tokenizer byte", "UTF-8"),
    (b"", "--tokenizer byte", "empty"),
    (b"\n \n", "--tokenizer word", "--block"),
    (b"short", "--tokenizer byte", "--block"),
    (b"a b c d e f g h i j k l m n o p q r s t u v\n", "--tokenizer word --val-frac 0.01", "validation"),
    (b"a b c " * 100, "--tokenizer byte --val-data train.npy", ".npy"),
    (b"a b c " * 100, "--tokenizer byte --val-data nowhere.txt", "nowhere.txt"),
    (b"a b c " * 100, "--tokenizer byte --val-data .", "is a folder"),
    (b"a b c " * 100, f"--tokenizer byte --val-data {'v' * 5000}", "not a file"),
    (b"a b c " * 100, "--tokenizer byte --val-data /dev/zero", "not a file"),
    ("a b c ".encode("utf-16") * 100, "--tokenizer byte", "UTF-8"),
])
def test_broken_text(folder, content, flags, word):
    (folder / "broken.txt").write_bytes(content)
    assert_error(call(f"--data broken.txt {TINY} --steps 1 --out-dir run {flags}", folder), word)
    assert not (folder / "run").exists()


def load(folder, monkeypatch, **settings):
    monkeypatch.chdir(folder)
    return load_data(make_config(block=2, d_model=32, n_head=2, **settings))


def test_word_vocabulary_is_that_of_the_training_part(tmp_path, monkeypatch):
    (tmp_path / "t.tokens").write_text("d b\n \nb a d\n\nc a b d\na b late <unk2>\n")
    data = load(tmp_path, monkeypatch, data="t.tokens", val_frac=0.3)
    # d b <eos> b a d <eos> c a b d <eos> a b late <unk2> <eos>: 17 tokens, of which the last 5 validate
    assert data.tokenizer.words == ["d", "b", "<eos>", "a", "c", "<unk>"]
    assert data.train.tolist() == [0, 1, 2, 1, 3, 0, 2, 4, 3, 1, 0, 2]
    assert data.val.tolist() == [3, 1, 5, 5, 2]
    assert data.tokenizer.eot == 2 and data.val_bytes is None


def test_unk_is_added_only_if_absent(tmp_path, monkeypatch):
    (tmp_path / "t.tokens").write_text("a <unk> b\n" * 5)
    (tmp_path / "v.tokens").write_text("new b\n")
    data = load(tmp_path, monkeypatch, data="t.tokens", val_data="v.tokens")
    assert data.tokenizer.words == ["a", "<unk>", "b", "<eos>"]
    assert data.val.tolist() == [1, 2, 3] and len(data.train) == 20
    assert data.val_bytes == len("new b\n")


def test_validation_part_is_the_end(folder, monkeypatch):
    ids = np.load(folder / "train.npy")
    data = load(folder, monkeypatch, data="train.npy", val_frac=0.25)
    assert data.train.tolist() == ids[:450].tolist() and data.val.tolist() == ids[450:].tolist()
    edit_sidecar(folder / "train.json", val=None)
    data = load(folder, monkeypatch, data="train.npy")
    assert data.train.tolist() == ids[:540].tolist() and data.val.tolist() == ids[540:].tolist()


def test_the_sidecar_names_the_validation_file(folder, monkeypatch):
    data = load(folder, monkeypatch, data="train.npy")
    assert data.train.tolist() == np.load(folder / "train.npy").tolist()
    assert data.val.tolist() == np.load(folder / "val.npy").tolist()
    write_tokens(folder, "other", [97, 98, 99] * 9)
    assert load(folder, monkeypatch, data="train.npy", val_data="other.npy").val.tolist() == [97, 98, 99] * 9


def test_uint32_tokens_and_their_vocabulary(tmp_path, monkeypatch):
    word_files(tmp_path)
    np.save(tmp_path / "train.npy", np.load(tmp_path / "train.npy").astype(np.uint32))
    edit_sidecar(tmp_path / "train.json", sha256=hashlib.sha256((tmp_path / "train.npy").read_bytes()).hexdigest())
    data = load(tmp_path, monkeypatch, data="train.npy")
    assert data.tokenizer.words == ["a", "<eos>", "b", "<unk>"]
    assert data.train.dtype == np.uint32
    assert data.train.tolist() == np.random.default_rng(0).integers(0, 4, 300).tolist()


@pytest.mark.parametrize("kind, eot", [("byte", 256), ("gpt2", 50256), ("auto", 50256)])
def test_text_round_trip(tmp_path, monkeypatch, kind, eot):
    text = make_text(tmp_path, count=400)
    try:
        data = load(tmp_path, monkeypatch, data="text.txt", tokenizer=kind)
    except train_dba.UserError as e:
        pytest.skip(f"{e}")
    ids = [*data.train, *data.val]
    assert ids[-1] == eot == data.tokenizer.eot
    assert data.tokenizer.decode(ids[:-1]) == text.encode()
    assert data.val_bytes == len(data.tokenizer.decode(data.val[:-1])), "bytes of text, without those that name the eot"


@pytest.mark.parametrize("n", [2, 17, 64, 65, 66, 130, 131])
@pytest.mark.parametrize("batch", [1, 4])
def test_windows_cover_the_validation_part_once(n, batch):
    tokens, block = np.arange(1000, 1000 + n, dtype=np.uint16), 16
    inputs, targets = [], []
    for x, y in eval_batches(tokens, batch, block):
        assert x.shape == y.shape == (batch, block) and x.dtype == y.dtype == torch.int64
        inputs += x[y >= 0].tolist()
        targets += y[y >= 0].tolist()
        assert ((y >= 0) <= (x >= 1000)).all()
    assert inputs == tokens[:-1].tolist() and targets == tokens[1:].tolist()


def test_fewer_windows_are_spread_over_the_part():
    tokens = np.arange(16 * 40 + 1, dtype=np.uint16)
    whole = [x.tolist() for x, _ in eval_batches(tokens, 2, 16)]
    some = [x.tolist() for x, _ in eval_batches(tokens, 2, 16, 5)]
    assert len(whole) == 20 and len(some) == 5 and all(x in whole for x in some)
    assert some[0] == whole[0] and some[-1] == whole[-1] and [whole.index(x) for x in some] == [0, 5, 10, 14, 19]
    assert len(list(eval_batches(tokens, 2, 16, 500))) == 20


@pytest.fixture
def seen(monkeypatch):
    """What each run of call() trained and validated on."""
    batches = {"train": [], "val": []}
    draw, windows = train_dba.sample_batch, train_dba.eval_batches

    def sample(*args):
        batches["train"].append(draw(*args))
        return batches["train"][-1]

    def evaluation(*args):
        for batch in windows(*args):
            batches["val"].append(batch)
            yield batch

    monkeypatch.setattr(train_dba, "sample_batch", sample)
    monkeypatch.setattr(train_dba, "eval_batches", evaluation)

    def take():
        stacked = {part: torch.stack([torch.stack(b) for b in got]) for part, got in batches.items()}
        batches["train"].clear()
        batches["val"].clear()
        return stacked
    return take


def test_batches_depend_on_the_seed_alone_and_windows_on_nothing(folder, seen):
    runs = {}
    for i, flags in enumerate(["", "--attn-mode decoupled --dropout 0.3 --null-attn --layers 2",
                               "--attn-mode mla --mlp gelu", "--lr 1e-2 --eval-iters 100", "--seed 5"]):
        assert_done(call(f"{RUN}{i} --steps 3 --grad-accum 2 {flags}", folder))
        runs[flags] = seen()
    first = runs[""]
    assert first["train"].shape == (3, 2, 8, 16)
    rng, ids = np.random.Generator(np.random.PCG64(1337)), np.load(folder / "train.npy").astype(int)
    starts = rng.integers(0, len(ids) - 16, size=8)
    assert first["train"][0, 0].tolist() == [ids[s:s + 16].tolist() for s in starts]
    assert first["train"][0, 1].tolist() == [ids[s + 1:s + 17].tolist() for s in starts]
    for flags, run in runs.items():
        assert torch.equal(run["train"], first["train"]) == (flags != "--seed 5")
        assert torch.equal(run["val"], first["val"])


def test_every_window_start_is_drawn():
    tokens = np.arange(20, dtype=np.uint16)
    x, y = train_dba.sample_batch(np.random.default_rng(0), tokens, 500, 16)
    assert sorted(set(x[:, 0].tolist())) == [0, 1, 2, 3] and int(y.max()) == 19


@pytest.mark.parametrize("flags", ["", "--eval-iters 100 --batch-size 3"])
def test_validation_loss_and_bits_per_byte(folder, flags):
    assert_done(call(f"{RUN} --steps 3 --lr 1e-2 {flags}", folder))
    line = next(line for line in read_log(folder / "run") if line["type"] == "eval")
    ckpt = train_dba.load_checkpoint(folder / "run/last.pt")
    model = train_dba.load_model(ckpt)
    val = np.load(folder / "val.npy").astype(int)
    bits, predicted = 0.0, 0
    for start in range(0, len(val) - 1, 16):
        part = torch.tensor(val[start:start + 17])
        p = model(part[None, :-1])[0].double().softmax(-1)
        bits -= p[torch.arange(len(part) - 1), part[1:]].log2().sum().item()
        predicted += len(part) - 1
    assert line["val_tokens"] == predicted == len(val) - 1
    assert line["val_bpb"] == pytest.approx(bits / int((val < 256).sum()), rel=1e-5)
    assert line["val_loss"] == pytest.approx(bits * math.log(2) / predicted, rel=1e-5)
    assert line["val_ppl"] == pytest.approx(math.exp(line["val_loss"]))


def test_bits_per_byte_is_null_where_the_bytes_are_unknown(folder):
    assert_done(call(f"{RUN} --val-frac 0.2", folder))
    assert [line["val_bpb"] for line in read_log(folder / "run") if line["type"] == "eval"] == [None]


def test_the_tokenizer_is_saved_with_the_model(folder):
    word_files(folder)
    assert_done(call(RUN, folder))
    for path in folder.glob("*.[nj]*"):
        path.unlink()
    result = call("--mode sample --ckpt run/best.pt --prompt-tokens 0,2,1,0 --max-new-tokens 1 --temperature 0", folder)
    assert_done(result)
    assert result.stdout.startswith("a b \na ")
    assert train_dba.load_checkpoint(folder / "run/best.pt")["tokenizer"].words == ["a", "<eos>", "b", "<unk>"]


def test_byte_text_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "crlf.txt").write_bytes(b"line\r\n" * 50)
    data = load(tmp_path, monkeypatch, data="crlf.txt", tokenizer="byte")
    assert bytes([*data.train, *data.val][:-1]) == b"line\r\n" * 50


def test_other_data_on_resume_is_refused(folder):
    make_text(folder)
    assert_done(call(f"{TRAIN} --steps 2 --out-dir run", folder))
    make_text(folder, seed=1)
    assert_error(call(f"{TRAIN} --steps 4 --out-dir run", folder), "other data")
    make_text(folder)
    assert_done(call(f"{TRAIN} --steps 4 --out-dir run", folder))


@pytest.mark.parametrize("name", ["t.jsonl", "t.JSONL", "t.json", "t.ndjson", "t.parquet", "t.csv"])
def test_text_with_markup_is_not_trained_on(tmp_path, name):
    (tmp_path / name).write_text('{"id": 5, "text": "calm sea"}\n' * 60)
    assert_error(call(f"--data {name} --tokenizer byte {TINY} --steps 1 --out-dir run", tmp_path), name,
                 "prepare_fineweb.py --dataset text")
    assert not (tmp_path / "run").exists()


def test_the_same_text_twice_is_refused_by_any_name(tmp_path):
    make_text(tmp_path)
    (tmp_path / "link.txt").symlink_to("text.txt")
    (tmp_path / "copy.txt").write_bytes((tmp_path / "text.txt").read_bytes())
    (tmp_path / "marked.txt").write_bytes(codecs.BOM_UTF8 + (tmp_path / "text.txt").read_bytes())
    for name in ("text.txt", "./text.txt", "link.txt", "copy.txt", "marked.txt"):
        assert_error(call(f"{TRAIN} --val-data {name} --steps 1 --out-dir run", tmp_path), "hold the same")


@pytest.mark.parametrize("kind", ["byte", "word"])
def test_a_byte_order_mark_is_no_token(tmp_path, monkeypatch, kind):
    make_text(tmp_path)
    plain = load(tmp_path, monkeypatch, data="text.txt", tokenizer=kind)
    (tmp_path / "text.txt").write_bytes(codecs.BOM_UTF8 + (tmp_path / "text.txt").read_bytes())
    marked = load(tmp_path, monkeypatch, data="text.txt", tokenizer=kind)
    assert marked.train.tolist() == plain.train.tolist() and marked.identity == plain.identity
