"""A bar on a terminal, plain lines elsewhere, and what a signal is answered with."""

import io
import signal

import pytest

import train_dba
from helpers import TRAIN, assert_done, assert_error, call, make_text, read_log


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream, monkeypatch, steps=3, **how):
    monkeypatch.setattr(train_dba.sys, "stderr", stream)
    monkeypatch.setattr(train_dba, "LINE_SECONDS", 0)
    bar = train_dba.progress(3_000_000, "tok", "training", **how)
    for step in range(steps):
        bar.set_postfix_str(f"step {step + 1}", refresh=False)
        bar.update(1_000_000)
    bar.close()
    return stream.getvalue()


def test_plain_lines_where_nobody_watches(monkeypatch):
    lines = shown(io.StringIO(), monkeypatch).splitlines()
    assert all(line.startswith("training: ") and "\r" not in line and line == line.strip() for line in lines)
    for step, percent in enumerate((33, 67, 100), 1):
        line = next(line for line in lines if f"step {step}" in line)
        assert f"{percent} %, {step}.00M of 3.00M tok, " in line and " left" in line and "tok/s" in line


def test_a_bar_on_a_terminal(monkeypatch):
    text = shown(Terminal(), monkeypatch, mininterval=0)
    assert "\rtraining:  67%|" in text and "2.00M/3.00M" in text


def test_no_line_before_its_time(monkeypatch):
    monkeypatch.setattr(train_dba.sys, "stderr", io.StringIO())
    bar = train_dba.progress(10, "batch", "evaluating")
    bar.update(3)
    bar.close()
    assert train_dba.sys.stderr.getvalue() == ""


def test_evaluation_has_a_bar(tmp_path, monkeypatch):
    make_text(tmp_path)
    monkeypatch.setattr(train_dba, "LINE_SECONDS", 0)
    result = call(f"{TRAIN} --steps 1 --eval-iters 5 --out-dir run", tmp_path)
    assert_done(result)
    assert "evaluating: 60 %, 3 of 5 batch" in result.stderr and "training: 100 %" in result.stderr


@pytest.mark.parametrize("name, said", [
    ("step_gradients", "finishing step 2, then saving"),
    ("evaluate", "finishing the evaluation after step 2, then saving"),
])
def test_a_signal_is_answered_at_once(tmp_path, monkeypatch, capfd, name, said):
    """Before what it interrupts goes on; and no further step is begun."""
    make_text(tmp_path)
    work, calls, heard = getattr(train_dba, name), [], []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            capfd.readouterr()
            signal.raise_signal(signal.SIGTERM)
            heard.append(capfd.readouterr().err)
        return work(*args)

    monkeypatch.setattr(train_dba, name, interrupted)
    result = call(f"{TRAIN} --steps 9 --eval-every 1 --eval-iters 1 --out-dir run", tmp_path)
    assert result.code == 143 and "stopped at step 2, saved" in result.stderr
    assert [text.strip() for text in heard] == [said]
    assert read_log(tmp_path / "run")[-1] == {**read_log(tmp_path / "run")[-1], "type": "eval", "step": 2}
    assert train_dba.load_checkpoint(tmp_path / "run/last.pt")["step"] == 2


def test_compile_says_that_it_compiles(tmp_path, monkeypatch):
    make_text(tmp_path)
    monkeypatch.setattr(train_dba, "compile_model", lambda model, device: model)
    result = call(f"{TRAIN} --steps 1 --eval-iters 1 --compile --out-dir run", tmp_path)
    assert_done(result)
    assert "compiling: the first step" in result.stderr


def test_compile_without_a_compiler_is_refused_before_the_run_folder_is_made(tmp_path, monkeypatch):
    make_text(tmp_path)
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert_error(call(f"{TRAIN} --steps 1 --compile --out-dir run", tmp_path), "--compile", "/nonexistent/g++")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
