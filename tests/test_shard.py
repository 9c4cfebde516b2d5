"""--shard and --activation-checkpointing, two processes on one CPU: the curve of one process, and its checkpoints."""

import re
from pathlib import Path

import pytest
import torch

import train_dba
from helpers import TRAIN, TRAINER, assert_done, assert_error, call, finish, losses, make_text, read_log, start
from test_ddp import TORCHRUN

# An odd --d-ff: the ranks' parts of a matrix are not of one size.
RUN = (f"{TRAIN} --d-model 64 --layers 2 --d-ff 129 --block 32 --attn-mode decoupled --tie-qk --null-attn "
       "--learned-temp --lr 1e-3 --grad-accum 2 --micro-batch 2 --grad-clip 0.5 --eval-every 8 --eval-iters 3 "
       "--save-every 4")
SCRIPT = """
import os, signal, sys
sys.path.insert(0, {path!r})
import torch
import train_dba
{before}
train_dba.leave(train_dba.main())
"""


def script(folder, before):
    """A program that changes the trainer before it runs it."""
    path = folder / "changed.py"
    path.write_text(SCRIPT.format(path=str(Path(TRAINER).parent), before=before))
    return path


def ranks(count, args, cwd, program=TRAINER, options=()):
    return finish(start(args, cwd, [*TORCHRUN, str(count), *options, str(program)]), timeout=400)


def assert_curve(folder, other, steps, loss=1e-5, norm=1e-4):
    """The first steps of both runs have the same losses and gradient norms, within a relative error."""
    expected, seen = ([line for line in losses(path) if line["step"] <= steps] for path in (folder, other))
    assert [(line["type"], line["step"]) for line in expected] == [(line["type"], line["step"]) for line in seen]
    assert sum(line["type"] == "train" for line in seen) == steps
    for a, b in zip(expected, seen):
        limits = {"grad_norm": norm, "loss": loss, "val_loss": loss, "best_val_loss": loss}
        for key in limits.keys() & a.keys():
            assert b[key] == pytest.approx(a[key], rel=limits[key]), (a, b)


# What two ranks do one after the other, each with a store of its own, so that torchrun starts once: flags after RUN,
# and what else holds.
RUNS = {
    "half": dict(flags="--steps 3", rank_1="--shard"),
    "both": dict(flags="--steps 32 --shard --activation-checkpointing --compile", backend="aot_eager"),
    "bf16_sharded": dict(flags="--steps 10 --shard --dtype bfloat16", watched=True),
    "turns 1": dict(flags="--steps 8 --shard"),
    "turns 2": dict(flags="--steps 16 --activation-checkpointing", alone=True),
    "turns 3": dict(flags="--steps 24 --shard --activation-checkpointing"),
    "turns 4": dict(flags="--steps 32"),
}
WATCHED = """
def say(*words):                                           # at once: print writes a line in parts, and ranks mix them
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
shard_model, rms_norm, seen = train_dba.shard_model, torch.nn.functional.rms_norm, set()
def watched(model, *args):
    model = shard_model(model, *args)
    up = model.blocks[0].mlp.up
    up.register_forward_hook(lambda *_: seen.add(f"gathered {up.weight.dtype} {model.embed.weight.dtype}"))
    whole, own = (sum(p.numel() for p in parts) for parts in (model.parameters(), [
        p.to_local() for p in model.parameters()]))
    say(f"{up.weight.device_mesh.shape} {up.weight.placements} {own / whole:.2f}")
    return model
def watched_norm(x, shape, weight, eps):
    seen.add(f"norm {x.dtype} {weight.dtype}")
    return rms_norm(x, shape, weight, eps)
"""
WATCH = "train_dba.shard_model, torch.nn.functional.rms_norm = watched, watched_norm\n"
SEQUENCE = """
compile_with, environment, rank = torch.compile, dict(os.environ), os.environ["RANK"]
for number, (name, run) in enumerate({runs!r}.items()):
    os.environ.clear()
    os.environ.update(environment, TORCHELASTIC_RESTART_COUNT=str(number))      # by which ranks find each other
    if run.get("alone"):
        if rank == "1":
            continue                                       # it waits for rank 0 at the start of the next run
        del os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]
    backend = run.get("backend", "inductor")
    torch.compile = lambda function, backend=backend, **how: compile_with(function, backend=backend, **how)
    train_dba.shard_model, torch.nn.functional.rms_norm = shard_model, rms_norm
    if run.get("watched"):
        train_dba.shard_model, torch.nn.functional.rms_norm = watched, watched_norm
    flags = f"{common} --out-dir {{name.split()[0]}} " + run["flags"] + " " + run.get("rank_" + rank, "")
    say("exit code of", name, train_dba.main(flags.split()))
say("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])
say("seen:", sorted(seen))
train_dba.leave(0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run folders: of one process, of two after each other in one process each, and what those printed."""
    folder = tmp_path_factory.mktemp("shard")
    make_text(folder)
    assert_done(call(f"{RUN} --steps 32 --out-dir one", folder))
    result = ranks(2, "", folder, script(folder, WATCHED + SEQUENCE.format(runs=RUNS, common=RUN)))
    assert_done(result)
    (folder / "printed").write_text(result.stdout)
    (folder / "errors").write_text(result.stderr)
    return folder


def printed(folder):
    return (folder / "printed").read_text()


def test_each_run_ended_as_it_should(folder):
    for name, run in RUNS.items():
        code, times = (1 if name == "half" else 0), (1 if run.get("alone") else 2)
        assert printed(folder).count(f"exit code of {name} {code}\n") == times, printed(folder)


def test_ranks_that_do_not_all_shard_are_refused(folder):
    assert not (folder / "half").exists()
    errors = (folder / "errors").read_text()
    assert re.search(r"(?m)^error: the ranks don't see the same run \(shard False and of 1 x 2\)", errors)


def test_sharded_checkpointed_and_compiled_runs_follow_the_curve_of_one_rank(folder):
    """Compiled without Inductor's kernels, which would take a minute."""
    assert min(map(int, re.findall(r"graphs: (\d+)", printed(folder)))) >= 2
    assert_curve(folder / "one", folder / "both", 32)


def same_tensors(expected, seen):
    assert expected.keys() == seen.keys()
    for name, a in expected.items():
        assert type(seen[name]) is torch.Tensor and seen[name].dtype == a.dtype
        torch.testing.assert_close(seen[name], a, atol=1e-4, rtol=0, msg=name)


def test_runs_go_on_in_all_orders_of_ranks(folder):
    """Two ranks, sharded, one, two, sharded, two, not sharded: one plain last.pt, which each of them can read."""
    log = read_log(folder / "turns")
    shards = [(line["config"]["shard"], line["env"]["ranks"]) for line in log if line["type"] == "resume_meta"]
    assert log[0]["config"]["shard"] and shards == [(False, 1), (True, 2), (False, 2)]
    assert_curve(folder / "one", folder / "turns", 32)
    one, turns = (train_dba.load_checkpoint(folder / name / "last.pt") for name in ("one", "turns"))
    same_tensors(one["model"], turns["model"])
    for i, state in one["optimizer"]["state"].items():
        same_tensors(state, turns["optimizer"]["state"][i])
    assert one["rng"] == turns["rng"]


def test_one_process_samples_from_a_sharded_run(folder):
    assert_done(call("--mode sample --ckpt both --prompt a --temperature 0 --max-new-tokens 3", folder))


def test_blocks_are_gathered_in_bfloat16_and_norms_are_float32(folder):
    assert_done(call(f"{RUN} --dtype bfloat16 --steps 10 --out-dir bf16", folder))
    assert printed(folder).count("(2,) (Shard(dim=0),) 0.50") == 2
    seen = "seen: ['gathered torch.bfloat16 torch.float32', 'norm torch.float32 torch.float32']"
    assert printed(folder).count(seen) == 2, printed(folder)
    assert_curve(folder / "bf16", folder / "bf16_sharded", 10, loss=5e-4, norm=5e-3)
    model = train_dba.load_checkpoint(folder / "bf16_sharded/last.pt")["model"]
    assert {tensor.dtype for tensor in model.values()} == {torch.float32}


def test_nodes_hold_copies_of_what_their_ranks_share(folder, tmp_path):
    """Four ranks that take themselves for two nodes of two."""
    program = script(tmp_path, 'os.environ["LOCAL_WORLD_SIZE"] = "2"' + WATCHED + WATCH)
    result = ranks(4, f"{RUN} --steps 8 --shard --out-dir nodes", folder, program)
    assert_done(result)
    assert result.stdout.count("(2, 2) (Replicate(), Shard(dim=0)) 0.50") == 4, result.stdout
    assert_curve(folder / "one", folder / "nodes", 8)
    assert (folder / "nodes/command.txt").read_text().startswith(
        'torchrun --nproc-per-node 2 --nnodes 2 --rdzv-backend c10d --rdzv-endpoint "$HEAD" train_dba.py --data ')


KILLED = """
draw, drawn = train_dba.sample_batch, []
def killing(*args):
    drawn.append(1)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(drawn) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(*args)
train_dba.sample_batch = killing
"""


def test_torchrun_starts_again_after_a_kill(folder, tmp_path):
    program = script(tmp_path, KILLED)
    assert_done(ranks(2, f"{RUN} --steps 12 --shard --out-dir again", folder, program, ["--max-restarts", "1"]))
    log = read_log(folder / "again")
    assert [line["step"] for line in log if line["type"] == "resume_meta"] == [4]
    assert log[-1]["type"] == "done"
    assert_curve(folder / "one", folder / "again", 11)


def test_a_rank_ends_before_python_shuts_down(folder, tmp_path):
    """Where gloo's threads may abort it."""
    program = script(tmp_path, "import atexit\natexit.register(os._exit, 3)")
    assert_done(ranks(2, f"{RUN} --steps 2 --shard --out-dir left", folder, program))


def test_shard_needs_ranks(folder):
    assert_error(call(f"{RUN} --steps 3 --shard --out-dir alone", folder), "--shard", "torchrun")
    assert not (folder / "alone").exists()


def test_activation_checkpointing_keeps_less_and_changes_nothing():
    """Dropout too: a block that runs again has the masks of the first time."""
    results, kept = [], []
    for switch in (False, True):
        torch.manual_seed(0)
        cfg = train_dba.make_config(data="x", size="tiny", activation_checkpointing=switch, dropout=0.2)
        model, x = train_dba.GPT(cfg, 256).init_weights(), torch.arange(64)[None]
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            loss = model(x, x)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
        kept.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert kept[1] < kept[0] / 4
