"""Attention maps: they are what the attention modules compute, and the command draws them."""

import json
import math
import shlex

import pytest
import torch

import train_dba
import vis_heatmap
from helpers import assert_done, assert_error, call
from reference import MODES, close, config, null_and_tie, randomize, settings
from train_dba import GPT, ByteTokenizer, UserError, WordTokenizer
from vis_heatmap import find_anchor, merge_labels, read_maps, readable


def heatmap(*argv):
    return call(shlex.join(map(str, argv)), ".", vis_heatmap.main)


def merged_outputs(model, ids):
    """What each attention module gives to W_o, [T, H·v]."""
    seen = []
    hooks = [block.attn.o.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])) for block in model.blocks]
    with torch.no_grad():
        model.hidden(ids)
    for hook in hooks:
        hook.remove()
    return seen


def make_model(mode, **flags):
    return randomize(GPT(config(settings(mode, **flags)), 257)).eval()


@pytest.mark.parametrize("mode, null, tie", null_and_tie())
@pytest.mark.parametrize("flags", [{}, {"learned_temp": True}], ids=("", "learned_temp"))
def test_maps_times_values_are_the_modules_output(mode, null, tie, flags):
    model = make_model(mode, null_attn=null, tie_qk=tie, **flags)
    ids = torch.randint(257, (1, 37), generator=torch.Generator().manual_seed(1))
    maps = read_maps(model, ids)
    assert len(maps) == model.cfg.layers
    for m, expected in zip(maps, merged_outputs(model, ids)):
        assert m.null == null and m.probs.shape == (model.cfg.n_head, 37, null + 37)
        assert list(m.scores) == (["sem", "geo"] if mode.startswith(("decoupled", "mla")) else ["geo"])
        close((m.probs @ m.values).transpose(0, 1).flatten(1), expected, 1e-5, f"{mode}")
        assert (m.probs.sum(-1) - 1).abs().max() < 1e-5
        assert not m.probs[..., null:].triu(1).any()
        total = sum(m.scores.values()) if not null else torch.cat([m.null_score[..., None], sum(m.scores.values())], -1)
        seen = m.probs > 1e-6
        offset = total - m.probs.log()                     # log of the sum of exponentials: one number per row
        spread = offset.where(seen, -torch.inf).amax(-1) - offset.where(seen, torch.inf).amin(-1)
        assert spread.max() < 1e-3


def test_entropy_null_mass_and_regions():
    probs = torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0]], [[0.5, 0.5, 0], [0.2, 0.3, 0.5]]])        # [H, T, 1 + T]
    m = vis_heatmap.Maps({}, torch.zeros(2, 2), probs, None)
    log = math.log
    expected = [[0, log(2)], [log(2), -0.2 * log(0.2) - 0.3 * log(0.3) - 0.5 * log(0.5)]]
    assert torch.allclose(m.entropy(), torch.tensor(expected))
    assert m.null_mass().tolist() == probs[..., 0].tolist()
    masses = m.masses(query=1, anchor=1)
    assert torch.allclose(torch.stack([masses[r] for r in ("exemplar", "target", "null")]),
                          torch.tensor([[0.5, 0.3], [0, 0.5], [0.5, 0.2]]))


def test_uniform_attention_has_the_largest_entropy():
    model = make_model("standard")
    with torch.no_grad():
        model.blocks[0].attn.q["geo"].weight.zero_()
    m = read_maps(model, torch.arange(20)[None])[0]
    assert torch.allclose(m.entropy(), torch.arange(1.0, 21).log().expand(4, -1), atol=1e-5)


def test_reading_leaves_the_model_as_it_was():
    model, ids = make_model("decoupled", null_attn=True), torch.arange(12)[None]
    with torch.no_grad():
        before = model.hidden(ids)
        read_maps(model, ids)
        assert torch.equal(model.hidden(ids), before)
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


def test_labels():
    assert readable(b"a b\n\t") == "a␣b\\n\\t" and readable("é".encode()) == "é" and readable(b"\xc3") == "\\xc3"
    pieces = [bytes([b]) for b in "to be or nöt to be, that\nis the $question$".encode()]
    assert merge_labels(pieces, 99)[0] == (0, 1, "t") and len(merge_labels(pieces, 100)) == len(pieces) - 1
    for most in (1, 3, 5, 12, 40):
        labels = merge_labels(pieces, most, longest=100)
        assert len(labels) <= most
        assert "".join(text for *_, text in labels) == readable(b"".join(pieces))
        assert [a for a, *_ in labels[1:]] == [b for _, b, _ in labels[:-1]]


def test_find_anchor():
    pieces = [b"Red", b" Gr", b"een", b" A", b"7", b" Red"]
    assert find_anchor(pieces, "A7") == 3 and find_anchor(pieces, "een A") == 2 and find_anchor(pieces, "Red") == 5
    for absent in ("B4", ""):
        with pytest.raises(UserError, match="anchor"):
            find_anchor(pieces, absent)


@pytest.fixture
def run(tmp_path):
    def save(name, mode, tokenizer=None, **flags):
        tokenizer, folder = tokenizer or ByteTokenizer(), tmp_path / name
        folder.mkdir()
        cfg = config(settings(mode, **flags))
        model = randomize(GPT(cfg, tokenizer.vocab_size))
        train_dba.save_checkpoint(folder / "best.pt", cfg, tokenizer, model, step=7)
        return folder
    return save


def test_two_checkpoints_side_by_side(run, tmp_path):
    a, b = run("a", "standard", layers=1), run("b", "decoupled_gqa", null_attn=True, tokenizer=WordTokenizer.build(
        "red $1 one A7 B4 Output:".split()))
    prompt, out = tmp_path / "prompt.txt", tmp_path / "out"
    prompt.write_text("red $1 one\nA7 B4 Output:")
    assert_done(heatmap("--ckpt", a, "--compare", b / "best.pt", "--prompt-file", prompt, "--anchor", "A7",
                        "--out", out, "--heads", 0, 3))
    names = {"layer_0.png", "layer_1.png", "summary.png", "query.png", "depth.png", "heatmap.json"}
    assert {p.name for p in out.iterdir()} == names
    first, second = json.loads((out / "heatmap.json").read_text())["models"]
    assert first["labels"][:4] == ["r", "e", "d", "␣"] and second["labels"][:4] == ["red␣", "$1␣", "one␣", "\\n"]
    assert (first["anchor_token"], second["anchor_token"]) == (11, 4) and second["query"] == 6
    assert first["layers"][0]["null_mass"] is None and "null" not in first["layers"][0]["mass"]
    assert len(second["layers"]) == 2
    for layer in second["layers"]:
        assert len(layer["entropy"]) == 4 and len(layer["entropy"][0]) == len(layer["null_mass"][0]) == 7
        assert sum(layer["mean_mass"].values()) == pytest.approx(1, abs=1e-5)
        assert set(layer["score_std"]) == {"sem", "geo"}


def test_one_token_and_mla(run, tmp_path):
    assert_done(heatmap("--ckpt", run("a", "mla", null_attn=True), "--prompt", "x", "--out", tmp_path / "out",
                        "--layers", 0, "--heads", 1))
    assert not (tmp_path / "out/depth.png").exists()


@pytest.mark.parametrize("argv, word", [
    (("--prompt", "some text", "--anchor", "absent"), "absent"),
    (("--prompt", "some text", "--anchor", ""), "--anchor"),
    (("--prompt", "some text", "--anchor", "text", "--query", 2), "--query 2"), (("--prompt", ""), "0 tokens"),
    (("--prompt", "x" * 1025), "1,025"), (("--prompt", "x", "--query", 1), "--query 1"), ((), "--prompt"),
    (("--prompt", "x", "--prompt-file", "y"), "--prompt"), (("--prompt-file", "nowhere"), "nowhere"),
    (("--prompt", "x", "--layers", 2), "--layers 2"), (("--prompt", "x", "--heads", -1), "--heads -1"),
    (("--prompt", "x", "--compare", "nowhere"), "nowhere"),
])
def test_bad_input_is_one_line(run, tmp_path, argv, word):
    result = heatmap("--ckpt", run("a", "decoupled"), *argv, "--out", tmp_path / "out")
    assert_error(result, word)
    assert not (tmp_path / "out").exists()


def test_every_mode_is_known():
    assert {settings(mode)["attn_mode"] for mode in MODES} == {"standard", "bottleneck", "decoupled", "gqa", "mla"}
