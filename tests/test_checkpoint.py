"""Checkpoints and the run folder: what breaks them is said in one line, and nothing that was saved is lost."""

import dataclasses
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
import zipfile

import pytest
import torch

import train_dba
from helpers import (
    TRAIN,
    assert_done,
    assert_error,
    call,
    cli,
    finish,
    last_step,
    lines,
    losses,
    make_text,
    read_log,
    snapshot,
    start,
)
from train_dba import UserError, load_checkpoint, load_model

RUN = f"{TRAIN} --steps 8 --save-every 4 --eval-every 2 --out-dir run"
SAMPLE = "--mode sample --ckpt run/last.pt --max-new-tokens 3"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    make_text(folder)
    assert_done(call(RUN, folder))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of a finished run of 8 steps, in `run`."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def longer(trained, tmp_path_factory):
    """Losses of a run of 16 steps that was never stopped."""
    folder = tmp_path_factory.mktemp("longer")
    make_text(folder)
    assert_done(call(f"{RUN} --steps 16", folder))
    return losses(folder / "run")


def unfinished(folder):
    """Make the finished run of 8 steps one of 16, stopped after step 8."""
    path = folder / "run/last.pt"
    ckpt = torch.load(path, weights_only=True)
    ckpt["config"]["steps"] = 16
    torch.save(ckpt, path)
    log = (folder / "run/train.jsonl").read_text().splitlines(True)
    (folder / "run/train.jsonl").write_text("".join(log[:-1]))


def edit(path, change):
    ckpt = torch.load(path, weights_only=True)
    change(ckpt)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        torch.save(ckpt, path)
    finally:
        sys.setrecursionlimit(limit)


class Payload:
    """An object whose unpickling makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def saved(content, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


FILES = {
    "empty": lambda old: b"",
    "one byte": lambda old: old[:1],
    "half": lambda old: old[:len(old) // 2],
    "all but one byte": lambda old: old[:-1],
    "garbage": lambda old: bytes(range(256)) * 40,
    "text": lambda old: b"not a checkpoint\n",
    "json": lambda old: b'{"step": 3}',
    "a pickle that runs code": lambda old: pickle.dumps(dict(format=1, config=Payload())),
    "a checkpoint that runs code": lambda old: saved(dict(format=1, config={}, tokenizer={}, model=Payload(), step=1)),
    "an old checkpoint that runs code": lambda old: saved(dict(model=Payload()), False),
    "a whole pickled model": lambda old: saved(torch.nn.Linear(2, 2)),
    "a tensor": lambda old: saved(torch.zeros(3)),
    "another program's": lambda old: saved(dict(model=dict(w=torch.zeros(3)), epoch=2)),
}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_files_that_are_no_checkpoint(folder, make):
    path = folder / "run/last.pt"
    path.write_bytes(make(path.read_bytes()))
    before = snapshot(folder)
    assert_error(call(SAMPLE, folder), "last.pt")
    assert_error(call(f"{RUN} --steps 16", folder), "last.pt")
    assert not (folder / "payload-ran").exists()
    assert snapshot(folder) == before


def test_a_payload_would_run_if_it_were_let(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.load(io.BytesIO(saved(dict(model=Payload()))), weights_only=False)
    assert (tmp_path / "payload-ran").exists()


def test_damaged_checkpoints_never_end_in_a_traceback(folder):
    path, rng, refused = folder / "run/best.pt", random.Random(0), 0
    whole, good = path.read_bytes(), load_checkpoint(path)["model"]
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(3):                                 # most of the structure is in the first and last kilobytes
            at = rng.choice([rng.randrange(3000), len(whole) - 1 - rng.randrange(3000), rng.randrange(len(whole))])
            damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            state = load_model(load_checkpoint(path)).state_dict()
        except UserError:
            refused += 1
        else:                                              # what was hit is padding, which nothing reads
            assert all(torch.equal(w, good[name]) for name, w in state.items())
    assert refused > 100


def test_one_flipped_bit_of_any_record_is_refused(folder):
    path = folder / "run/last.pt"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = [record for record in archive.infolist() if record.file_size > 8]
        places = {record.filename: whole.index(archive.read(record), record.header_offset) for record in records}
    assert len(records) > 20
    for record in records:
        damaged = bytearray(whole)
        damaged[places[record.filename] + record.file_size // 2] ^= 0x40        # of a weight's exponent, often
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)
    assert_error(call(SAMPLE, folder), "last.pt is damaged")


def test_packed_records_are_refused(folder):
    """A small file could unpack to any size."""
    path = folder / "run/last.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(folder / "packed.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    assert_error(call("--mode sample --ckpt packed.pt", folder), "compressed records")


def test_a_missing_checkpoint_names_what_makes_one(folder):
    assert_error(call("--mode sample --ckpt nowhere/best.pt", folder), "nowhere/best.pt", "make checkpoints")


def nested():
    value = []
    for _ in range(3000):                                  # deeper than Python recurses
        value = [value]
    return value


def config(**values):
    return lambda ckpt: ckpt["config"].update(values)


def weight(make):
    return lambda ckpt: ckpt["model"].update({"norm.weight": make(ckpt["model"]["norm.weight"])})


BIG = 2**30
EDITS = {
    "unknown setting": (config(no_such_setting=1), "no_such_setting"),
    "missing setting": (lambda c: c["config"].pop("d_ff"), "weights"),
    "no config": (lambda c: c.pop("config"), "not a checkpoint"),
    "config a list": (lambda c: c.update(config=[1, 2]), "config is no dict"),
    "model a list": (lambda c: c.update(model=[1, 2]), "model is no dict"),
    "model a number": (lambda c: c.update(model=5), "model is no dict"),
    "no weights": (lambda c: c["model"].clear(), "weights"),
    "text in a number": (config(d_model="32"), "settings"),
    "nothing in a number": (config(d_model=None), "settings"),
    "unknown mode": (config(attn_mode="quantum"), "quantum"),
    "no heads": (config(n_head=0), "--n-head"),
    "half a layer": (config(layers=0.5), "settings"),
    "narrow heads": (config(attn_mode="bottleneck", attn_dim=1), "--n-head"),
    "a config of sampling": (config(mode="sample", attn_mode="bottleneck", attn_dim=1), "settings"),
    "infinite norm_eps": (config(norm_eps=float("inf")), "--norm-eps"),
    "1e12 layers": (config(layers=10**12), "--layers"),
    "d_model 2^30": (config(d_model=BIG, attn_dim=BIG, embed_dim=BIG), "weights"),
    "d_ff 2^60": (config(d_ff=BIG**2), "weights"),
    "attn_dim 2^50": (config(attn_mode="bottleneck", attn_dim=2**50), "weights"),
    "n_head 2^30": (config(d_model=2 * BIG, attn_dim=2 * BIG, n_head=BIG, embed_dim=2 * BIG), "weights"),
    "other mode": (config(attn_mode="mla", kv_lora_rank=8, rope_dim=8), "weights"),
    "unknown tokenizer": (lambda c: c["tokenizer"].update(name="nope"), "settings"),
    "words missing": (lambda c: c["tokenizer"].update(name="word"), "settings"),
    "words not words": (lambda c: c["tokenizer"].update(name="word", words=[[1], [2]]), "settings"),
    "larger vocabulary": (lambda c: c["tokenizer"].update(name="word", words=["<eos>", "<unk>", *map(str, range(999))]),
                          "weights"),
    "weight of wrong shape": (lambda c: c["model"].update({"norm.weight": torch.zeros(31)}), "norm.weight"),
    "weight missing": (lambda c: c["model"].pop("norm.weight"), "norm.weight"),
    "weight too many": (lambda c: c["model"].update({"blocks.7.x": torch.zeros(3)}), "blocks.7.x"),
    "weight a number": (lambda c: c["model"].update({"norm.weight": 5}), "weights"),
    "weight sparse": (weight(lambda w: w.to_sparse()), "norm.weight"),
    "weight complex": (weight(lambda w: w.to(torch.complex64)), "norm.weight"),
    "weight quantised": (weight(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)), "norm.weight"),
    "weight in half": (weight(lambda w: w.half()), "norm.weight"),
    "weight repeated": (weight(lambda w: w[:1].expand(len(w))), "norm.weight"),
    "weight nowhere": (weight(lambda w: w.to("meta")), "norm.weight"),
    "weight unnamed": (lambda c: c["model"].update({5: torch.zeros(3)}), "weights"),
    "weight of lists in lists": (lambda c: c["model"].update(x=nested()), "weights"),
    "step negative": (lambda c: c.update(step=-1), "it.step"),
    "step half": (lambda c: c.update(step=2.5), "it.step"),
    "step a text": (lambda c: c.update(step="8"), "it.step"),
    "step a truth": (lambda c: c.update(step=True), "it.step"),
    "step nested": (lambda c: c.update(step=nested()), "last.pt"),
    "step huge": (lambda c: c.update(step=10**400), "it.step"),
    "step beyond the last": (lambda c: c.update(step=9), "step 9 of 8"),
    "best loss not a number": (lambda c: c.update(best_val_loss=float("nan")), "best_val_loss"),
    "tokenizer a text": (lambda c: c.update(tokenizer="byte"), "it.tokenizer"),
    "words that no text has": (lambda c: c["tokenizer"].update(name="word", words=["<eos>", "<unk>", "\ud800"]),
                               "settings"),
    "a truth for a number": (config(layers=True), "config.layers"),
    "a list for a number": (config(lr=[1]), "config.lr"),
    "layers beyond any number": (config(layers=10**400), "settings"),
    "data without counts": (lambda c: c.update(data=dict(sha256="0")), "it.data"),
    "data of a number": (lambda c: c["data"].update(val_sha256=5), "val_sha256"),
}


@pytest.mark.parametrize("change, word", EDITS.values(), ids=EDITS)
def test_edited_checkpoints(folder, change, word):
    edit(folder / "run/last.pt", change)
    peak, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert_error(call(SAMPLE, folder), word)
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000


RESUME_EDITS = {
    "wrong shape": lambda c: c["model"].update({"norm.weight": torch.zeros(31)}),
    "weight missing": lambda c: c["model"].pop("norm.weight"),
    "no optimizer, as in best.pt": lambda c: c.pop("optimizer"),
    "no rng": lambda c: c.pop("rng"),
    "broken rng": lambda c: c.update(rng=dict(bit_generator="MT19937")),
    "another model's optimizer": lambda c: c["optimizer"].update(param_groups=c["optimizer"]["param_groups"][:1]),
    "no data": lambda c: c.pop("data"),
    "rng a list": lambda c: c.update(rng=[1]),
    "rng huge": lambda c: c["rng"].update(uinteger=2**70),
    "rng nested": lambda c: c["rng"].update(state=dict(state=nested(), inc=1)),
    "optimizer a list": lambda c: c.update(optimizer=[c["optimizer"]]),
    "optimizer nested": lambda c: c["optimizer"].update(state=nested()),
    "optimizer's groups numbers": lambda c: c["optimizer"].update(param_groups=[1, 2]),
    "optimizer without a state": lambda c: c["optimizer"]["state"].clear(),
    "moment missing": lambda c: c["optimizer"]["state"][0].pop("exp_avg"),
    "moment of wrong shape": lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "moment sparse": lambda c: c["optimizer"]["state"][0].update(exp_avg=c["model"]["embed.weight"].to_sparse()),
    "moment in double": lambda c: c["optimizer"]["state"][0].update(exp_avg=c["model"]["embed.weight"].double()),
    "moment's step negative": lambda c: c["optimizer"]["state"][0].update(step=torch.tensor(-1.0)),
    "moment's step half": lambda c: c["optimizer"]["state"][0].update(step=torch.tensor(7.5)),
    "moment's step nan": lambda c: c["optimizer"]["state"][0].update(step=torch.tensor(float("nan"))),
    "moment's step a number": lambda c: c["optimizer"]["state"][0].update(step=8),
}


@pytest.mark.parametrize("change", RESUME_EDITS.values(), ids=RESUME_EDITS)
def test_resuming_an_edited_checkpoint(folder, change):
    edit(folder / "run/last.pt", change)
    before = snapshot(folder)
    assert_error(call(f"{RUN} --steps 16", folder), "run")
    assert snapshot(folder) == before


def test_poisoned_weights_stop_the_run_and_name_the_step(folder):
    edit(folder / "run/last.pt", lambda c: c["model"]["embed.weight"].fill_(float("nan")))
    before = (folder / "run/last.pt").read_bytes()
    assert_error(call(f"{RUN} --steps 16", folder), "step 9", "loss nan")
    assert (folder / "run/last.pt").read_bytes() == before
    assert_error(cli(f"{RUN} --steps 16", folder), "step 9", "loss nan")


def test_nan_keeps_the_last_good_checkpoint(folder):
    """Weights grow until a product overflows; what was saved before stays."""
    assert_error(call(f"{RUN} --lr 1e30 --save-every 1 --out-dir wild", folder), "step 2", "holds step 1")
    ckpt = load_checkpoint(folder / "wild/last.pt")
    assert ckpt["step"] == 1
    assert all(w.isfinite().all() for w in ckpt["model"].values())
    log = read_log(folder / "wild")
    assert [line["step"] for line in log[1:]] == [1] and all(line["type"] != "done" for line in log)


# --- a full disk

def limited(n):
    """Before the trainer starts: no file may grow past n bytes, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))


def assert_no_temporary(folder):
    assert not list(folder.rglob("*.tmp"))


def test_full_disk_while_saving(folder, longer):
    unfinished(folder)
    before = (folder / "run/last.pt").read_bytes()
    limit = len(before) // 2
    assert (folder / "run/best.pt").stat().st_size < limit, "only last.pt is to fail"
    assert_error(cli(f"{RUN} --steps 16", folder, preexec_fn=limited(limit)), "last.pt", "disk full", "space")
    assert (folder / "run/last.pt").read_bytes() == before
    assert load_checkpoint(folder / "run/last.pt")["step"] == 8
    assert last_step(folder / "run") == 12
    assert_no_temporary(folder)
    assert_done(call(f"{RUN} --steps 16", folder))
    assert losses(folder / "run") == longer


def test_full_disk_on_the_first_save(folder):
    assert_error(cli(f"{RUN} --out-dir new", folder, preexec_fn=limited(20_000)), "last.pt", "disk full")
    assert_no_temporary(folder)
    assert_done(call(f"{RUN} --out-dir new", folder))
    assert losses(folder / "new") == losses(folder / "run")


def test_full_disk_from_the_start(folder):
    """Of which the lock, too, has no room."""
    assert_error(cli(f"{RUN} --out-dir new", folder, preexec_fn=limited(5)), "new/command.txt", "disk full")
    assert not (folder / "new/lock").exists()


LOG_LIMIT = """
import os, resource, sys, train_dba
append = train_dba.append_line
def limited(path, **line):
    if line.get("step") == 11:
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) + 25, resource.RLIM_INFINITY))
    append(path, **line)
train_dba.append_line = limited
train_dba.leave(train_dba.main())
"""


def test_full_disk_while_logging(folder, longer):
    unfinished(folder)
    path = str(train_dba.__file__).rsplit("/", 1)[0]
    program = ["-c", f"import sys; sys.path.insert(0, {path!r})\n{LOG_LIMIT}"]
    result = finish(start(f"{RUN} --steps 16", folder, program))
    assert_error(result, "train.jsonl", "disk full", "space")
    text = (folder / "run/train.jsonl").read_text()
    assert not text.endswith("\n") and len(text.splitlines()[-1]) == 25, "the last line is torn"
    assert load_checkpoint(folder / "run/last.pt")["step"] == 8
    assert_no_temporary(folder)
    assert_done(call(f"{RUN} --steps 16", folder))
    assert losses(folder / "run") == longer


def test_full_file_system(folder, longer):
    """The same on a real file system of 1 MB, where that can be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("can't mount a small file system here")
    try:
        unfinished(folder)
        shutil.copytree(folder / "run", disk / "run")
        before = (disk / "run/last.pt").read_bytes()
        room = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(room.f_bavail * room.f_bsize - 150_000))
        assert_error(cli(f"{RUN} --steps 16 --out-dir disk/run", folder), "last.pt", "disk full", "space")
        assert (disk / "run/last.pt").read_bytes() == before
        assert_no_temporary(disk)
        (disk / "filler").unlink()
        assert_done(call(f"{RUN} --steps 16 --out-dir disk/run", folder))
        assert losses(disk / "run") == longer
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("fail", ["write", "sync", "rename"])
def test_a_save_that_fails_leaves_the_file_and_nothing_else(tmp_path, monkeypatch, fail):
    path = tmp_path / "file"
    path.write_text("old")

    def broken(*args):
        raise OSError(28, "No space left on device")

    if fail != "write":
        monkeypatch.setattr(os, {"sync": "fsync", "rename": "replace"}[fail], broken)
    with pytest.raises(UserError, match="No space"):
        train_dba.write_whole(path, broken if fail == "write" else lambda p: p.write_text("new"))
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_is_synced_before_it_takes_the_place_of_another(tmp_path, monkeypatch):
    calls, path = [], tmp_path / "file"
    fsync, replace = os.fsync, os.replace
    path.write_text("old")

    def noted_fsync(fd):
        calls.append(("sync", os.readlink(f"/proc/self/fd/{fd}"), path.read_text()))
        fsync(fd)

    def noted_replace(a, b):
        calls.append(("rename", str(a), path.read_text()))
        replace(a, b)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    train_dba.write_whole(path, lambda p: p.write_text("new"))
    temporary = calls[0][1]
    assert calls[:2] == [("sync", temporary, "old"), ("rename", temporary, "old")] and temporary != str(path)
    assert path.read_text() == "new"


# --- the same command again, and other commands, in a used folder

def test_a_finished_run_says_so(folder):
    before = snapshot(folder)
    result = call(RUN, folder)
    assert_done(result)
    assert "finished" in result.stdout and "8 steps" in result.stdout
    assert snapshot(folder) == before


def test_a_finished_run_is_extended(folder, longer):
    assert_done(call(f"{RUN} --steps 16", folder))
    assert losses(folder / "run") == longer
    assert [line["type"] for line in read_log(folder / "run")].count("done") == 1
    assert "finished" in call(f"{RUN} --steps 16", folder).stdout
    assert_error(call(RUN, folder), "steps was 16, is 8")


def test_the_best_loss_is_remembered(tmp_path, monkeypatch):
    """A run that gets worse after it resumed doesn't replace its best.pt."""
    make_text(tmp_path)
    for steps, loss in ((2, 1.0), (4, 2.0), (6, 0.5)):
        monkeypatch.setattr(train_dba, "evaluate", lambda *args: (loss, 5))
        assert_done(call(f"{TRAIN} --steps {steps} --eval-every 2 --out-dir run", tmp_path))
        best = [line["best_val_loss"] for line in read_log(tmp_path / "run") if "best_val_loss" in line]
        assert best[-1] == min(1.0, loss)
        assert load_checkpoint(tmp_path / "run/best.pt")["step"] == (6 if steps == 6 else 2)


def test_an_extended_run_resumes_by_its_own_command(folder):
    """Warm-up defaults to a share of --steps, which the extension changes."""
    flags = RUN.replace("--warmup-steps 0", "").replace("--steps 8", "")
    assert_done(call(f"{flags} --out-dir other --steps 20", folder))
    assert_done(call(f"{flags} --out-dir other --steps 40", folder))
    result = call(f"{flags} --out-dir other --steps 40", folder)
    assert_done(result)
    assert "finished" in result.stdout
    assert json.loads((folder / "other/resolved_config.json").read_text())["warmup_steps"] == 2


def test_overwrite_starts_afresh(folder):
    expected = losses(folder / "run")
    assert_done(call(f"{RUN} --seed 3 --overwrite", folder))
    log = read_log(folder / "run")
    assert [line["type"] for line in log].count("meta") == 1 and log[0]["config"]["seed"] == 3
    assert losses(folder / "run") != expected
    assert_done(call(f"{RUN} --overwrite", folder))
    assert losses(folder / "run") == expected


def test_overwrite_leaves_no_old_best_checkpoint(folder):
    assert_error(call(f"{RUN} --overwrite --lr 1e30 --save-every 1", folder), "step 2")
    assert not (folder / "run/best.pt").exists()
    assert load_checkpoint(folder / "run/last.pt")["config"].lr == 1e30


@pytest.mark.parametrize("flags, words", {
    "--steps 16 --lr 1e-2": ["--lr was 0.0003, is 0.01", "--overwrite"],
    "--steps 16 --seed 3 --d-ff 32": ["--seed was 1337, is 3", "--d-ff was 64, is 32"],
    "--attn-mode mla": ["--attn-mode was 'standard', is 'mla'"],
    "--batch-size 8": ["--batch-size was 4, is 8"],
    "--dropout 0.1": ["--dropout was 0.0, is 0.1"],
    "--block 8": ["--block was 16, is 8"],
    "--dtype bfloat16": ["dtype was 'float32', is 'bfloat16'"],
    "--val-frac 0.3": ["--val-frac"],
}.items())
def test_other_settings_are_listed(folder, flags, words):
    before = snapshot(folder)
    assert_error(call(f"{RUN} {flags}", folder), *words)
    assert snapshot(folder) == before


def test_cadence_and_place_may_change(folder, longer):
    (folder / "run").rename(folder / "moved")
    (folder / "text.txt").rename(folder / "renamed.txt")
    flags = RUN.replace("text.txt", "renamed.txt")
    assert_done(call(f"{flags} --steps 16 --out-dir moved --eval-every 16 --save-every 5 --eval-iters 2", folder))
    steps = [line for line in losses(folder / "moved") if line["type"] == "train"]
    assert steps == [line for line in longer if line["type"] == "train"]


def test_a_run_goes_on_by_its_own_settings(folder):
    """Those in its resolved_config.json, where a preset stands resolved."""
    assert_done(call(f"{RUN} --size tiny --layers 1 --d-model 32 --d-ff 64 --n-head 2 --steps 4 --out-dir new", folder))
    resumed = call("--config new/resolved_config.json --out-dir new --steps 6", folder)
    assert_done(resumed)
    assert read_log(folder / "new")[-1]["step"] == 6


def test_a_checkpoint_that_lies_alone_in_the_folder_is_kept(folder):
    """As one that was copied there to sample from: a run that began there would remove it."""
    (folder / "alone").mkdir()
    (folder / "run/best.pt").rename(folder / "alone/best.pt")
    before = snapshot(folder)
    assert_error(call(f"{RUN} --out-dir alone", folder), "alone holds best.pt of a run whose log is gone")
    assert snapshot(folder) == before


def test_last_deleted(folder):
    unfinished(folder)
    (folder / "run/last.pt").unlink()
    before = snapshot(folder)
    assert_error(call(RUN, folder), "last.pt", "--overwrite")
    assert snapshot(folder) == before


@pytest.mark.parametrize("text, words", [
    ("torn {\n", ["train.jsonl:4"]),
    ("5\n", ["train.jsonl:4"]),
    ("{}\n", ["train.jsonl:4"]),
    ('\udcff\udcfe\n', ["train.jsonl"]),
    ('{"type": 5}\n', ["train.jsonl:4", "the line.type"]),
    ('{"type": "train", "step": "9"}\n', ["train.jsonl:4", "the line.step"]),
    ('{"type": "train", "step": -1e400}\n', ["train.jsonl:4", "the line.step"]),
    ("[" * 100_000 + "\n", ["train.jsonl:4", "RecursionError"]),
], ids=["torn", "number", "no type", "not UTF-8", "type a number", "step a text", "step infinite", "nested"])
def test_a_damaged_log_is_not_thrown_away(folder, text, words):
    unfinished(folder)
    path = folder / "run/train.jsonl"
    log = path.read_text().splitlines(True)
    path.write_bytes("".join([*log[:3], text, *log[4:]]).encode(errors="surrogateescape"))
    before = snapshot(folder)
    assert_error(call(f"{RUN} --steps 16", folder), *words)
    assert snapshot(folder) == before


def test_settings_of_a_log_without_a_checkpoint_are_checked(folder):
    log = (folder / "run/train.jsonl").read_text().splitlines(True)
    (folder / "run/last.pt").unlink()
    for wrong, word in ((dict(d_model="32"), "config.d_model"), (dict(no_such=1), "no_such")):
        meta = json.loads(log[0])
        meta["config"].update(wrong)
        (folder / "run/train.jsonl").write_text(json.dumps(meta) + "\n" + log[1])
        assert_error(call(RUN, folder), "train.jsonl", word)


def test_settings_of_an_older_log_have_todays_defaults(folder):
    logged = read_log(folder / "run")[0]["config"]
    expected = train_dba.config_of(logged)
    assert expected == load_checkpoint(folder / "run/last.pt")["config"]
    del logged["one_temperature"], logged["micro_batch"]
    assert train_dba.config_of({**logged, "lr": 1}) == dataclasses.replace(expected, lr=1)
    for wrong in (dict(lr="1"), dict(layers=1.0), dict(rope=1), dict(seed=True), dict(no_such=1), [], None):
        with pytest.raises((ValueError, TypeError)):
            train_dba.config_of({**logged, **wrong} if isinstance(wrong, dict) else wrong)


def test_a_loss_without_a_perplexity():
    assert train_dba.perplexity(2.0) == math.exp(2) and train_dba.perplexity(709.0) > 8e307
    assert train_dba.perplexity(710.0) is train_dba.perplexity(1e300) is None


@pytest.mark.parametrize("torn", ['{"type": "train", "step": 9, "los', "\0" * 300, "{"])
def test_a_torn_last_line_is_dropped(folder, longer, torn):
    unfinished(folder)
    with open(folder / "run/train.jsonl", "a") as f:
        f.write('{"type": "train", "step": 9, "tokens": 576, "loss": 77.0}\n' + torn)
    assert_done(call(f"{RUN} --steps 16", folder))
    assert losses(folder / "run") == longer


# --- sampling

def test_sampling_leaves_the_run_folder_alone_and_repeats_itself(folder):
    before = snapshot(folder)
    first = cli(f"{SAMPLE} --prompt ab --seed 4 --max-new-tokens 40 --no-stop-at-eot", folder)
    assert_done(first)
    assert first.stdout.startswith("ab") and len(first.stdout) > 30
    assert call(f"{SAMPLE} --prompt ab --seed 4 --max-new-tokens 40 --no-stop-at-eot", folder).stdout == first.stdout
    assert call(f"{SAMPLE} --prompt ab --seed 5 --max-new-tokens 40", folder).stdout != first.stdout
    assert_done(call(f"{SAMPLE.replace('last', 'best')} --prompt-tokens '97 98'", folder))
    assert snapshot(folder) == before


def test_sampling_streams(folder):
    """Text is there while more is being made: the process is stopped long before it could be done."""
    process = start(f"{SAMPLE} --prompt stream --temperature 0 --max-new-tokens 100000", folder)
    try:
        assert process.stdout.read(10).startswith(b"stream")
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_reader_that_goes_away(folder):
    process = start(f"{SAMPLE} --prompt stream --temperature 0 --max-new-tokens 100000", folder)
    process.stdout.read(8)
    process.stdout.close()
    process.wait(60)
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize("prompt", ["--prompt-tokens 257", "--prompt-tokens=-1", "--prompt-tokens 1,x",
                                    "--prompt-tokens ,", "--prompt '\udcff'", f"--seed {2**64}"])
def test_wrong_prompts(folder, prompt):
    assert_error(call(f"{SAMPLE} {prompt}", folder), prompt.split("=")[0].split()[0])


@pytest.mark.parametrize("flags", ["", "--prompt ''", "--prompt ' '", "--temperature 1e-300", "--temperature 1e30",
                                   "--top-p 1e-300", "--top-k 1", f"--top-k {10**30}",
                                   "--kv-cache fp32 --prompt 'longer than the block of 16'"])
def test_extreme_sampling(folder, flags):
    result = call(f"{SAMPLE} {flags}", folder)
    assert_done(result)
    assert len(lines(result.stderr)) <= 4


def test_blank_prompt_of_a_word_model(folder):
    assert_done(call(f"{RUN} --tokenizer word --steps 1 --out-dir words", folder))
    for prompt in ("", " "):
        assert_done(call(f"--mode sample --ckpt words/last.pt --max-new-tokens 3 --prompt '{prompt}'", folder))


def test_a_checkpoint_needs_no_other_file(folder):
    """A checkpoint is sampled from where there is nothing but the file."""
    shutil.copy(folder / "run/best.pt", folder / "alone.pt")
    shutil.rmtree(folder / "run")
    (folder / "text.txt").unlink()
    assert_done(call("--mode sample --ckpt alone.pt --max-new-tokens 2 --prompt a", folder))
