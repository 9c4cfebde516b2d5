"""What the tests of eval_dba.py share: a checkpoint of a tiny model that was never trained, and the command line."""

import eval_dba
import train_dba as dba
from helpers import call
from reference import config, randomize, settings


def write_checkpoint(folder, mode="decoupled", tokenizer=None, **flags):
    """folder/best.pt with weights that give scores of order 1; returns the model."""
    tokenizer = tokenizer or dba.ByteTokenizer()
    model = randomize(dba.GPT(config(settings(mode, **flags)), tokenizer.vocab_size)).eval()
    folder.mkdir(parents=True, exist_ok=True)
    dba.save_checkpoint(folder / "best.pt", model.cfg, tokenizer, model, step=0)
    return model


def evaluate(args, cwd):
    return call(args, cwd, eval_dba.main)
