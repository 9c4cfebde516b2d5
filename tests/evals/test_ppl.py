"""eval_dba.py ppl: every token once, the loss of the model, one file for each cache."""

import json
import math

import pytest
import torch
from helpers import assert_done, assert_error
from trained import BLOCK, EVALUATE, MODES, evaluate, plain_nll, result_of, validation

from evals import ppl
from train_dba import load_checkpoint, load_model


@pytest.mark.parametrize("block, stride", ((2, 1), (2, 2), (5, 1), (5, 3), (5, 5), (16, 1), (16, 7), (16, 16)))
@pytest.mark.parametrize("count", (2, 3, 16, 17, 18, 33, 50))
def test_windows_score_each_token_once_and_with_enough_context(count, block, stride):
    seen = []
    for start, ids, first in ppl.windows(torch.arange(count), block, stride):
        assert ids.tolist() == list(range(start, start + len(ids))) and len(ids) <= block + 1
        assert start == 0 or first >= block - stride
        seen += ids[first:].tolist()
    assert seen == list(range(1, count))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", (BLOCK, 50))
def test_ppl_is_that_of_the_model_without_a_cache(runs, tmp_path, mode, stride):
    found = result_of(f"ppl {EVALUATE} {mode} --kv-cache fp32 --stride {stride} --out {tmp_path}/ppl.json", runs,
                      tmp_path / "ppl.json")
    model, ids = load_model(load_checkpoint(runs / mode / "best.pt")), validation(runs)
    total, done = 0.0, 1
    while done < len(ids):                                 # tokens from `done` on, in windows that begin at strides
        start = 0 if done == 1 else -(-(done - BLOCK) // stride) * stride
        window = ids[start:start + BLOCK + 1]
        total += plain_nll(model, window)[done - start - 1:].sum().item()
        done = start + len(window)
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), abs=1e-5)
    assert found["ppl"] == pytest.approx(math.exp(found["loss"]))
    assert found["bpb"] == pytest.approx(total / math.log(2) / (len(ids) - 1), rel=1e-2)


def test_several_caches_are_as_many_files_in_one_folder(runs, tmp_path):
    command = f"ppl {EVALUATE} decoupled --kv-cache fp16 hetero q4_0 --max-tokens 200"
    assert_done(evaluate(f"{command} --out {tmp_path}/new.folder", runs))
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "new.folder").iterdir()}
    assert found.keys() == {"eval_ppl_fp16.json", "eval_ppl_hetero.json", "eval_ppl_q4_0.json"}
    for cache in ("fp16", "hetero", "q4_0"):
        alone = result_of(f"{command} --kv-cache {cache} --out {tmp_path}/one.json", runs,
                          tmp_path / "one.json")
        assert alone["loss"] == found[f"eval_ppl_{cache}.json"]["loss"]
    assert_error(evaluate(f"{command} --out {tmp_path}/new.json", runs), "--out")
    (tmp_path / "file").write_text("")
    assert_error(evaluate(f"{command} --out {tmp_path}/file/out", runs), "--out")
