"""What the tests of eval_dba.py share: a checkpoint of a tiny model that was never trained, and the command line."""

import contextlib
import io
import os
import shlex
from pathlib import Path

import eval_dba
import train_dba as dba
from helpers import Result
from reference import config, randomize, settings


def write_checkpoint(folder, mode="decoupled", tokenizer=None, **flags):
    """folder/best.pt with weights that give scores of order 1; returns the model."""
    tokenizer = tokenizer or dba.ByteTokenizer()
    model = randomize(dba.GPT(config(settings(mode, **flags)), tokenizer.vocab_size)).eval()
    folder.mkdir(parents=True, exist_ok=True)
    dba.save_checkpoint(folder / "best.pt", model.cfg, tokenizer, model, step=0)
    return model


def evaluate(args, cwd):
    """eval_dba.py in this process; an exception that would be a traceback is raised."""
    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = eval_dba.main(shlex.split(args))
    finally:
        os.chdir(before)
    return Result(code, out.getvalue(), err.getvalue())
