"""The papers' manifest, and its runner."""

import contextlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_paper_manifest as runner
from estimate import training_memory
from helpers import environment, finish, last_step, start
from paper.collect import read_run
from train_dba import UserError, bytes_per_token, count_params, load_checkpoint, make_config, parse_args

ROOT = Path(__file__).parent.parent
MANIFEST = runner.read_manifest(ROOT / "paper_manifest.json")
RUNS = runner.list_runs(MANIFEST, list(MANIFEST), "data", "runs")
TINY = dict(d_model=16, layers=1, n_head=2, d_ff=16, block=8, batch_size=2, steps=3, tokenizer="byte")


def series_of(run):
    return run.name.rsplit("_s", 1)[0]


def test_every_run_has_its_own_folder_and_its_flags_resolve_to_its_config():
    assert len({run.cfg.out_dir for run in RUNS}) == len(RUNS) > 200
    for run in RUNS:
        assert parse_args(run.command()) == run.given


def test_groups_of_the_issue_are_there():
    assert set(MANIFEST) == {"wikitext2", "fineweb100m", "local_12l", "a100_1b", "cpu_mini", "equal_cache"}
    modes = {run.cfg.attn_mode for run in RUNS if run.name.startswith("cpu_mini/modes")}
    assert modes == {"standard", "bottleneck", "decoupled", "gqa", "mla"}


@pytest.mark.parametrize("prefix, standard", (("wikitext2/fair", "standard512"), ("cpu_mini/modes", "standard192")))
def test_fair_rows(prefix, standard):
    """One protocol for all; matched rows have the parameters of standard, and most rows one size of cache."""
    runs = [run for run in RUNS if run.name.startswith(prefix)]
    protocol = {(r.cfg.batch_size, r.cfg.steps, r.cfg.block, r.cfg.warmup_steps, r.cfg.min_lr, r.cfg.weight_decay,
                 r.cfg.grad_clip, r.cfg.dropout, r.cfg.data) for r in runs}
    assert len(protocol) == 1
    target, = {count_params(r.cfg, r.vocab_size)["total"] for r in runs if standard in r.name}
    matched = [r for r in runs if "_matched" in r.name]
    assert matched and all(abs(count_params(r.cfg, r.vocab_size)["total"] / target - 1) < 0.001 for r in matched)
    seeds = {}
    for run in runs:
        seeds.setdefault(series_of(run), set()).add(run.cfg.seed)
    assert all(len(s) >= 3 for s in seeds.values())


@pytest.mark.parametrize("prefix, elements", (("wikitext2/fair", 192), ("cpu_mini/modes", 144),
                                              ("equal_cache/headline", 144), ("equal_cache/split", 144),
                                              ("equal_cache/long", 144), ("equal_cache/larger", 240)))
def test_rows_but_standard_cache_the_same(prefix, elements):
    sizes = {bytes_per_token(r.cfg, "fp16") // 2 // r.cfg.layers for r in RUNS
             if r.name.startswith(prefix) and "standard" not in r.name}
    assert sizes == {elements}


@pytest.mark.parametrize("name", ("headline", "split", "long", "larger"))
def test_sets_of_equal_cache_have_equal_parameters(name):
    sizes = {count_params(r.cfg, r.vocab_size)["total"] for r in RUNS if r.name.startswith(f"equal_cache/{name}/")}
    assert max(sizes) / min(sizes) - 1 < 0.001


def test_flops_are_those_of_the_products():
    """Counted product by product: weights twice per token forward, scores and values over the causal half."""
    run = next(r for r in RUNS if r.name.startswith("cpu_mini/modes/standard192_s"))
    D, L, F, T, V = 192, 4, 512, 256, 320
    weights = L * (4 * D * D + 3 * D * F) + V * D          # the embedding multiplies once, as output
    forward = 2 * weights + L * 2 * 2 * D * T / 2
    assert run.flops == pytest.approx(3 * forward * run.tokens, rel=2e-3)       # norms apart


def sweep_results():
    """{series without learning rate: {lr: loss}} of the committed sweep."""
    losses = {}
    for log in sorted((ROOT / "runs").glob("cpu_mini/lr/*/train.jsonl")):
        if run := read_run(log.parent, f"cpu_mini/lr/{log.parent.name}"):
            losses.setdefault(run["series"].rsplit("_lr", 1)[0], {})[run["lr"]] = run["last_val_loss"]
    return losses


@pytest.mark.parametrize("row, losses", sweep_results().items())
def test_learning_rates_are_those_that_the_sweep_chose(row, losses):
    name = row.removeprefix("cpu_mini/lr/")
    chosen = {r.cfg.lr for r in RUNS if series_of(r) in (f"cpu_mini/modes/{name}", f"cpu_mini/modes/{name}_matched")}
    assert chosen == {best := min(losses, key=losses.get)} and min(losses) < best < max(losses)


@pytest.mark.parametrize("change, message", (
    (dict(rows={"a": {"atn_mode": "standard"}}), "no setting atn_mode"),
    (dict(rows={"a": {"attn_mode": "standard", "kv_head": 2}}), "kv_head|--kv-head"),
    (dict(extra=1), "unknown key extra")))
def test_wrong_manifests(tmp_path, change, message):
    part = {"base": dict(TINY), "rows": {"a": {}}, "seeds": [1], **change}
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"g": {"data": "text.txt", "vocab_size": 257, "sets": {"s": part}}}))
    with pytest.raises(UserError, match=message):
        runner.list_runs(runner.read_manifest(path), ["g"], "data", "runs")


def test_seeds_of_a_rate_and_of_a_test_are_disjoint(tmp_path):
    part = dict(base=dict(TINY), rows={"a": {}}, seeds=[1, 2], rate_seeds=[2], lrs=[0.1])
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"g": {"data": "text.txt", "vocab_size": 257, "sets": {"s": part}}}))
    with pytest.raises(UserError, match="seed 2 is for tests"):
        runner.read_manifest(path)
    for group in MANIFEST.values():
        for part in group["sets"].values():
            assert not set(part["seeds"]) & set(part.get("rate_seeds", []))
    assert {run.for_rate for run in RUNS if run.name.startswith("wikitext2/fair")} == {True, False}


def manifest_command(tmp_path, flags):
    command = [sys.executable, ROOT / "run_paper_manifest.py", "--manifest", "m.json", "--group", "g", "--data-dir",
               ".", "--device", "cpu", *shlex.split(flags)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())


@pytest.fixture
def small(tmp_path):
    rows = {"good": {}, "bad": {"val_frac": 0.00001}, "other": {"attn_mode": "decoupled", "sem_dim": 4, "geo_dim": 8}}
    (tmp_path / "text.txt").write_text("a few words of text. " * 100)
    (tmp_path / "m.json").write_text(json.dumps({"g": {"data": "text.txt", "vocab_size": 257, "sets": {
        "s": {"about": "", "base": TINY, "rows": rows, "seeds": [1]}}}}))
    return tmp_path


def test_a_failed_run_does_not_stop_the_others(small):
    result = manifest_command(small, "--jobs 2")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "g/s/bad_s1: exit code 1" in result.stderr and "2 of 3 runs" in result.stdout
    assert "validation part" in (small / "runs/g/s/bad_s1.console").read_text()
    for name in ("good", "other"):
        log = (small / f"runs/g/s/{name}_s1/train.jsonl").read_bytes()
        assert b'"done"' in log.splitlines()[-1] and not (small / f"runs/g/s/{name}_s1.console").exists()
    again = manifest_command(small, "--only s/good s/other --steps 3")
    assert again.returncode == 0
    assert (small / "runs/g/s/other_s1/train.jsonl").read_bytes() == log        # a finished run is left alone


def test_sigterm_lets_runs_save_and_the_same_command_goes_on(small):
    folders, before = [small / f"runs/g/s/{name}_s1" for name in ("good", "other")], [0, 0]
    for _ in range(2):
        process = start("--manifest m.json --group g --data-dir . --device cpu --only s/good s/other --jobs 2 "
                        "--steps 1000000", small, [ROOT / "run_paper_manifest.py"])
        while process.poll() is None and not all(last_step(f) > step for f, step in zip(folders, before)):
            time.sleep(0.1)
        process.terminate()
        result = finish(process)
        assert result.code == 128 + signal.SIGTERM and "stopped; the same command goes on" in result.stderr, result
        before = [load_checkpoint(folder / "last.pt")["step"] for folder in folders]
        assert all(step >= last_step(folder) > step - 10 for step, folder in zip(before, folders))


WRONG = {                                                  # what takes the place of parts of a manifest's set or group
    "rows": [[1], {"a": "x"}, {"a": None}, {}, {"../../x": {}}, {"": {}}, {"a": {"lrs": 0.1}}, {"a": {"layers": "2"}},
             {"a": {"lrs": [0.001]}, "a_lr0.001": {}}],
    "base": [[1], {"d_model": None}, {"width": 1}], "seeds": ["12", 3, [1.5], [], [-1]], "rate_seeds": [[1]],
    "lrs": ["ab", 0.1, [0], [0.001, 0.0010000001]], "vocab_size": ["x", 0, 1.5], "steps": [3],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values], ids=str)
def test_a_set_that_can_t_be_is_refused(small, name, value):
    manifest = json.loads((small / "m.json").read_text())
    manifest["g"]["sets"]["s"] = {**manifest["g"]["sets"]["s"], name: value}
    (small / "m.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as refused:
        runner.list_runs(runner.read_manifest(small / "m.json"), ["g"], "data", "runs")
    assert "\n" not in str(refused.value) and "begins with" not in str(refused.value)           # of nothing


@pytest.mark.parametrize("change", (dict(set="t"), dict(a="none"), dict(kind="worse"), dict(margin=0), dict(p=0.1)))
def test_a_contrast_that_can_t_be_is_refused(small, change):
    manifest = json.loads((small / "m.json").read_text())
    contrast = dict(name="n", set="s", a="good", b="other", kind="better", margin=0.1)
    for contrasts, refused in (([contrast], False), ([{**contrast, **change}], True)):
        manifest["g"]["contrasts"] = contrasts
        (small / "m.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="no manifest") if refused else contextlib.nullcontext():
            runner.read_manifest(small / "m.json")


def test_a_row_that_is_there_twice_is_refused(small):
    text = (small / "m.json").read_text()
    (small / "m.json").write_text(text.replace('"good":', '"good": {"layers": 2}, "good":'))
    with pytest.raises(UserError, match="good is there twice"):
        runner.read_manifest(small / "m.json")


@pytest.mark.parametrize("flags", ("--steps 0 --dry-run", "--jobs 0"))
def test_numbers_that_cannot_be_are_refused(small, flags):
    result = manifest_command(small, flags)
    assert result.returncode == 1 and "must be at least 1" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("flag", ("--seed 3", "--out-dir elsewhere", "--data other.txt"))
def test_flags_that_runs_are_named_by_are_refused(small, flag):
    """They would be ignored, or all runs be another one than its folder says."""
    result = manifest_command(small, f"--dry-run -- {flag}")
    assert result.returncode == 1 and result.stderr.startswith(f"error: {flag.split()[0]} after --"), result.stderr
    assert result.stderr.count("\n") == 1


def test_settings_of_every_run(small):
    """As settings, or as flags: the command is one that the trainer takes. A seed that is named twice is one run."""
    for flags in ("--set micro_batch=auto rope=false null_attn=true lr=2e-3",
                  "-- --micro-batch auto --no-rope --null-attn --lr 2e-3"):
        result = manifest_command(small, f"--dry-run --only s/good --seeds 5 5 {flags}")
        assert "1 of 1 runs are to be made" in result.stdout, result
        given = parse_args(shlex.split(re.search(r"train_dba.py (.*)", result.stdout)[1]))
        assert {**given, "micro_batch": 0, "rope": False, "null_attn": True, "lr": 2e-3, "seed": 5} == given
    assert "unrecognized arguments: --bogus=1" in manifest_command(small, "--set bogus=1 --dry-run").stderr


def test_a_rate_that_a_run_is_named_by_is_refused(small):
    manifest = json.loads((small / "m.json").read_text())
    manifest["g"]["sets"]["s"]["lrs"] = [0.1, 0.2]
    (small / "m.json").write_text(json.dumps(manifest))
    result = manifest_command(small, "--dry-run --only s/other -- --lr 0.3")
    assert result.returncode == 1 and result.stderr.startswith("error: --lr after --"), result.stderr


def test_where_no_run_can_be_kept(small):
    result = manifest_command(small, "--only s/good --runs text.txt")
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("error: can't write text.txt/g/s/good")
    assert "Traceback" not in result.stderr


def test_a_log_that_is_none_tells_of_no_tokens(small):
    (small / "runs/g/s/good_s1").mkdir(parents=True)
    for text in (b"\xff\n", b"5\n", b'{"type": "meta"}\n{"tok'):
        (small / "runs/g/s/good_s1/train.jsonl").write_bytes(text)
        result = manifest_command(small, "--dry-run --only s/good")
        assert result.returncode == 0 and "1 of 1 runs are to be made" in result.stdout


def test_a_dry_run_of_any_length(small):
    result = manifest_command(small, "--dry-run --steps 1000000000000000")
    assert result.returncode == 0, result.stderr


def test_what_follows_a_run(small):
    """Measurements of its checkpoint, in the formats that its mode has; a run without a checkpoint is left alone."""
    result = manifest_command(small, "--only s/good s/other --post-ppl --post-mem128k")
    assert result.returncode == 0, result.stderr
    measured = {path.relative_to(small / "runs").as_posix() for path in (small / "runs").rglob("*.json")}
    for name, caches in (("good", ("fp16", "q8_0", "q4_0", "q4_0_rotated")),
                         ("other", ("fp16", "q8_0", "q4_0", "q4_0_rotated", "hetero", "k_sem=q4_0,k_geo=fp16,v=fp16",
                                    "k_sem=fp16,k_geo=q4_0,v=fp16", "k_sem=fp16,k_geo=fp16,v=q4_0"))):
        read = {path for path in measured if path.startswith(f"g/s/{name}_s1/")}
        assert read - {f"g/s/{name}_s1/{kept}.json" for kept in ("resolved_config", "env")} == {
            f"g/s/{name}_s1/mem128k.json", *(f"g/s/{name}_s1/eval_ppl_{cache}.json" for cache in caches)}
    for path in (small / "runs").rglob("*.pt"):
        path.unlink()
    again = manifest_command(small, "--only s/good s/other --post-ppl")
    assert again.returncode == 0 and "2 of them are logs without a checkpoint" in again.stdout


def test_dry_run_needs_no_data(small):
    (small / "text.txt").unlink()
    result = manifest_command(small, "--dry-run")
    assert result.returncode == 0 and "3 of 3 runs are to be made" in result.stdout and "memory" not in result.stdout
    for dtype in ("float32", "bfloat16"):                  # of the runs, not of the device
        said = manifest_command(small, f"--dry-run -- --dtype {dtype}").stdout
        assert said.count(f"TFLOP/s in {dtype}") == 1 and " 0 TFLOP/s" not in said
    assert not (small / "runs").exists()
    assert manifest_command(small, "").returncode == 1
    wrong = manifest_command(small, "--only nothing")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1


def test_dry_run_marks_what_is_finished(small):
    assert manifest_command(small, "--only s/good").returncode == 0
    said = manifest_command(small, "--dry-run --only s/good s/other").stdout
    rows = {line.split()[0]: line.split()[1:3] for line in said.splitlines() if line.startswith("  ")}
    assert rows["good"] == ["1", "all"] and rows["other"] == ["1", "0"]
    assert "1 of 2 runs are to be made" in said


def test_dry_run_for_a_gpu(small, tmp_path):
    """What `make launch_1b` says: the memory of training by formula, the time at a share of the peak that was measured,
    the command."""
    manifest = ["--manifest", str(ROOT / "paper_manifest.json")]
    said = {}
    for gpu in ("h100", "a100"):
        flags = f"--dry-run --for {gpu} -- --compile --micro-batch 8"
        command = [sys.executable, str(ROOT / "run_paper_manifest.py"), *manifest, "--group", "a100_1b", "--only",
                   "modes/baseline_s", *flags.split()]
        said[gpu] = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert "--exp paper_baseline" in said[gpu] and "measured on NVIDIA" in said[gpu] and "655M" in said[gpu]
        cfg = make_config(data="-", exp="paper_baseline", batch_size=8, grad_accum=4, compile=True)
        assert f" {training_memory(cfg, 50_257)['peak'] / 2**30:.1f} GiB " in said[gpu]
    times = [float(re.search(r"([\d.]+) h$", text.strip())[1]) for text in said.values()]
    assert times[1] / times[0] == pytest.approx(989 / 312, rel=0.05)
    refused = manifest_command(small, "--for h100")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and "--dry-run" in refused.stderr


@pytest.mark.parametrize(("n", "text"), [(0, "0"), (999, "999"), (1000, "1.00k"), (999_600, "1.00M"),
                                         (655_360_000, "655M"), (20_000_000_000, "20.0B"), (2 * 10**12, "2.00T"),
                                         (2 * 10**15, "2.00e+03T")])
def test_counts_in_three_digits(n, text):
    assert runner.short(n) == text
