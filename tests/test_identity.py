"""Data are what they hold: a moved file is the same, another content is not; what is kept of a hash is never wrong."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import train_dba
from helpers import (
    TINY,
    TRAIN,
    TRAINER,
    assert_done,
    assert_error,
    call,
    environment,
    losses,
    make_text,
    read_log,
    write_tokens,
)
from train_dba import check_same_data, known_digest, load_checkpoint, load_data, make_config

WORDS = ["a", "<eos>", "b", "<unk>"]


def write_words(folder, words=WORDS):
    (folder / "vocab.json").write_text(json.dumps(words))
    for name, seed in (("train", 0), ("val", 1)):
        ids = np.random.default_rng(seed).integers(0, 4, 300)
        write_tokens(folder, name, ids, tokenizer="word", vocab_size=4, eot=1, vocab="vocab.json",
                     val="val.npy" if name == "train" else None)


@pytest.fixture
def folder(tmp_path):
    """Two texts, two token files of words, and a run of two steps on each."""
    make_text(tmp_path)
    make_text(tmp_path, "val.txt", 200, seed=1)
    write_words(tmp_path)
    for flags in RUNS.values():
        assert_done(call(f"{flags} --steps 2", tmp_path))
    return tmp_path


RUNS = {"text": f"{TRAIN} --val-data val.txt --out-dir text",
        "tokens": f"--data train.npy {TINY} --warmup-steps 0 --out-dir tokens"}


def swap_letters(path):
    path.write_bytes(path.read_bytes().translate(bytes.maketrans(b"abc", b"bca")))


def reverse(name):
    def change(folder):
        info = json.loads((folder / f"{name}.json").read_text())
        del info["sha256"]
        write_tokens(folder, name, np.load(folder / f"{name}.npy")[::-1], **info)
    return change


CHANGES = {
    "training text": ("text", lambda d: swap_letters(d / "text.txt"), "sha256"),
    "validation text": ("text", lambda d: swap_letters(d / "val.txt"), "val_sha256"),
    "training ids": ("tokens", reverse("train"), "sha256"),
    "validation ids": ("tokens", reverse("val"), "val_sha256"),
    "vocabulary": ("tokens", lambda d: write_words(d, ["b", "<eos>", "a", "<unk>"]), "tokenizer_sha256"),
}


@pytest.mark.parametrize("run, change, key", CHANGES.values(), ids=CHANGES)
def test_other_data_are_refused_and_named(folder, run, change, key):
    recorded = load_checkpoint(folder / run / "last.pt")["data"]
    assert recorded == {**recorded, **read_log(folder / run)[0]["data"]}
    shutil.copytree(folder, folder / "before")
    change(folder)
    assert_error(call(f"{RUNS[run]} --steps 4", folder), "other data", f"{key} was")
    assert "--overwrite" in call(f"{RUNS[run]} --steps 4", folder).stderr
    assert_done(call(f"{RUNS[run]} --steps 4", folder / "before"))


def test_old_checkpoints_are_held_to_what_they_say(folder):
    """Before validation data and vocabularies were hashed; the vocabulary is in the checkpoint all the same."""
    for run in RUNS:
        path = folder / run / "last.pt"
        ckpt = torch.load(path, weights_only=True)
        del ckpt["data"]["val_sha256"], ckpt["data"]["tokenizer_sha256"]
        torch.save(ckpt, path)
    shutil.copy(folder / "val.txt", folder / "other.txt")
    assert_error(call(f"{RUNS['text'].replace('val.txt', 'other.txt')} --steps 4", folder), "--val-data was")
    for flags in RUNS.values():
        assert_done(call(f"{flags} --steps 3", folder))
    path = folder / "tokens/last.pt"
    ckpt = torch.load(path, weights_only=True)
    del ckpt["data"]["val_sha256"], ckpt["data"]["tokenizer_sha256"]
    torch.save(ckpt, path)
    write_words(folder, ["b", "<eos>", "a", "<unk>"])
    assert_error(call(f"{RUNS['tokens']} --steps 4", folder), "tokenizer_sha256 was")


def test_moved_data_are_the_same(folder):
    assert_done(call(f"{RUNS['text']} --steps 4 --eval-every 2 --out-dir whole", folder))
    (folder / "moved").mkdir()
    for name in ("text.txt", "val.txt"):
        (folder / name).rename(folder / "moved" / name)
    flags = RUNS["text"].replace("text.txt", "moved/text.txt").replace("val.txt", "moved/val.txt")
    assert_done(call(f"{flags} --steps 4", folder))
    assert losses(folder / "text") == losses(folder / "whole")


def test_other_tools_ask_the_same(folder, monkeypatch):
    monkeypatch.chdir(folder)
    ckpt = load_checkpoint("tokens/best.pt")
    data = load_data(ckpt["config"])
    check_same_data(ckpt["data"], data, "tokens/best.pt", "")
    check_same_data(dict(sha256=data.sha256), data, "an older log", "")
    for key in data.identity:
        with pytest.raises(train_dba.UserError, match=f"best.pt was trained on other data .{key} was .*; say --data"):
            check_same_data({**ckpt["data"], key: "0"}, data, "best.pt", "say --data")


def test_identity_of_a_part_cut_off(tmp_path, monkeypatch):
    make_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = load_data(make_config(data="text.txt", tokenizer="byte", block=2, d_model=32, n_head=2))
    assert data.val_sha256 is None and data.sha256 == hashlib.sha256((tmp_path / "text.txt").read_bytes()).hexdigest()


# --- hashes that are kept


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """(file of ids, folder of kept hashes, list of the files that were read); files of any size are kept, at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(train_dba, "KEPT_FROM", 1)
    monkeypatch.setattr(train_dba.time, "time_ns", lambda: 2**62)               # so that no file is new
    read, digest = [], train_dba.digest_ids
    monkeypatch.setattr(train_dba, "digest_ids", lambda path, *how: read.append(path) or digest(path, *how))
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(1000, dtype=np.uint16))
    return path, tmp_path / "cache/dba", read


def ask(path):
    return known_digest(path, 128, np.dtype(np.uint16))


def truth(path):
    return hashlib.sha256(path.read_bytes()).hexdigest(), int(np.load(path).max())


def test_a_hash_is_computed_once(kept):
    path, cache, read = kept
    assert ask(path) == ask(path) == ask(path) == truth(path) and len(read) == 1
    assert len(list(cache.iterdir())) == 1 and sorted(p.name for p in path.parent.iterdir()) == ["cache", "ids.npy"]


def test_a_file_that_changed_is_read_again(kept):
    path, _, read = kept
    ask(path)
    stat = path.stat()
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"\x01\x7f")              # of the same size, and then of the same time
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ask(path) == truth(path) and len(read) == 2 and ask(path)[1] == 0x7f01
    other = path.with_name("other")
    other.write_bytes(data)
    os.replace(other, path)
    assert ask(path) == truth(path) and len(read) == 3


def test_a_file_that_is_new_is_not_entered(kept, monkeypatch):
    path, _, read = kept
    monkeypatch.setattr(train_dba.time, "time_ns", lambda: path.stat().st_ctime_ns + 10**9)
    assert ask(path) == ask(path) == truth(path) and len(read) == 2


def test_a_file_that_changes_while_it_is_read_is_not_entered(kept, monkeypatch):
    path, _, read = kept
    digest = train_dba.digest_ids

    def changing(*args):
        answer = digest(*args)
        path.write_bytes(path.read_bytes()[:-1] + b"\x02")
        return answer

    with monkeypatch.context() as m:
        m.setattr(train_dba, "digest_ids", changing)
        ask(path)
    assert ask(path) == truth(path) and len(read) == 2


@pytest.mark.parametrize("damage", [
    lambda entry: b"", lambda entry: entry[:-5], lambda entry: b"\xff" * 3000, lambda entry: b"{}",
    lambda entry: b"[" * 3000, lambda entry: entry.replace(b"999", b"998"),
    lambda entry: entry[:100] + bytes([entry[100] ^ 1]) + entry[101:],
], ids=["empty", "cut", "garbage", "an object", "nested", "another id", "a bit"])
def test_a_damaged_entry_is_not_trusted(kept, damage):
    path, cache, read = kept
    ask(path)
    (entry,) = cache.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert ask(path) == ask(path) == truth(path) and len(read) == 2


def test_no_place_to_keep_it(kept, capsys):
    path, cache, read = kept
    cache.parent.write_text("a file where the folder should be")
    assert ask(path) == ask(path) == truth(path) and len(read) == 2
    assert capsys.readouterr().err.count("is hashed at every start") == 2


def test_small_files_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.save(tmp_path / "ids.npy", np.arange(1000, dtype=np.uint16))
    assert ask(tmp_path / "ids.npy") == truth(tmp_path / "ids.npy") and not (tmp_path / "cache").exists()


ASK = """
import sys, time
sys.path.insert(0, sys.argv[1])
import pathlib, numpy, train_dba
train_dba.KEPT_FROM, digest = 1, train_dba.digest_ids
train_dba.time.time_ns = lambda: 2**62
def slow(*args):
    print("reading", flush=True)
    time.sleep(0.5)
    return digest(*args)
train_dba.digest_ids = slow
print(*train_dba.known_digest(pathlib.Path(sys.argv[2]), 128, numpy.dtype("uint16")))
"""


def test_the_second_process_waits_for_the_first(tmp_path):
    """As the ranks of one machine do: one reads the file, all have its hash."""
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(1000, dtype=np.uint16))
    command = [sys.executable, "-c", ASK, str(TRAINER.parent), str(path)]
    env = {**environment(), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    said = [process.communicate(timeout=120)[0].decode().splitlines() for process in processes]
    assert [out[-1] for out in said] == [" ".join(map(str, truth(path)))] * 3
    assert sorted(map(len, said)) == [1, 1, 2]
