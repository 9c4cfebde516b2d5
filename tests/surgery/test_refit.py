"""Output projections fitted to a converted model's own stream."""

import json
from pathlib import Path

import pytest
import torch
from teachers import FLAGS, dba_command, ids_of, kl

import convert_dba
import train_dba as dba
from helpers import assert_done, call
from reference import close
from surgery import command
from surgery.calibrate import SINK, calibrate
from surgery.convert import Layer, convert
from surgery.refit import RIDGE, refit_outputs
from surgery.targets import TARGETS

ROOT = Path(dba.__file__).parent
SEEN = ids_of(7, length=37, seed=11)


def read_by(model, ids):
    """Float64 per layer, as hooks see them in a forward pass: the stream before attention [N, T, D], what attention
    adds, and what W_o multiplies [N, T, H·v]."""
    layers, hooks = [dict() for _ in model.blocks], []
    for block, seen in zip(model.blocks, layers):
        hooks += [block.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(stream=args[0].double())),
                  block.attn.register_forward_hook(lambda m, args, y, seen=seen: seen.update(added=y.double())),
                  block.attn.o.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(z=args[0].double()))]
    model(ids)
    for hook in hooks:
        hook.remove()
    return layers


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_each_layer_is_the_least_squares_of_its_own_stream(taught, target):
    model, layers = taught
    share = 0.5 if target != "gqa" or model.cfg.attention.v_groups % 2 == 0 else 0.34
    make = lambda: TARGETS[target](model, layers, share, lambda done, total: None)[0]               # noqa: E731
    before, after = make(), make()
    refit_outputs(model, after, SEEN)
    for theirs, ours, was, now in zip(read_by(model, SEEN), read_by(after, SEEN), before.blocks, after.blocks):
        old, new = (block.attn.o.weight.double() for block in (was, now))
        z = ours["z"][:, SINK:].flatten(0, 1)
        aim = (theirs["stream"] + theirs["added"] - ours["stream"])[:, SINK:].flatten(0, 1)
        ridge = (RIDGE * z.square().sum(0).mean()).sqrt()
        rows = torch.cat([z, ridge * torch.eye(z.size(1))])
        close(new - old, torch.linalg.lstsq(rows, torch.cat([aim - z @ old.T, 0 * old.T])).solution.T, 1e-3)


def test_a_trained_model_is_met_better_on_held_out_text():
    """Not a random one, of whose errors little can be told from what is left."""
    model = dba.load_model(dba.load_checkpoint(ROOT / "pretrained/standard")).eval().requires_grad_(False)
    text = torch.tensor(list((ROOT / "README.md").read_bytes()))
    windows = text[:80 * 128].view(80, 128)
    layers = [Layer.of(block.attn, each) for block, each in zip(model.blocks, calibrate(model, windows[:6], 6))]
    plain, fitted = convert(model, layers, 2, 32), convert(model, layers, 2, 32)
    refit_outputs(model, fitted, windows[:32])
    far, near = (kl(model, student, windows[64:]) for student in (plain, fitted))
    assert near < 0.95 * far


def test_what_is_exact_stays_so_and_nothing_else_changes(taught):
    model, layers = taught
    shape, ids = model.cfg.attention, ids_of(2, seed=14)
    pairs = shape.paths[0].width // 2
    student = convert(model, layers, pairs, min(model.cfg.d_model, shape.v_groups * shape.v_width))
    logits, before = model(ids), {name: tensor.clone() for name, tensor in student.state_dict().items()}
    refit_outputs(model, student, SEEN)
    close(student(ids), logits, 1e-4)
    assert torch.equal(model(ids), logits)
    same = [name for name, tensor in student.state_dict().items() if torch.equal(tensor, before[name])]
    assert {name for name in before if name not in same} <= {f"blocks.{i}.attn.o.weight" for i in range(len(layers))}
    assert not any(block.attn.o._forward_pre_hooks for block in student.blocks)


def test_heads_that_read_nothing_keep_their_projection(taught):
    model, layers = taught
    student = convert(model, layers, 1, 4)
    weights = [block.attn.o.weight.clone() for block in student.blocks]
    for block in student.blocks:
        torch.nn.init.zeros_(block.attn.v.weight)
    refit_outputs(model, student, SEEN)
    assert all(torch.equal(block.attn.o.weight, weight) for block, weight in zip(student.blocks, weights))


@pytest.mark.parametrize("target", TARGETS)
def test_the_command_fits_what_gains_by_it(folder, monkeypatch, target):
    fitted = []
    monkeypatch.setattr(command, "refit_outputs", lambda *args: fitted.append(target))
    assert_done(dba_command(folder, f"--target {target}"))
    assert fitted == [target] * (target != "mla")


def test_advice_is_of_fitted_conversions(folder, monkeypatch):
    fitted, measured = [], []
    refit, rotated = refit_outputs, command.rotated
    monkeypatch.setattr(command, "refit_outputs", lambda *args: fitted.append(args[1]) or refit(*args))
    monkeypatch.setattr(command, "rotated", lambda model: measured.append(model) or rotated(model))
    assert_done(call(f"advise {FLAGS} --cache-share 0.3 --out advice.json", folder, convert_dba.main))
    kinds = [row["kind"] for row in json.loads((folder / "advice.json").read_text())["rows"]]
    teacher, *students = measured
    assert students == fitted and len(fitted) == kinds.count("converted") > 0
