"""The other targets of a conversion: exactness where there can be, shares of the cache, and the command line."""

import json

import pytest
import torch
from teachers import dba_command, folded, ids_of, kl, layers_of, teacher_of

import train_dba as dba
from helpers import assert_done, assert_error, call, losses
from kernels.rotate import rotate_cache
from reference import cached_logits, close
from surgery import targets
from surgery.convert import split
from surgery.targets import TARGETS, constant, gqa, key_cuts, mla, mla_split, per_head, shared_keys, worth_to_all


def quiet(done, total):
    pass


# --- Exactness

def test_full_widths_per_head_give_the_teachers_logits(taught):
    model, layers = taught
    shape, ids = model.cfg.attention, ids_of(3, seed=4)
    close(per_head(model, layers, shape.paths[0].width // 2, 1, shape.v_width)(ids), model(ids), 1e-4)


@pytest.mark.parametrize("pairs", (1, 3))
def test_the_folded_teacher_is_met_per_head(taught, pairs):
    model, layers = taught
    shape = model.cfg.attention
    student = per_head(model, layers, pairs, shape.paths[0].width - 2 * pairs, shape.v_width)
    for i, layer in enumerate(layers):
        kept = worth_to_all(layer).argsort(1, descending=True)[:, :pairs].sort(1).values
        x = torch.randn(23, model.cfg.d_model, generator=torch.Generator().manual_seed(i))
        expected = folded(layer, kept, x.double())
        assert (model.blocks[i].attn(x[None])[0] - expected).abs().max() > 0.01, "nothing was taken from any pair"
        close(student.blocks[i].attn(x[None])[0], expected, 2e-3)               # W_o is fitted with a ridge


def test_a_narrow_key_scores_in_the_teachers_size(taught):
    """What the cut leaves of the unrotated score is divided by the root of the teacher's width, not of the narrower."""
    model, layers = taught
    shape = model.cfg.attention
    student, x = per_head(model, layers, 2, 2, shape.v_width), torch.randn(9, model.cfg.d_model, dtype=torch.float64)
    attn, layer = student.blocks[1].attn, layers[1]
    parts = split(layer, 2, worth_to_all(layer))
    for h in range(model.cfg.n_head):
        g = h // (model.cfg.n_head // shape.v_groups)
        cut = key_cuts(layer, parts)[g]
        expected = (x @ parts.queries[h].T @ cut.read[:2].T) @ (x @ parts.keys[g].T @ cut.write[:2].T).T
        q = x.float() @ attn.q["sem"].weight[2 * h:2 * h + 2].T
        k = x.float() @ attn.k["sem"].weight[2 * g:2 * g + 2].T
        close(attn.shape.paths[0].scale * q @ k.T, expected / shape.paths[0].width ** 0.5, 1e-4)


def test_the_folded_teacher_is_met_by_mla_without_its_norm():
    """Key heads alike, two pairs kept, a latent of all that differs: 4 unrotated channels of keys, 16 of values."""
    model = teacher_of("gqa")
    for block in model.blocks:
        heads = block.attn.k["geo"].weight.view(2, 8, -1)
        heads[1] = heads[0]
    layers = layers_of(model)
    student = mla(model, layers, 2, 4 + 16)
    for i, layer in enumerate(layers):
        student.blocks[i].attn.latent[1] = torch.nn.Identity()
        x = torch.randn(23, model.cfg.d_model, generator=torch.Generator().manual_seed(i))
        kept = mla_split(layer, shared_keys(layer), 2).kept
        close(student.blocks[i].attn(x[None])[0], folded(layer, kept, x.double()), 1e-3)


def test_key_heads_that_are_alike_are_pooled_without_loss():
    model, ids = teacher_of("standard"), ids_of(2, seed=3)
    for block in model.blocks:
        for weight in (block.attn.k["geo"].weight, block.attn.v.weight):
            heads = weight.view(2, 2, -1)                  # two groups of two heads
            heads[:] = heads[:, :1].clone()
    student = gqa(model, layers_of(model, 2), 2)
    assert student.cfg.attn_mode == "gqa" and student.cfg.attention.v_groups == 2
    close(student(ids), model(ids), 1e-5)


def test_pooled_heads_are_means():
    model = teacher_of("standard")
    attn, pooled = model.blocks[1].attn, gqa(model, layers_of(model, 1), 2).blocks[1].attn
    w = len(attn.v.weight) // 4
    for mine, its in ((pooled.v, attn.v), (pooled.k["geo"], attn.k["geo"])):
        for group in range(2):
            first, second = (its.weight[(2 * group + i) * w:(2 * group + i + 1) * w] for i in range(2))
            close(mine.weight[group * w:(group + 1) * w], (first + second) / 2, 1e-6)


def test_keys_that_are_multiples_of_one_are_shared_without_loss():
    """All pairs kept and a latent as wide as the stream: MLA without its norm is the teacher."""
    model, ids = teacher_of("gqa"), ids_of(3, seed=4)
    for n, block in enumerate(model.blocks):               # the second key head: the first, each pair turned and scaled
        weight = block.attn.k["geo"].weight.view(2, 2, 4, -1)                   # [G, halves, pairs, D]
        angle, size = torch.arange(4.0)[:, None] + n, torch.linspace(0.5, 2, 4)[:, None]
        a, b = weight[0]
        cos, sin = size * angle.cos(), size * angle.sin()
        weight[1] = torch.stack([cos * a - sin * b, sin * a + cos * b])
    layers = layers_of(model)
    assert all((shared_keys(layer).losses < 1e-9 * layer.derotation.sum(0)).all() for layer in layers)
    student = mla(model, layers, 4, 2 * 8)                 # 16: all values
    for block in student.blocks:
        block.attn.latent[1] = torch.nn.Identity()
    close(student(ids), model(ids), 1e-4)


def test_a_loud_constant_takes_the_norms_effect(monkeypatch):
    """A stream with a large constant part; key heads alike, all pairs kept, a latent of all values: that is the
    teacher, but for how constant the part is. Without it the norm changes what attention reads."""
    model = teacher_of("gqa")
    with torch.no_grad():
        model.embed.weight += 4 * torch.randn(model.embed.weight.size(1), generator=torch.Generator().manual_seed(5))
        for block in model.blocks:
            heads = block.attn.k["geo"].weight.view(2, 8, -1)
            heads[1] = heads[0]
    layers, ids = layers_of(model), ids_of(4, 60, seed=8)
    weights, steady = constant(layers[1])
    channel = model.blocks[1].attn_norm(model.blocks[0](model.embed(ids))).double() @ weights
    assert steady and channel.mean().item() == pytest.approx(1, abs=0.02) and channel.std() < targets.STEADY
    student = mla(model, layers, 4, 2 * 8 + 1)
    loud = kl(model, student, ids)
    monkeypatch.setattr(targets, "STEADY", 0.0)
    assert loud < 0.02 * kl(model, mla(model, layers, 4, 2 * 8), ids)
    exact, x = student(ids), torch.randn(5, model.cfg.d_model, generator=torch.Generator().manual_seed(1))
    assert not student.blocks[0].attn.latent(x)[:, 0].any()
    rotate_cache(student)                                  # the channel is silent there, too
    assert not student.blocks[0].attn.latent(x)[:, 0].any() and student.blocks[0].attn.latent(x)[:, 1:].all()
    close(student(ids), exact, 1e-3)
    close(cached_logits(student, ids, [7, 1, 52], "q8_0"), exact, 0.05)


def test_a_shared_key_is_the_nearest(taught):
    """Its predicted loss is what its errors cost, one pair and key head at a time, and no other vector tried costs
    less."""
    model, layers = taught
    layer, generator = layers[0], torch.Generator().manual_seed(0)
    C, w, half = layer.moments.inputs, layer.wq.size(1), layer.wq.size(1) // 2

    def cost(keys, factors, f):
        nats = 0.0
        for g in range(len(layer.wk)):
            error = torch.complex(layer.wk[g, f], layer.wk[g, half + f]) - factors[g] * keys
            size = (error.conj() @ C.to(error.dtype) @ error).real
            for h in layer.heads(g):
                a, b = layer.wq[h, f], layer.wq[h, half + f]
                nats += layer.energies[h] * (a @ C @ a + b @ C @ b) * size / (4 * w)
        return nats.item()

    shared = shared_keys(layer)
    for f in range(half):
        own = cost(shared.keys[f], shared.factors[f], f)
        assert own == pytest.approx(shared.losses[f].item(), rel=1e-6, abs=1e-9)
        for _ in range(5):
            other = shared.factors[f] + 0.05 * torch.randn(len(layer.wk), dtype=torch.complex128, generator=generator)
            assert cost(shared.keys[f], other, f) >= own - 1e-9


# --- Widths

@pytest.mark.parametrize("target", TARGETS)
def test_a_target_keeps_to_its_share(taught, target):
    model, layers = taught
    ids, whole = ids_of(8, seed=5), sum(model.cfg.attention.streams.values())
    found = {}
    for share in (0.5, 1.0):
        student, chosen = TARGETS[target](model, layers, share, quiet)
        assert sum(student.cfg.attention.streams.values()) <= share * whole and chosen
        found[share] = kl(model, student, ids)
    assert found[1.0] < found[0.5] * (1.05 if target == "mla" else 1)           # whose latent saturates


@pytest.mark.parametrize("target", ("per-head", "mla", "gqa"))
@torch.no_grad()
def test_targets_commute_with_the_cache(taught, target):
    model, layers = taught
    student, _ = TARGETS[target](model, layers, 0.6, quiet)
    ids = ids_of(2, 40, seed=6)
    exact = student(ids)
    close(cached_logits(student, ids, [7, 1, 1, 31]), exact, 2e-5)
    rotate_cache(student)
    close(cached_logits(student, ids, [7, 1, 1, 31], "q8_0"), exact, 0.05)


# --- The command

@pytest.mark.parametrize("target, mode", (("per-head", "decoupled"), ("mla", "mla"), ("gqa", "gqa")))
def test_a_target_by_the_command_line(folder, target, mode):
    more = f"--target {target} --heal-tokens 160 --lr 1e-3"
    done = dba_command(folder, more)
    assert_done(done)
    assert f"{target}:" in done.stdout
    record, ckpt = json.loads((folder / "y/convert.json").read_text()), dba.load_checkpoint(folder / "y")
    assert record["asked"]["target"] == target and ckpt["config"].attn_mode == mode
    assert "is finished" in dba_command(folder, more).stdout
    (folder / "y").rename(folder / "whole")
    assert_done(dba_command(folder, f"--target {target} --heal-tokens 160 --lr 1e-3"))
    assert losses(folder / "y") == losses(folder / "whole")
    assert_done(call("--mode sample --ckpt y --prompt ab --max-new-tokens 4 --kv-cache q8_0 --device cpu", folder))
    assert_error(dba_command(folder, "--heal-tokens 160 --lr 1e-3"), f"target was {target}, is latent", "--overwrite")


def test_shares_that_a_target_cannot_keep_to(folder):
    assert_error(dba_command(folder, "--target gqa --cache-share 0.3"), "2 key heads", "0.5")
    assert_error(dba_command(folder, "--target per-head --cache-share 0.1"), "--cache-share 0.1", "per-head")
    assert_error(dba_command(folder, "--target mla --cache-share 0.01"), "--cache-share 0.01", "mla")


def test_layers_are_of_the_teacher_alone(taught):
    """Conversions share all weights but attention's with the teacher, and change none of them."""
    model, layers = taught
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for target in TARGETS.values():
        student, _ = target(model, layers, 0.6, quiet)
        assert torch.equal(student.embed.weight, model.embed.weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
