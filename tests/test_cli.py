"""Flags: each does something, and what is wrong with them is said in one line before any work."""

import argparse
import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import resource
import subprocess
import sys
import types

import pytest
import torch

import train_dba
from helpers import TINY, TRAIN, TRAINER, assert_done, assert_error, call, cli, environment, make_text, read_log
from train_dba import Config, UserError, count_params, load_checkpoint, make_config

FIELDS = [f.name for f in dataclasses.fields(Config)]


@pytest.fixture(scope="module")
def help_text(tmp_path_factory):
    result = cli("--help", tmp_path_factory.mktemp("help"))
    assert_done(result)
    return result.stdout


@pytest.mark.parametrize("name", FIELDS)
def test_flag_is_in_help_once(help_text, name):
    rows = re.findall(rf"^  --{name.replace('_', '-')}(?=[ ,]).*\n?.*", help_text, re.M)
    assert len(rows) == 1
    assert len(re.sub(r"--[\w-]+|\{.*?\}|[A-Z_]{3,}", "", rows[0]).split()) >= 2, "a flag without a sentence"


@pytest.fixture(scope="module")
def names_read():
    """Settings that the code reads off a Config, apart from the functions that only check, complete or print them."""
    tree = ast.parse(inspect.getsource(train_dba))
    checks = {"problems", "width_problems", "out_of_range", "derived", "describe"}
    nodes = [n for top in tree.body if getattr(top, "name", None) not in checks for n in ast.walk(top)]
    read = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
    gets = [n.args[0] for n in nodes if isinstance(n, ast.Call) and n.args and getattr(n.func, "attr", None) == "get"]
    return ({n.attr for n in read if ast.unparse(n.value) in ("cfg", "self.cfg", "self", "model.cfg")}
            | {n.value for n in gets if isinstance(n, ast.Constant)})


@pytest.mark.parametrize("name", FIELDS)
def test_flag_is_read(names_read, name):
    assert name in names_read


BAD_SYNTAX = ["--no-such-flag 3", "--attn-mod standard", "--attn-mode nope", "--steps 1.5", "--steps", "--lr fast",
              "stray", "--size giant", "--exp paper_nothing", "--tokenizer bpe", "--dtype int8", "--kv-cache q9",
              "--mode eval", "--micro-batch x", "--micro-batch -1", "--micro-batch 0", "--micro-batch 1e3",
              "--micro-batch ''"]
WRONG = {
    "--kv-head 2": "--kv-head",
    "--attn-mode gqa --sem-dim 16": "--sem-dim",
    "--attn-mode gqa --kv-head 1 --kv-lora-rank 16": "--kv-lora-rank",
    "--attn-mode decoupled --kv-lora-rank 16 --rope-dim 4": "--rope-dim",
    "--attn-mode decoupled --kv-lora-rank 16 --tie-qk": "--kv-lora-rank 16",
    "--attn-mode mla --geo-dim 16": "--geo-dim",
    "--kv-lora-rank 8": "--kv-lora-rank",
    "--rope-dim 8": "--rope-dim",
    "--attn-mode mla --tie-qk": "--tie-qk",
    "--attn-mode gqa --kv-head 1 --tie-qk": "--tie-qk",
    "--attn-mode decoupled --kv-head 1 --tie-qk": "--tie-qk",
    "--one-temperature": "--one-temperature",
    "--attn-mode mla --one-temperature": "--one-temperature",
    "--attn-dim 16": "--attn-dim",
    "--attn-mode bottleneck": "--attn-dim",
    "--attn-mode bottleneck --attn-dim 17": "--n-head",
    "--attn-mode bottleneck --attn-dim 1": "--n-head",
    "--attn-mode bottleneck --attn-dim 6": "even",
    "--attn-mode decoupled --sem-dim 15": "--n-head",
    "--attn-mode decoupled --geo-dim 6": "even",
    "--attn-mode decoupled --geo-dim 0": "--geo-dim",
    "--attn-mode mla --rope-dim 5": "even",
    "--attn-mode gqa --kv-head 3 --n-head 4": "--kv-head",
    "--attn-mode gqa --kv-head 4": "--kv-head",
    "--d-model 33": "--n-head",
    "--d-ff 1000000000000000": "no memory",
    "--d-ff 9000000000000000000": "no memory",
    "--d-ff 99999999999999999999": "--d-ff 99999999999999999999 must be below 2**63",
    "--lr 1e400": "--lr inf must be a finite number",
    "--batch-size 100000000 --grad-accum 10000000": "too many to count",
    "--d-model 0": "--d-model",
    "--n-head 0": "--n-head",
    "--attn-mode mla --n-head 0": "--n-head",
    "--n-head -2": "--n-head",
    "--layers 0": "--layers",
    "--block 0": "--block",
    "--min-lr 1": "--min-lr",
    "--init-from ''": "--init-from is empty",
    "--out-dir ''": "--out-dir is empty",
    "--val-data ''": "--val-data is empty",
    "--lr 0": "--lr",
    "--lr nan": "--lr",
    "--lr inf": "--lr",
    "--lr=-1e-3": "--lr",
    "--weight-decay nan": "--weight-decay",
    "--grad-clip -1": "--grad-clip",
    "--norm-eps inf": "--norm-eps",
    "--rope-base 0": "--rope-base",
    "--no-rope --rope-base 500": "--rope-base",
    "--dropout 1": "--dropout",
    "--dropout nan": "--dropout",
    "--val-frac 0": "--val-frac",
    "--val-frac 1": "--val-frac",
    "--val-frac nan": "--val-frac",
    "--val-data text.txt --val-frac 0.2": "--val-frac",
    "--dtype float16": "float16",
    "--batch-size 4 --micro-batch 3": "--micro-batch",
    "--micro-batch auto": "--micro-batch auto asks a CUDA device",
    "--batch-size 0": "--batch-size",
    "--grad-accum 0": "--grad-accum",
    "--steps 0": "--steps",
    "--steps -4": "--steps",
    "--steps 10 --warmup-steps 11": "--warmup-steps",
    "--warmup-steps -1": "--warmup-steps",
    "--eval-every 0": "--eval-every",
    "--eval-iters 0": "--eval-iters",
    "--log-every 0": "--log-every",
    "--save-every 0": "--save-every",
    "--seed -1": "--seed",
    "--seed 18446744073709551616": "--seed",
    "--prompt hello": "--prompt",
    "--prompt-tokens 1,2": "--prompt-tokens",
    "--max-new-tokens 5": "--max-new-tokens",
    "--temperature 0.5": "--temperature",
    "--top-k 3": "--top-k",
    "--top-p 0.5": "--top-p",
    "--kv-cache fp32": "--kv-cache",
    "--ckpt last.pt": "--ckpt",
    "--exp paper_mla --attn-mode standard": "--exp",
    "--exp paper_decoupled --attn-mode gqa": "--exp",
    "--device nonsense": "--device",
    "--device meta": "--device",
    "--device hpu": "--device",
    "--steps 9999999999999999999 --schedule wsd": "--steps",
    "--out-dir text.txt": "text.txt",
    "--out-dir text.txt/run": "text.txt",
}
WRONG_SAMPLING = {
    "": "--ckpt",
    "--ckpt last.pt": "last.pt",
    "--ckpt last.pt --prompt a --prompt-tokens 1": "--prompt",
    "--ckpt last.pt --top-p 0": "--top-p",
    "--ckpt last.pt --top-p 1.5": "--top-p",
    "--ckpt last.pt --top-p nan": "--top-p",
    "--ckpt last.pt --top-k 0": "--top-k",
    "--ckpt last.pt --temperature -1": "--temperature",
    "--ckpt last.pt --temperature nan": "--temperature",
    "--ckpt last.pt --max-new-tokens 0": "--max-new-tokens",
    "--ckpt last.pt --max-new-tokens 99999999999999999999": "--max-new-tokens",
    "--ckpt last.pt --data text.txt": "--data",
    "--ckpt last.pt --stop ''": "--stop is empty",
    "--ckpt last.pt --d-model 32": "--d-model",
    "--ckpt last.pt --steps 5": "--steps",
    "--ckpt last.pt --lr 0.1": "--lr",
    "--ckpt last.pt --out-dir run": "--out-dir",
    "--ckpt last.pt --temperature 0 --top-k 3": "--top-k",
    "--ckpt last.pt --temperature 0 --top-p 0.5": "--top-p",
}


@pytest.fixture
def folder(tmp_path):
    make_text(tmp_path)
    return tmp_path


def assert_nothing_made(folder):
    assert [p.name for p in folder.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("flags", BAD_SYNTAX)
def test_bad_syntax(folder, flags):
    result = call(f"--data text.txt {flags}", folder)
    assert_error(result, flags.split()[0], code=2)
    assert "number_or_auto" not in result.stderr           # which is a function
    assert_nothing_made(folder)


def test_bpe_is_said_to_be_learned_elsewhere(folder):
    result = call("--data text.txt --tokenizer bpe:300", folder)
    assert_error(result, "prepare_fineweb.py --dataset text --tokenizer bpe:N", "--data TOKENS.npy", code=2)
    assert_nothing_made(folder)


@pytest.mark.parametrize("flags, word", WRONG.items())
def test_wrong_flags_of_training(folder, flags, word):
    assert_error(call(f"--data text.txt --tokenizer byte {TINY} --steps 2 {flags}", folder), word)
    assert_nothing_made(folder)


@pytest.mark.parametrize("flags, word", WRONG_SAMPLING.items())
def test_wrong_flags_of_sampling(folder, flags, word):
    assert_error(call(f"--mode sample {flags}", folder), word)
    assert_nothing_made(folder)


def test_wrong_flags_in_a_process_of_their_own(folder):
    assert_error(cli("--data text.txt --attn-mod standard", folder), "--attn-mod", code=2)
    assert_error(cli("", folder), "--data")
    assert_nothing_made(folder)


def test_all_mistakes_are_said_at_once(folder):
    said = call(f"--data text.txt {TINY} --val-data x --val-frac 0.5 --kv-head 2 --min-lr 1", folder)
    assert_error(said, "--val-frac", "--kv-head", "--min-lr")
    assert_error(call(f"--data text.txt {TINY} --save-every 0 --layers -1", folder), "--save-every", "--layers")


def test_flags_of_another_mode_may_be_switched_off(folder):
    make_config(data="text.txt", one_temperature=False, tie_qk=False)
    with pytest.raises(UserError):
        make_config(data="text.txt", one_temperature=True)


@pytest.mark.parametrize("size", train_dba.SIZES)
def test_size_fills_in_only_what_is_not_said(size):
    preset = train_dba.SIZES[size]
    plain, cfg = Config(), make_config(data="x", size=size)
    assert {name: getattr(cfg, name) for name in preset} == preset
    changed = {"attn_dim", "embed_dim", "schedule", "min_lr", "warmup_steps", "out_dir", "data", "size"} | preset.keys()
    assert all(getattr(cfg, name) == getattr(plain, name) for name in FIELDS if name not in changed)
    said = make_config(data="x", size=size, layers=3, block=77)
    assert (said.layers, said.block) == (3, 77)
    assert said.d_model == preset["d_model"]


def test_exp_fills_in_only_what_is_not_said():
    cfg = make_config(data="x", exp="paper_decoupled")
    assert (cfg.attn_mode, cfg.sem_dim, cfg.geo_dim, cfg.attn_dim) == ("decoupled", 512, 1024, 1536)
    assert (cfg.d_model, cfg.layers, cfg.n_head, cfg.d_ff, cfg.block) == (2048, 22, 32, 5632, 2048)
    assert (cfg.steps, cfg.lr, cfg.out_dir) == (10_000, 2e-4, "runs/paper_decoupled_seed1337")
    cfg = make_config(data="x", exp="paper_decoupled", size="tiny", lr=1e-3, steps=5000, seed=7)
    assert (cfg.n_head, cfg.sem_dim, cfg.geo_dim, cfg.d_model) == (4, 64, 128, 128)
    assert (cfg.lr, cfg.min_lr, cfg.steps, cfg.out_dir) == (1e-3, 1e-3, 5000, "runs/paper_decoupled_seed7")
    assert make_config(data="x", exp="paper_bottleneck").attn_dim == 48 * 32
    assert make_config(data="x", exp="paper_decoupled_sem8").sem_dim == 256
    assert make_config(data="x", exp="paper_gqa").kv_head == 4
    mla = make_config(data="x", exp="paper_mla")
    assert (mla.kv_lora_rank, mla.rope_dim) == (512, 64)


def test_a_preset_works_with_fewer_steps():
    cfg = make_config(data="x", exp="paper_baseline", size="tiny", steps=200)
    assert cfg.steps == 200 and cfg.warmup_steps <= 200


@pytest.mark.parametrize("exp", train_dba.EXPS)
def test_paper_presets_have_50304_rows(exp):
    cfg = make_config(data="x", exp=exp)
    assert count_params(cfg, 50257)["embedding"] == 50304 * 2048
    with torch.device("meta"):
        model = train_dba.GPT(cfg, 50257)
    assert model.embed.weight.shape == (50304, 2048)
    assert count_params(cfg, 50257)["total"] == sum(p.numel() for p in model.parameters())


def test_paper_baseline_has_1_2_billion_parameters():
    d, L, ff, rows = 2048, 22, 5632, 50304
    expected = rows * d + L * (4 * d * d + 3 * d * ff + 2 * d) + d
    assert count_params(make_config(data="x", exp="paper_baseline"), 50257)["total"] == expected
    assert 1.15e9 < expected < 1.25e9


DERIVED = {
    "": dict(attn_mode="standard", attn_dim=32, embed_dim=32, min_lr=3e-4, kv_head=None, sem_dim=None, dtype="float32"),
    "--attn-mode decoupled": dict(sem_dim=32, geo_dim=64, attn_dim=96),
    "--attn-mode decoupled --sem-dim 4 --geo-dim 8": dict(sem_dim=4, geo_dim=8, attn_dim=12),
    "--attn-mode gqa --kv-head 2": dict(attn_dim=32, kv_head=2),
    "--attn-mode gqa --attn-dim 16 --kv-head 1": dict(attn_dim=16, kv_head=1),
    "--attn-mode mla": dict(attn_dim=32, kv_lora_rank=8, rope_dim=8),
    "--lr 1e-2 --min-lr 1e-3": dict(lr=1e-2, min_lr=1e-3, warmup_steps=0),
}


@pytest.mark.parametrize("flags, expected", DERIVED.items())
def test_resolved_config_is_what_was_resolved(folder, flags, expected):
    assert_done(call(f"--data text.txt --tokenizer byte {TINY} --steps 2 --out-dir run {flags}", folder))
    resolved = json.loads((folder / "run/resolved_config.json").read_text())
    assert list(resolved) == FIELDS
    assert {name: resolved[name] for name in expected} == expected
    assert resolved == read_log(folder / "run")[0]["config"] == dataclasses.asdict(
        train_dba.load_checkpoint(folder / "run/last.pt")["config"])


def test_warm_up_defaults_to_a_tenth_and_at_most_100_steps():
    assert make_config(data="x", steps=50).warmup_steps == 5
    assert make_config(data="x", steps=6000).warmup_steps == 100


def test_run_folder_and_the_command(folder):
    result = cli(f"--data {folder}/text.txt --out-dir={folder}/run --tokenizer byte {TINY} --steps 2", folder)
    assert_done(result)
    assert {p.name for p in (folder / "run").iterdir()} == {
        "command.txt", "resolved_config.json", "env.json", "train.jsonl", "last.pt", "best.pt"}
    texts = {p.name: p.read_text() for p in (folder / "run").iterdir() if p.suffix in (".txt", ".json", ".jsonl")}
    assert all(str(folder) not in text for text in texts.values())
    assert "--data text.txt" in texts["command.txt"] and "--out-dir=run" in texts["command.txt"]
    env = json.loads(texts["env.json"])
    assert env["torch"] == torch.__version__ and env["threads"] >= 1 and env["ranks"] == 1
    log = read_log(folder / "run")
    assert [line["type"] for line in log] == ["meta", "train", "train", "eval", "done"]
    assert all(list(line)[0] == "type" for line in log)


def test_context_length_is_neither_clamped_nor_ignored(folder, monkeypatch):
    text, forward, shapes = (folder / "text.txt").read_bytes(), train_dba.GPT.forward, set()

    def noted(model, idx, *args):
        shapes.add(tuple(idx.shape))
        return forward(model, idx, *args)

    monkeypatch.setattr(train_dba.GPT, "forward", noted)
    for block in (16, 37, 300):
        assert_done(call(f"{TRAIN} --block {block} --steps 1 --grad-accum 2 --out-dir run{block}", folder))
        assert shapes == {(4, block)}
        shapes.clear()
        log = read_log(folder / f"run{block}")
        assert log[0]["config"]["block"] == block
        assert log[1]["tokens"] == 4 * 2 * block
        assert log[2]["val_tokens"] == round((len(text) + 1) * 0.1) - 1


@pytest.mark.parametrize("flag, meant", [("--d-modl", "--d-model"), ("--kv-cahce=fp16", "--kv-cache"),
                                         ("--no-ropes", "--no-rope"), ("--overwrte", "--overwrite")])
def test_an_unknown_flag_suggests_the_nearest(folder, flag, meant):
    assert_error(call(f"--data text.txt {flag} 3", folder), flag, f"did you mean {meant}?", code=2)


def test_nothing_is_suggested_where_nothing_is_near(folder):
    for flags in ("--zzzzzzzz", "stray"):
        assert "did you mean" not in call(f"--data text.txt {flags}", folder).stderr


@pytest.mark.parametrize("nll, has", [(0.0, True), (709.0, True), (709.9, False), (1e9, False)])
def test_a_loss_above_709_has_no_perplexity(nll, has):
    assert (train_dba.perplexity(nll) is not None) == has


# --- Settings from elsewhere

def test_widths_follow_the_size():
    for size, heads in (("tiny", 4), ("small", 8), ("1b", 32)):
        cfg = make_config(data="x", size=size, attn_mode="decoupled")
        assert (cfg.sem_dim, cfg.geo_dim, cfg.attn_dim) == (4 * heads, 8 * heads, 12 * heads)
    assert make_config(data="x", size="1b", attn_mode="decoupled", sem_dim=32).geo_dim == 256
    assert make_config(data="x", d_model=1024, attn_mode="decoupled").sem_dim == 32


def test_few_channels_get_a_warning(tmp_path):
    make_text(tmp_path)
    flags = f"{TRAIN} --steps 1 --attn-mode decoupled --n-head 2"
    assert "channels per head: sem 3" in call(f"{flags} --sem-dim 6 --geo-dim 8 --out-dir a", tmp_path).stderr
    assert "channels" not in call(f"{flags} --sem-dim 8 --geo-dim 8 --out-dir b", tmp_path).stderr


def test_settings_of_another_run(tmp_path):
    """All that was asked of that run holds, but for where it lay; what only followed follows anew."""
    make_text(tmp_path)
    asked = "--attn-mode decoupled --sem-dim 8 --geo-dim 16 --null-attn --schedule wsd --lr 0.01 --steps 20 --seed 5"
    assert call(f"{TRAIN} {asked} --out-dir a", tmp_path).code == 0
    again = call("--config a/resolved_config.json --steps 30 --out-dir b", tmp_path)
    assert again.code == 0
    first, second = (json.loads((tmp_path / run / "resolved_config.json").read_text()) for run in "ab")
    differ = {name for name in first if first[name] != second[name]}
    assert differ == {"config", "out_dir", "device", "steps"}                   # its warm-up was said
    assert_error(call("--config text.txt --out-dir c", tmp_path), "--config text.txt is no resolved_config.json")
    assert_error(call("--config none.json --out-dir c", tmp_path), "--config none.json is no resolved_config.json")
    for text, word in (('{"n_head": 0, "attn_mode": "mla", "rope_dim": 4}', "--n-head 0 must be at least 1"),
                       ('{"nothing": 1}', "is no resolved_config.json")):
        (tmp_path / "bad.json").write_text(text)
        assert_error(call("--config bad.json --out-dir c", tmp_path), word)
    settings = "--config a/resolved_config.json"
    assert call(f"{settings} --attn-mode gqa --kv-head 1 --steps 2 --warmup-steps 1 --out-dir d", tmp_path).code == 0
    other = json.loads((tmp_path / "d/resolved_config.json").read_text())       # the widths were of another mode
    assert (other["sem_dim"], other["attn_dim"]) == (None, other["d_model"]) and other["null_attn"]
    assert_error(call(f"{settings} --size tiny --out-dir c", tmp_path), "--config and --size exclude each other")
    assert_error(call(f"{settings} --mode sample --ckpt a", tmp_path), "--config does nothing with --mode sample")
    (tmp_path / "part.json").write_text('{"data": "text.txt", "lr": 1e-3}')     # says nothing of a schedule
    assert make_config(**train_dba.settings_of(tmp_path / "part.json")).schedule == "constant"
    assert not (tmp_path / "c").exists()


def test_weights_that_are_kept(tmp_path):
    make_text(tmp_path)
    kept = ["step0000002.pt", "step0000004.pt"]
    assert call(f"{TRAIN} --steps 5 --keep-every 2 --out-dir a", tmp_path).code == 0
    assert sorted(path.name for path in (tmp_path / "a").glob("step*")) == kept
    assert load_checkpoint(tmp_path / "a" / kept[0])["step"] == 2
    (tmp_path / "a/step_notes.pt").write_text("mine")
    for name in ("last.pt", "best.pt", "train.jsonl"):
        (tmp_path / "a" / name).unlink()
    assert_error(call(f"{TRAIN} --steps 1 --out-dir a", tmp_path), f"a holds {kept[0]} of a run whose log is gone")
    assert sorted(path.name for path in (tmp_path / "a").glob("step0*")) == kept
    assert call(f"{TRAIN} --steps 1 --out-dir a --overwrite", tmp_path).code == 0
    assert [path.name for path in (tmp_path / "a").glob("step*")] == ["step_notes.pt"]


def test_tensorboard_without_room_is_said_in_a_line(tmp_path):
    """Its thread would print a traceback of its own; a folder that can't be made would be one, too."""
    pytest.importorskip("tensorboard", reason="no tensorboard: pip install tensorboard")
    make_text(tmp_path)
    asked = f"{TRAIN} --d-model 8 --d-ff 8 --steps 600 --eval-every 600 --save-every 600 --tensorboard"
    assert_error(cli(f"{asked} --out-dir text.txt/run", tmp_path), "can't make the run folder text.txt/run")

    def limit():                                           # above the checkpoint of step 0, below 600 steps' events
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    result = cli(f"{asked} --out-dir run", tmp_path, preexec_fn=limit)
    assert_error(result, "can't write run/events", "disk full")
    assert_done(call(f"{asked} --no-tensorboard --out-dir run", tmp_path))


def test_a_step_without_memory_is_said_in_a_line(tmp_path, monkeypatch):
    make_text(tmp_path)
    asked = f"{TRAIN} --steps 2 --out-dir run"
    assert_error(call(f"{asked} --batch-size 500000000000000", tmp_path), "no memory", "--batch-size")

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(train_dba, "sample_batch", full)
    assert_error(call(f"{asked} --overwrite", tmp_path), "no memory", "Tried to allocate 2 GiB")
    monkeypatch.undo()
    assert_done(call(asked, tmp_path))                     # from what was saved at step 0


def test_a_folder_of_texts(tmp_path):
    make_text(tmp_path)
    assert_error(call("--data . --out-dir a", tmp_path), ". is a folder", "prepare_fineweb.py --dataset text --input .")
    (tmp_path / "my texts").mkdir()
    assert_error(call("--data 'my texts'", tmp_path), "--input 'my texts' ")


def test_tensorboard(tmp_path, monkeypatch):
    """Every number of the log arrives, under its line's type; without the package it's one line, before any work."""
    make_text(tmp_path)
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append(purge_step)

        def add_scalar(self, *scalar):
            written.append(scalar)

        def flush(self):
            pass

    module = types.ModuleType("torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert_error(call(f"{TRAIN} --steps 2 --tensorboard --out-dir b", tmp_path), "pip install tensorboard")
    module.SummaryWriter = SummaryWriter
    assert call(f"{TRAIN} --steps 2 --tensorboard --out-dir a", tmp_path).code == 0
    expected = [1]
    for line in read_log(tmp_path / "a")[1:]:
        for name, value in line.items():
            if name not in ("type", "step", "tokens") and value is not None:
                expected.append((f"{line['type']}/{name}", value, line["step"]))
    assert written == expected and len(expected) > 10
    module.SummaryWriter = lambda folder, purge_step: "\udcff".encode()         # its paths are text
    assert_error(call(f"{TRAIN} --steps 2 --tensorboard --out-dir c", tmp_path), "can't write c (UnicodeEncodeError")


@pytest.mark.parametrize("script", sorted(path.stem for path in TRAINER.parent.glob("*.py") if path.stem != "estimate"))
def test_every_script_ends_in_words(script, tmp_path, monkeypatch):
    main = importlib.import_module(script).main

    def ended_by(error):
        def fail(*args, **kwargs):
            raise error
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", fail)
        return call("", tmp_path, main)

    assert_error(ended_by(UserError("wrong")), "error: wrong")
    assert_error(ended_by(MemoryError("3 GiB")), "no memory (MemoryError: 3 GiB); ")
    assert_error(ended_by(RuntimeError("can't allocate memory")), "no memory")
    assert_error(ended_by(PermissionError(13, "Permission denied", "locked/x")), "error: locked/x: Permission denied")
    assert ended_by(KeyboardInterrupt()) == (130, "", "")
    with pytest.raises(RuntimeError, match="a bug"):       # which must not look like a user's mistake
        ended_by(RuntimeError("a bug"))


@pytest.mark.parametrize("script", sorted(path.stem for path in TRAINER.parent.glob("*.py") if path.stem != "estimate"))
def test_every_script_says_a_wrong_flag_in_a_line(script, tmp_path):
    result = call("--bogus", tmp_path, importlib.import_module(script).main)
    assert_error(result, code=2)
    assert result.stderr.count("\n") == 1


def test_nobody_reads_what_is_printed():
    """As in `| head`: no traceback, neither at once nor when Python flushes at its end."""
    program = ("import sys, train_dba\n@train_dba.exit_code()\ndef main(argv):\n    print('text', flush=True)\n"
               "sys.exit(main())")
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, cwd=TRAINER.parent,
                            env=environment())
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


def test_no_space_for_what_is_printed():
    """Neither where it is printed, nor where Python would write it at its end; and no standard error at all."""
    program = ("import sys, train_dba\n@train_dba.exit_code()\ndef main(argv):\n    print('text', flush={})\n"
               "    print('said', file=sys.stderr)\nsys.exit(main())")
    for flush in (True, False):
        with open("/dev/full", "w") as full:
            result = subprocess.run([sys.executable, "-c", program.format(flush)], stdout=full, stderr=subprocess.PIPE,
                                    cwd=TRAINER.parent, env=environment(), text=True)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert result.stderr.endswith("error: can't write what is printed (disk full: No space left on device)\n")
    command = f"{sys.executable} -c \"$0\" 2>&-"
    result = subprocess.run(["bash", "-c", command, program.format(True)], capture_output=True, cwd=TRAINER.parent,
                            env=environment(), text=True)
    assert (result.returncode, result.stdout) == (0, "text\n")
