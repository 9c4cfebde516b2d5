"""A run folder belongs to one process at a time; what it says of the run is true and readable."""

import errno
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import train_dba
from helpers import (
    TRAIN,
    TRAINER,
    assert_done,
    assert_error,
    call,
    cli,
    environment,
    finish,
    last_step,
    lines,
    make_text,
    read_log,
    snapshot,
    start,
)
from train_dba import UserError, exclusive, load_checkpoint

RUN = f"{TRAIN} --steps 8 --out-dir run"
ENDLESS = f"{TRAIN} --steps 1000000 --save-every 1 --eval-every 5 --eval-iters 1 --log-every 10 --out-dir run"


@pytest.fixture
def folder(tmp_path):
    make_text(tmp_path)
    return tmp_path


@pytest.fixture
def endless(folder):
    """A process that trains in `run`, and saves at every step."""
    process = start(ENDLESS, folder)
    while process.poll() is None and last_step(folder / "run") < 10:
        time.sleep(0.02)
    yield process
    process.kill()
    process.communicate()


def test_the_second_process_is_told_of_the_first(folder, endless):
    first = last_step(folder / "run")
    for flags in (ENDLESS, f"{ENDLESS} --overwrite", f"{ENDLESS} --seed 5"):
        assert_error(cli(flags, folder), "another run is writing run", f"process {endless.pid} on ", "wait for it")
    while endless.poll() is None and last_step(folder / "run") < first + 20:
        time.sleep(0.02)
    endless.send_signal(signal.SIGTERM)
    result = finish(endless)
    assert result.code == 143, result.stderr
    log = read_log(folder / "run")
    steps = [line["step"] for line in log if line["type"] == "train"]
    assert steps == [1, *range(10, steps[-1] + 1, 10)] and [line["type"] for line in log].count("resume_meta") == 0
    assert load_checkpoint(folder / "run/last.pt")["step"] >= steps[-1]
    assert not (folder / "run/lock").exists()


def test_two_that_start_at_once(folder):
    """Neither finds the folder; one of them trains."""
    processes = [start(ENDLESS, folder) for _ in range(2)]
    try:
        while all(process.poll() is None for process in processes):
            time.sleep(0.02)
        refused, training = sorted(processes, key=lambda process: process.poll() is None)
        assert training.poll() is None
        assert_error(finish(refused), "another run is writing run", f"process {training.pid} on ")
    finally:
        for process in processes:
            process.kill()
    training.communicate()


def test_last_is_readable_while_it_is_written(folder, endless):
    """522 reads, as in the count that found 97 unreadable ones."""
    steps = {load_checkpoint(folder / "run/last.pt")["step"] for _ in range(522)}
    assert endless.poll() is None and len(steps) > 5


def test_a_killed_run_leaves_no_lock_and_its_temporaries_go(folder, endless):
    endless.kill()
    endless.communicate()
    run = folder / "run"
    assert (run / "lock").exists(), "a file without a lock"
    stale = [run / "last.pt.tmp", run / "last.pt.0123456789ab.tmp", run / "train.jsonl.ba9876543210.tmp"]
    others = [run / "eval_ppl_fp16.json.0123456789ab.tmp", run / "mine.tmp", run / "last.pt.tmp.txt"]
    for path in (*stale, *others):
        path.write_text("half")
    assert_done(call(f"{ENDLESS} --steps {load_checkpoint(run / 'last.pt')['step'] + 2} --overwrite", folder))
    assert not any(path.exists() for path in stale) and all(path.exists() for path in others)
    assert not (run / "lock").exists()


def test_a_file_system_that_cannot_lock(folder, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    result = call(RUN, folder)
    assert_done(result)
    assert [line for line in lines(result.stderr) if line.startswith("note:")] == [
        "note: the file system of run can't lock (No locks available): see to it that nothing else writes there"]


def test_a_lock_that_was_removed_locks_nothing(tmp_path):
    """Its last holder removes the file between another's open() and flock(): both would hold it."""
    path, flock, calls = tmp_path / "lock", fcntl.flock, []

    def removed(f, how):
        if not calls:
            path.unlink()
        calls.append(how)
        flock(f, how)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(fcntl, "flock", removed)
        with exclusive(path, "it"):
            assert len(calls) == 2 and path.read_text() == f"process {os.getpid()} on {os.uname().nodename}"
            m.undo()
            with pytest.raises(UserError, match=f"another run is writing it: process {os.getpid()} on "):
                with exclusive(path, "it"):
                    pass
    assert not path.exists()


def test_one_that_waits(tmp_path):
    hold = ("import sys; sys.path.insert(0, sys.argv[1]); import pathlib, train_dba\n"
            "with train_dba.exclusive(pathlib.Path(sys.argv[2]), 'it', wait=True):\n"
            "    print('held', flush=True); sys.stdin.read()")
    command = [sys.executable, "-c", hold, str(TRAINER.parent), str(tmp_path / "lock")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    first, second = subprocess.Popen(command, **pipes), None
    try:
        assert first.stdout.readline() == b"held\n"
        second = subprocess.Popen(command, **pipes)
        assert f"process {first.pid} on ".encode() in (said := second.stderr.readline()) and b"waiting" in said
        first.communicate(timeout=60)
        assert second.communicate(timeout=60)[0] == b"held\n" and second.returncode == 0
    finally:
        for process in filter(None, (first, second)):
            process.kill()


def test_a_refused_command_leaves_no_folder(folder):
    assert_error(call(f"{TRAIN} --steps 1 --block 100000 --out-dir a/b/c", folder), "--block")
    assert not (folder / "a").exists()
    (folder / "a").mkdir()
    assert_error(call(f"{TRAIN} --steps 1 --block 100000 --out-dir a/b/c", folder), "--block")
    assert [*folder.glob("a/*")] == [] and (folder / "a").exists()


def test_a_lock_that_cannot_be_made_is_said(folder):
    (folder / "run/lock").mkdir(parents=True)
    result = call(RUN, folder)
    assert_done(result)
    assert "note: run isn't locked (IsADirectoryError" in result.stderr


def test_folders_that_cannot_be_had(folder):
    """A name that the system doesn't take, for which pathlib raises; and an old checkpoint that can't be removed."""
    assert_error(call(f"{TRAIN} --steps 1 --out-dir a/{'x' * 300}", folder), "can't make the run folder", "too long")
    (folder / "run/last.pt").mkdir(parents=True)
    assert_error(call(f"{RUN} --overwrite", folder), "can't write run/last.pt", "directory")


def test_a_finished_run_is_as_it_was(folder):
    assert_done(call(RUN, folder))
    before = snapshot(folder)
    assert "finished" in call(RUN, folder).stdout
    assert snapshot(folder) == before and "lock" not in " ".join(before)


# --- what the folder says

def test_a_path_of_any_bytes(folder):
    """command.txt is text, and a shell that reads it gives the same bytes."""
    name = b"caf\xe9 'of' \\ ours"
    command = [os.fsencode(part) for part in (sys.executable, TRAINER, *shlex.split(f"{TRAIN} --steps 2 --out-dir"))]
    for steps in (b"2", b"2", b"3"):
        done = subprocess.run([*command, name, b"--steps", steps], cwd=folder, env=environment(), capture_output=True)
        assert done.returncode == 0, done.stderr
    run = os.path.join(os.fsencode(folder), name)
    assert sorted(os.listdir(run)) == sorted(os.fsencode(file) for file in train_dba.RUN_FILES)
    with open(os.path.join(run, b"command.txt"), encoding="utf-8") as f:
        text = f.read().replace("python3 train_dba.py", "printf '%s\\0'")
    said = subprocess.run(["bash", "-c", text], capture_output=True, check=True).stdout.split(b"\0")[:-1]
    assert said[-3:] == [name, b"--steps", b"3"]
    sampled = subprocess.run([sys.executable, TRAINER, "--mode", "sample", "--max-new-tokens", "2", "--prompt", "a",
                              b"--ckpt", os.path.join(run, b"best.pt")], capture_output=True, env=environment())
    assert sampled.returncode == 0, sampled.stderr


def test_plain_commands_are_written_as_they_are_typed():
    assert [*map(train_dba.shell_quote, ["--lr", "a b", "ü", "it's", "a\nb"])] == [
        "--lr", "'a b'", "'ü'", "'it'\"'\"'s'", "$'a\\x0ab'"]


def git(*args, cwd):
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=n@example.org", *args], cwd=cwd, check=True,
                   capture_output=True)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    def commit(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(TRAINER, folder / "train_dba.py")
        monkeypatch.setattr(train_dba, "__file__", str(folder / "train_dba.py"))
        env = train_dba.provenance(torch.device("cpu"))
        return env["commit"], env["dirty"]

    assert commit(tmp_path / "archive") == (None, None)
    own = tmp_path / "own"
    own.mkdir()
    git("init", "-q", cwd=own)
    assert commit(own / "dba") == (None, None), "a repository without a commit"
    git("commit", "-q", "--allow-empty", "-m", "m", cwd=own)
    assert commit(own / "dba") == (None, None), "unpacked inside somebody else's repository"
    git("add", "dba", cwd=own)
    git("commit", "-q", "-m", "m", cwd=own)
    assert commit(own / "dba") == (None, None), "a part of another repository, whose commit says nothing of ours"
    assert commit(own) == (None, None), "at the top, but not tracked"
    git("add", "train_dba.py", cwd=own)
    git("commit", "-q", "-m", "m", cwd=own)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=own, capture_output=True, text=True).stdout.strip()
    assert commit(own) == (head, False)
    (own / "dba/train_dba.py").write_text("changed")
    monkeypatch.setattr(train_dba, "__file__", str(own / "train_dba.py"))
    assert train_dba.provenance(torch.device("cpu"))["commit"] == head


def test_a_name_that_no_temporary_shares(tmp_path):
    """Two that write one file at a time leave one of the two contents, whole."""
    inside = []

    def outer(temporary):
        temporary.write_text("outer")
        train_dba.write_whole(tmp_path / "file", lambda other: inside.append(other) or other.write_text("inner"))
        assert inside != [temporary] and (tmp_path / "file").read_text() == "inner"

    train_dba.write_whole(tmp_path / "file", outer)
    assert (tmp_path / "file").read_text() == "outer" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_system_that_refuses_says_why(tmp_path, monkeypatch):
    for number, words in ((errno.ENOSPC, "disk full: No space left"), (errno.EROFS, "Read-only"), (errno.EIO, "Input")):
        def refuse(temporary):
            raise OSError(number, os.strerror(number))

        with pytest.raises(UserError, match=words):
            train_dba.write_whole(tmp_path / "file", refuse)


def test_utilisation_is_of_the_device_s_peak(folder, monkeypatch):
    """tokens/s times the model's FLOPs, of 2 TFLOP/s; null in float32, of an unknown device, without estimate.py."""
    import estimate

    def logged(dtype):
        assert_done(call(f"{TRAIN} --overwrite --dtype {dtype} --steps 2 --out-dir used", folder))
        return [line for line in read_log(folder / "used") if line["type"] == "train"]

    assert all(line["mfu"] is None for line in logged("bfloat16")), "the peak of a CPU is unknown"
    monkeypatch.setattr(estimate, "PEAKS", {"cpu": 2e12})
    cfg = train_dba.load_checkpoint(folder / "used").get("config")
    for line in logged("bfloat16"):
        assert line["mfu"] == pytest.approx(line["tok_s"] * estimate.model_flops(cfg, 257) / 2e12) and line["mfu"] > 0
    assert all(line["mfu"] is None for line in logged("float32"))
    monkeypatch.setitem(sys.modules, "estimate", None)
    assert all(line["mfu"] is None for line in logged("bfloat16"))
