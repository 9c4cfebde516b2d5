"""Conversion to decoupled attention with one latent: exactness, what is predicted, healing, and the commands."""

import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from teachers import FLAGS, RUN, TEACHERS, T, dba_command, folded, ids_of, kl, layers_of, save_teacher, teacher_of

import convert_dba
import reference
import train_dba as dba
from helpers import assert_done, assert_error, call, losses, make_text, read_log, snapshot
from kernels.rotate import rotate_cache
from reference import cached_logits, close
from surgery import command
from surgery import heal as healing
from surgery.calibrate import calibrate
from surgery.convert import Layer, choose, convert, split, widths

ROOT = Path(dba.__file__).parent


def full(model, pairs):
    """The largest latent that is of use beside so many pairs."""
    shape = model.cfg.attention
    return min(model.cfg.d_model, shape.v_groups * (shape.paths[0].width - 2 * pairs + shape.v_width))


# --- Moments

def test_moments_are_what_their_names_say(taught):
    """Beside explicit sums over an explicit attention matrix."""
    model, layers = taught
    attn, shape, windows = model.blocks[0].attn, model.cfg.attention, ids_of(6)
    H, G, w, v = model.cfg.n_head, shape.v_groups, shape.paths[0].width, shape.v_width
    x = model.blocks[0].attn_norm(model.embed(windows)).double()                     # [n, T, D]
    close(layers[0].moments.inputs, torch.einsum("ntd,nte->de", x, x) / x[..., 0].numel(), 1e-5)
    close(layers[0].moments.mean, x.mean((0, 1)), 1e-5)
    values, mass = 0.0, torch.zeros(H, T, dtype=torch.float64)
    for window in x:
        heads = []
        for h in range(H):
            g = h // (H // G)
            q = reference.rotate(window @ attn.q["geo"].weight[h * w:(h + 1) * w].double().T, 500.0)
            k = reference.rotate(window @ attn.k["geo"].weight[g * w:(g + 1) * w].double().T, 500.0)
            scores = (q @ k.T / w ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            p = reference.softmax_rows(scores)
            heads.append(p @ (window @ attn.v.weight[g * v:(g + 1) * v].double().T))
            for distance in range(T):
                mass[h, distance] += p.diagonal(-distance).sum()
        z = torch.cat(heads, 1)
        values = values + z.T @ z
    close(layers[0].moments.values, values / x[..., 0].numel(), 1e-4)
    close(layers[0].moments.mass, mass / x[..., 0].numel(), 1e-4)
    close(layers[0].moments.mass.sum(1), torch.ones(H), 1e-5)


def test_the_fisher_matrix_predicts_the_loss_of_a_perturbed_layer():
    """A small random error of the last layer's output, a new one at each position, costs d·F·d / 2 nats."""
    model = teacher_of("gqa")
    F = calibrate(model, ids_of(40), 40)[-1].fisher
    ids, noise = ids_of(30, seed=9), torch.Generator().manual_seed(1)
    D, size, costs = model.cfg.d_model, 0.05, []
    hook = model.blocks[-1].attn.register_forward_hook(
        lambda module, args, y: y + size * torch.randn(y.shape, generator=noise))
    for each in ids:
        student = model(each[None])
        hook.remove()
        teacher = model(each[None]).log_softmax(-1)
        costs.append((teacher.exp() * (teacher - student.log_softmax(-1))).sum(-1).mean().item())
        hook = model.blocks[-1].attn.register_forward_hook(
            lambda module, args, y: y + size * torch.randn(y.shape, generator=noise))
    predicted = size ** 2 * F.trace().item() / 2
    assert D > 0 and sum(costs) / len(costs) == pytest.approx(predicted, rel=0.15)


def test_calibration_changes_nothing_of_the_teacher():
    model, ids = teacher_of("gqa"), ids_of(2, seed=3)
    before = model(ids)
    calibrate(model, ids_of(3), 2)
    assert torch.equal(model(ids), before)
    assert not any(block.attn._forward_hooks for block in model.blocks) and not model.embed._forward_hooks


# --- Exactness

def test_full_widths_give_the_teachers_logits(taught):
    model, layers = taught
    pairs, ids = model.cfg.attention.paths[0].width // 2, ids_of(3, seed=4)
    student = convert(model, layers, pairs, full(model, pairs))
    close(student(ids), model(ids), 1e-4)


@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_a_text_of_few_tokens_shows_little_and_spoils_nothing(name):
    """Full widths are exact on tokens that no window has shown; and what rounding makes of directions that none has
    shown is not blown up, which a quantised cache would show."""
    model, ids = teacher_of(name), ids_of(3, seed=4)
    moments = calibrate(model, ids_of(6) % 5, 6)
    layers = [Layer.of(block.attn, each) for block, each in zip(model.blocks, moments)]
    pairs = model.cfg.attention.paths[0].width // 2
    close(convert(model, layers, pairs, full(model, pairs))(ids), model(ids), 1e-4)
    student = rotate_cache(convert(model, layers, 1, full(model, 1)))
    ids = ids % 5
    close(cached_logits(student, ids, [96], "q8_0"), student(ids), 0.03)


@pytest.mark.parametrize("pairs", (1, 3))
def test_the_folded_teacher_is_met_at_full_rank(taught, pairs):
    model, layers = taught
    student = convert(model, layers, pairs, full(model, pairs))
    for i, layer in enumerate(layers):
        x = torch.randn(23, model.cfg.d_model, generator=torch.Generator().manual_seed(i))
        expected = folded(layer, split(layer, pairs).kept, x.double())
        assert (model.blocks[i].attn(x[None])[0] - expected).abs().max() > 0.01, "nothing was taken from any pair"
        close(student.blocks[i].attn(x[None])[0], expected, 1e-4)


def test_the_loss_falls_with_the_rank(taught):
    model, layers = taught
    ids, pairs = ids_of(8, seed=5), 3
    most = full(model, pairs)
    losses = [kl(model, convert(model, layers, pairs, latent), ids) for latent in (2, most // 4, most // 2, most)]
    assert losses == sorted(losses, reverse=True) and losses[0] > 5 * losses[-1]


def test_a_divergence_is_not_below_zero():
    """As rounding would have it of about half of the students that are next to exact."""
    logits = torch.randn(1, 9, 50, generator=torch.Generator().manual_seed(0))
    windows = torch.zeros(1, 10, dtype=torch.long)
    kls = [healing.distance(lambda ids: logits, lambda ids, i=i: logits * (1 + i * 1e-7), windows)["kl"]
           for i in range(-9, 9)]
    assert min(kls) == 0 and max(kls) < 1e-6
    assert math.isnan(healing.distance(lambda ids: logits, lambda ids: logits * torch.nan, windows)["kl"])


@torch.no_grad()
def test_a_conversion_commutes_with_the_cache(taught):
    model, layers = taught
    student, ids = convert(model, layers, 2, full(model, 2) // 2), ids_of(2, 40, seed=6)
    exact = student(ids)
    close(cached_logits(student, ids, [7, 1, 1, 31]), exact, 2e-5)
    rotate_cache(student)
    close(cached_logits(student, ids, [7, 1, 1, 31]), exact, 2e-5)
    close(cached_logits(student, ids, [7, 1, 1, 31], "q8_0"), exact, 0.05)


# --- Widths

def test_widths_fit_and_the_chosen_are_those_of_the_least_predicted_loss(taught):
    model, layers = taught
    shape = model.cfg.attention
    elements, before = 2 * shape.v_groups * shape.v_width, torch.inf
    for share in (0.4, 0.6, 0.9):
        choices = widths(model.cfg, share)
        for pairs, latent in choices.items():
            cached = dba.bytes_per_token(convert(model, layers, pairs, latent).cfg, "fp16") // (2 * model.cfg.layers)
            assert cached <= share * elements
        pairs, latent, nats = choose(model.cfg, layers, share)
        assert choices[pairs] == latent and nats < before
        before = nats


@pytest.mark.parametrize("given, word", [
    (dict(attn_mode="decoupled"), "--attn-mode decoupled"), (dict(null_attn=True), "--null-attn"),
    (dict(tie_qk=True), "--tie-qk"), (dict(learned_temp=True), "--learned-temp"), (dict(rope=False), "--no-rope")])
def test_teachers_that_are_refused(tmp_path, given, word):
    save_teacher(tmp_path / "run", **{"d_model": 32, "n_head": 2, "layers": 1, "d_ff": 16, "block": 32, **given})
    make_text(tmp_path)
    assert_error(dba_command(tmp_path), word, "can't be converted")


# --- The commands

def test_a_conversion_is_an_ordinary_run(folder):
    assert_done(dba_command(folder))
    assert "is finished" in dba_command(folder).stdout
    log, record = read_log(folder / "y"), json.loads((folder / "y/convert.json").read_text())
    assert [line["type"] for line in log] == ["meta", "eval", "done"]
    ckpt = dba.load_checkpoint(folder / "y")
    shape = ckpt["config"].attention
    assert shape.streams == dict(latent=record["latent"], k_geo=2 * 2 * record["pairs"])
    assert sum(shape.streams.values()) <= 0.6 * 2 * 2 * 8
    teacher, student = dba.load_model(dba.load_checkpoint(folder / "run")), dba.load_model(ckpt)
    text = torch.from_numpy(ckpt["tokenizer"].encode((folder / "text.txt").read_text()).astype("int64"))
    assert kl(teacher, student, text[-64:][None]) < 0.5 * kl(teacher, dba.GPT(ckpt["config"], 257).init_weights(),
                                                             text[-64:][None])
    assert_done(call("--mode sample --ckpt y --prompt ab --max-new-tokens 4 --kv-cache hetero --device cpu", folder))


def test_healing_lowers_the_distance(folder, monkeypatch):
    monkeypatch.setattr(healing, "CROSS_ENTROPY", 0.0)     # of a random teacher it leads elsewhere
    assert_done(dba_command(folder, "--cache-share 0.4 --heal-tokens 3200 --lr 2e-3 --batch-size 2 --eval-every 25"))
    kls = [line["val_kl"] for line in read_log(folder / "y") if line["type"] == "eval"]
    assert kls[-1] == min(kls) < 0.7 * kls[0]
    teacher, student = (dba.load_model(dba.load_checkpoint(folder / name)) for name in ("run", "y"))
    frozen = [name for name, p in teacher.state_dict().items() if ".attn." not in name]
    assert all(torch.equal(teacher.state_dict()[name], student.state_dict()[name]) for name in frozen)


def test_healing_resumes_from_every_step(folder, monkeypatch):
    """Stopped at each step in turn: the same losses and weights as in one go."""
    more = "--heal-tokens 160 --lr 1e-3"
    assert_done(dba_command(folder, more))
    (folder / "y").rename(folder / "whole")
    draw = healing.sample_batch

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(healing, "sample_batch", interrupted)
    assert [dba_command(folder, more).code for _ in range(6)] == [130] * 5 + [0]
    assert losses(folder / "y") == losses(folder / "whole")
    a, b = (torch.load(folder / name / "last.pt", weights_only=True)["model"] for name in ("y", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name, value", [
    ("exp", "paper_gqa"), ("micro_batch", 8), ("shard", True), ("activation_checkpointing", True), ("dropout", 0.5),
    ("keep_every", 1), ("grad_accum", 2)])
def test_how_a_teacher_was_trained_is_nothing_to_its_conversion(folder, name, value):
    save_teacher(folder / "run", **{**RUN, name: value})
    for tokens in (64, 128):                               # and what was begun goes on
        assert_done(dba_command(folder, f"--heal-tokens {tokens} --lr 1e-3"))
    dba.load_checkpoint(folder / "y")
    cfg = dba.load_checkpoint(folder / "y/last.pt")["config"]
    assert getattr(cfg, name) == dba.DEFAULTS[name] and cfg.steps == 4
    assert not [*(folder / "y").glob(dba.KEPT_WEIGHTS)]


def test_healing_that_was_stopped_ends_where_it_is_measured(folder, monkeypatch):
    """Of 5 steps, after 3: fewer are refused, and 3 end with an evaluation."""
    draw, calls = healing.sample_batch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(healing, "sample_batch", interrupted)
    assert dba_command(folder, "--heal-tokens 160").code == 130
    before = snapshot(folder / "y")
    assert_error(dba_command(folder, "--heal-tokens 64"), "healed for 3 steps already, and 2 are asked for")
    assert snapshot(folder / "y") == before
    assert_done(dba_command(folder, "--heal-tokens 96"))
    assert [(line["type"], line["step"]) for line in read_log(folder / "y")[-2:]] == [("eval", 3), ("done", 3)]


def test_healing_goes_on_where_the_model_is(folder):
    """On any device, if that is another than what was saved is read to."""
    assert_done(dba_command(folder, "--heal-tokens 64"))
    ckpt = dba.load_checkpoint(folder / "y/last.pt")
    student = dba.load_model(ckpt).to("meta")
    healing.freeze_all_but_attention(student)
    cfg, rng = ckpt["config"], np.random.Generator(np.random.PCG64(0))
    _, _, sizes = healing.resume(folder / "y", cfg, student, dba.make_optimizer(student, cfg), rng, ckpt["data"])
    assert len(sizes) == 1 and sizes[0].is_meta


def test_scaling_latents_changes_no_logit():
    model, ids = teacher_of("gqa"), ids_of(2, 20)
    student = convert(model, layers_of(model), 2, 9)
    before, sizes = student(ids), healing.latent_sizes(student, ids[0])
    healing.scale_latents(student, [1 / size for size in sizes])
    close(student(ids), before, 1e-5)
    close(torch.stack(healing.latent_sizes(student, ids[0])), torch.ones(2, 9), 1e-5)


@pytest.mark.parametrize("change, words", [
    ("--cache-share 0.5", ["cache_share was 0.6, is 0.5"]), ("--seed 3", ["seed was 0, is 3"]),
    ("--heal-tokens 320 --val-windows 1", ["val_windows was 2, is 1"]),
    *((f"--heal-tokens {tokens} {flags}", [words]) for tokens in (64, 320) for flags, words in (
        ("--lr 1e-4", "--lr was 0.001, is 0.0001"), ("--lr 1e-3 --batch-size 2", "--batch-size was 1, is 2")))])
def test_a_folder_of_other_settings_is_refused(folder, change, words):
    assert_done(dba_command(folder, "--heal-tokens 64 --lr 1e-3"))
    assert_error(dba_command(folder, change), *words, "--overwrite")
    assert_done(dba_command(folder, f"{change} --overwrite"))


def test_a_broken_teacher_is_refused(folder):
    ckpt = dba.load_checkpoint(folder / "run")
    model = dba.load_model(ckpt)
    model.blocks[0].mlp.up.weight.data[0, 0] = float("nan")
    dba.save_checkpoint(folder / "run/best.pt", ckpt["config"], ckpt["tokenizer"], model, step=1)
    assert_error(dba_command(folder, ""), "logits aren't finite")
    assert_error(call(f"advise {FLAGS} --cache-share 0.3", folder, convert_dba.main), "logits aren't finite")


@pytest.mark.parametrize("change, words", [("--cache-share 0.1", "too few"), ("--device tpu", "tpu")])
def test_a_failure_overwrites_nothing(folder, change, words):
    assert_done(dba_command(folder, "--heal-tokens 64"))
    before = snapshot(folder / "y")
    assert_error(dba_command(folder, f"--overwrite {change}"), words)
    assert snapshot(folder / "y") == before


@pytest.mark.parametrize("name", ("best.pt", "last.pt"))
def test_a_folder_of_another_run_is_left_alone(folder, name):
    shutil.copytree(folder / "run", folder / "other")
    (folder / "other/best.pt").rename(folder / "other" / name)
    before = snapshot(folder / "other")
    assert_error(dba_command(folder, "--out-dir other"), name, "another run", "--overwrite")
    for model in ("other", f"other/{name}"):
        assert_error(dba_command(folder, f"--out-dir ./other --overwrite --model {model}"), "other is where other")
    assert snapshot(folder / "other") == before


def test_an_out_dir_that_is_a_file(folder):
    assert_error(dba_command(folder, "--out-dir text.txt"), "can't make the run folder text.txt")
    assert_error(call(f"advise {FLAGS} --cache-share 0.3 --out text.txt/advice.json", folder, convert_dba.main),
                 "can't make the folder text.txt")
    assert_error(call(f"advise {FLAGS} --cache-share 0.3 --out run", folder, convert_dba.main), "run is a folder")


def test_a_healed_folder_goes_on_for_longer_and_in_its_type(folder):
    assert_done(dba_command(folder, "--heal-tokens 64"))   # two steps: its warm-up ends with them
    assert_error(dba_command(folder, "--heal-tokens 320 --dtype bfloat16"), "--dtype was 'float32', is 'bfloat16'")
    assert_done(dba_command(folder, "--heal-tokens 320"))
    assert read_log(folder / "y")[-1] == dict(type="done", step=10, tokens=320, best_val_kl=pytest.approx(1, abs=9))
    shutil.copy(folder / "y/best.pt", folder / "y/last.pt")
    assert_error(dba_command(folder, "--heal-tokens 640"), "last.pt lacks", "--overwrite")


def test_texts_of_few_different_tokens(folder):
    """They leave directions unseen, which mla's norm must not blow up."""
    (folder / "few.txt").write_text("ab" * 999)
    assert_done(dba_command(folder, "--data few.txt --target mla --cache-share 1 --out-dir z"))
    weights = torch.load(folder / "z/best.pt", weights_only=True)["model"]
    assert max(weight.abs().max() for weight in weights.values()) < 1000        # the loud channel has 200
    teacher, student = (dba.load_model(dba.load_checkpoint(folder / name)) for name in ("run", "z"))
    ids = torch.tensor([[97, 98] * 16])
    assert kl(teacher, student, ids) < 0.1


def test_a_layer_that_reads_nothing(folder):
    teacher = torch.load(folder / "run/best.pt", weights_only=True)
    teacher["model"]["blocks.0.attn_norm.weight"].zero_()
    torch.save(teacher, folder / "run/best.pt")
    assert_error(dba_command(folder, "--target per-head"), "--data says too little")
    assert_done(dba_command(folder))
    assert read_log(folder / "y")[1]["val_kl"] < 1e-9


def test_an_interrupt_is_no_traceback(folder, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "layers_of", interrupted)
    assert dba_command(folder).code == 130 and not (folder / "y").exists()


def test_windows_of_a_long_text_are_whole():
    ids = torch.zeros(2**24 + 15, dtype=torch.uint8)       # in float32 the last would begin at 2**24 + 12, not 11
    assert command.calibration_windows(ids, 3, 3).shape == (3, 4)


def test_texts_take_turns():
    texts = [torch.arange(100), torch.arange(1000, 1050), torch.arange(2000, 2400)]
    windows = command.in_turn(texts, 7, 9)
    assert windows.shape == (7, 10) and [int(w[0]) // 1000 for w in windows] == [0, 1, 2, 0, 1, 2, 0]
    assert all(torch.equal(w, torch.arange(w[0], w[0] + 10)) for w in windows) and len(windows.unique(dim=0)) == 7


def test_two_texts(folder):
    make_text(folder, "other.txt", seed=1)
    assert_done(dba_command(folder, "--data text.txt other.txt --heal-tokens 64"))
    one, two = ((folder / name).stat().st_size for name in ("text.txt", "other.txt"))
    meta = read_log(folder / "y")[0]["data"]
    assert meta["train_tokens"] + meta["val_tokens"] == one + two


@pytest.mark.parametrize("change, words, code", [
    ("--cache-share 0", ["--cache-share"], 2), ("--cache-share 1.5", ["--cache-share"], 2),
    ("--cache-share 0.1", ["--cache-share 0.1", "too few"], 1), ("--window 65", ["--window 65", "64"], 1),
    ("--data none.txt", ["none.txt"], 1), ("--model none", ["none"], 1), ("--calibration 0", ["--calibration"], 2),
    ("--val-data short.txt", ["too few"], 1), ("--heal-tokens 99 --lr nan", ["--lr"], 2),
    ("--heal-tokens -1", ["--heal-tokens"], 2), ("--device tpu", ["tpu"], 1), ("--window 4", ["--window 4"], 1),
    (f"--seed {2**63}", ["--seed"], 2), (f"--calibration {2**63}", ["--calibration"], 2),
    (f"--heal-tokens 9 --batch-size {2**63}", ["--batch-size"], 2)])
def test_bad_input(folder, change, words, code):
    (folder / "short.txt").write_text("short")
    assert_error(dba_command(folder, change), *words, code=code)
    assert not (folder / "y").exists()


def test_advice_keeps_to_its_share(folder):
    result = call(f"advise {FLAGS} --cache-share 0.3 --out advice.json", folder, convert_dba.main)
    assert_done(result)
    rows = json.loads((folder / "advice.json").read_text())["rows"]
    assert {row["kind"] for row in rows} == {"quantised", "converted"}
    assert all(row["bytes_share"] <= 0.3 for row in rows)
    kls = [row["kl"] for row in rows]
    assert kls == sorted(kls)
    assert ("convert, then" in result.stdout) == (rows[0]["kind"] == "converted")


def test_advice_tries_newest_tokens_in_fp16_where_windows_are_long_enough(folder):
    save_teacher(folder / "long", **{**RUN, "block": 128})
    flags = "--model long --data text.txt --calibration 3 --val-windows 2 --cache-share 0.5 --out advice.json"
    bytes_of = dict(q8_0=18, q4_0=10, q3_0=8, q2_0=6)      # of the 16 channels of keys, or of values, with a scale
    for window, tried in ((64, {0}), (128, {0, command.NEWEST})):
        assert_done(call(f"advise {flags} --window {window}", folder, convert_dba.main))
        rows = json.loads((folder / "advice.json").read_text())["rows"]
        assert all(row["bytes_share"] <= 0.5 for row in rows)
        quantised = [row for row in rows if row["kind"] == "quantised"]
        assert {row["residual"] for row in quantised} == tried
        for row in quantised:
            old, newest = bytes_of[row["formats"]["k"]] + bytes_of[row["formats"]["v"]], row["residual"]
            assert row["bytes_share"] == pytest.approx((old * (window - newest) + 64 * newest) / window / 64)


@torch.no_grad()
def test_advice_reads_the_newest_tokens_in_fp16():
    model, ids = teacher_of("gqa"), ids_of(1, 60, seed=2)
    policy = command.alike(model.cfg, "q2_0", 16)
    found = command.through_cache(model, policy)(ids)
    close(found, cached_logits(model, ids, [60], "q2_0", 16), 1e-4)
    assert (found - command.through_cache(model, command.alike(model.cfg, "q2_0", 0))(ids)).abs().max() > 0.1


def test_a_loss_that_is_no_number_leaves_what_there_was(folder, monkeypatch):
    """Even at the first step: the conversion is in last.pt, from which the same command goes on."""
    more, loss_of = "--heal-tokens 96 --lr 1e-3", healing.loss_of
    assert_done(dba_command(folder, more))
    (folder / "y").rename(folder / "whole")
    monkeypatch.setattr(healing, "loss_of", lambda *args: (math.nan, loss_of(*args)[1]))
    assert_error(dba_command(folder, more), "step 1", "last.pt holds step 0")
    monkeypatch.setattr(healing, "loss_of", loss_of)
    assert dba.load_checkpoint(folder / "y/last.pt")["step"] == 0
    assert_done(dba_command(folder, more))
    assert losses(folder / "y") == losses(folder / "whole")


def test_advice_where_no_conversion_fits(folder):
    """Heads of two channels leave little room for a latent; quantising still fits."""
    save_teacher(folder / "narrow", attn_mode="standard", n_head=16, d_model=32, layers=1, d_ff=48, block=64)
    result = call(f"advise {FLAGS} --model narrow --cache-share 0.45 --out advice.json", folder, convert_dba.main)
    assert result.code == 0 and "no conversion for" in result.stderr
    rows = json.loads((folder / "advice.json").read_text())["rows"]
    assert "quantised" in {row["kind"] for row in rows}


def test_configs_of_students_are_valid():
    model = teacher_of("gqa")
    student = convert(model, layers_of(model), 4, 5)
    assert not dba.problems(dataclasses.replace(student.cfg, data="x"), {})


# --- The table of docs/convert.md

def test_the_table_of_the_docs_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import surgery_table
    text = (ROOT / "docs/convert.md").read_text(encoding="utf-8")
    assert surgery_table.filled(text) == text and text.count("<!-- surgery: runs/") == 2
    assert surgery_table.filled(text.replace("| latent 75 % | 75.0", "| latent 75 % | 75.1")) == text


def test_ratios_are_of_the_windows_that_both_rows_have_seen(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import surgery_table

    def row(*kls):
        return dict(bytes=0.5, elements=0.5, text=dict(kls=kls, kl=sum(kls) / len(kls), kl_se=None, dnll=0.0, tokens=9))

    rows = {"latent 75 %": row(0.1, 0.2), "MHA2MLA-like 75 %": row(1.0, 1.0, 9.0), "per head 75 %": row(0.5)}
    lines = surgery_table.table(dict(rows=rows, teacher="x", calibration="y", window=8, skipped=1)).splitlines()
    assert any("MHA2MLA-like cut | 0.19 | 0.150: met |" in line for line in lines)
    assert any("75 %: beside the cut per head | 0.29 | 0.200: met |" in line for line in lines)
    assert any("62.5 %" in line and "not measured" in line for line in lines)
