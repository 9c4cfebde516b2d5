"""Damage every kind of file that a script of this project reads, in many ways, and judge what the script does then.

    python tests/fuzz.py --seed 7 --variants 2000          # longer than the test does
    python tests/fuzz.py --seed 7 --only sidecar:12        # one variant again
    python tests/fuzz.py --list                            # the table: case, file, command

A damaged file ends in exit 0 with right output, or in a non-zero exit with one line `error: ...`: never in a
traceback, in more than 60 s of CPU time or 2 GiB of memory, or in harm to what was saved before. What "right" is, a
case says by its rule: the `same` as with whole files, or `sane`, that is, it can be read and has finite numbers.

Importing torch takes seconds, so that one process imports the scripts, stays single-threaded, and forks a child per
variant. The child damages its copy of the world (small data, a run folder, results, made by the scripts themselves),
limits itself, and calls the script's main(). The scripts are imported from a copy too, since claims, manifest and
probes lie beside them.
"""

import argparse
import contextlib
import fnmatch
import gc
import hashlib
import importlib
import importlib.util
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import mutations

REPO = Path(__file__).resolve().parent.parent
SEED = 10
VARIANTS = 320
CPU_SECONDS = 60
WALL_SECONDS = 600                                         # only what waits without end takes as long
MEMORY_BYTES = 2 << 30                                     # beyond what the warm process has
ERROR_LENGTH = 2000                                        # longest error line, in characters
# One thread, as a fork keeps the locks of others (pyarrow's jemalloc starts one); no window; no kernel is compiled.
ENVIRONMENT = dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", MPLBACKEND="agg",
                   CXX="no-compiler", JE_ARROW_MALLOC_CONF="background_thread:false")
SCRIPTS = ("train_dba", "eval_dba", "prepare_fineweb", "run_paper_manifest", "plot_results", "plot_memory",
           "vis_heatmap")
LM_EVAL = ("lm_eval",)
LLAMA = ("transformers", "accelerate", "gguf", "safetensors", "tokenizers")

# -----------------------------------------------------------------------------
# The table: what is damaged, and what reads it


@dataclass(frozen=True)
class Command:
    """A command line. product: what a success is judged by, see PRODUCTS; writes: patterns of files that it may
    replace."""
    script: str
    line: str
    product: str
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One kind of file and one command that reads it.

    file: where it lies in the world; beside:NAME is a file beside the scripts, {plots} a run folder below plots
    format: a key of mutations.FORMATS
    rule: same or sane
    share: of the variants, relative to other cases
    needs: packages without which the case is skipped
    """
    name: str
    file: str
    format: str
    command: Command
    rule: str = "sane"
    share: float = 1.0
    needs: tuple[str, ...] = ()


RUN, DATA = "runs/own_s1337", "data/tokens.npy"
BEST, LAST = f"{RUN}/best.pt", f"{RUN}/last.pt"
TRAIN = ("--d-model 32 --layers 1 --n-head 2 --d-ff 32 --block 16 --attn-mode decoupled --sem-dim 8 --geo-dim 8 "
         "--null-attn --tie-qk --batch-size 2 --dtype float32 --device cpu --log-every 1 --save-every 2 --eval-every 2 "
         "--eval-iters 2")
CPU = f"--ckpt {BEST} --device cpu"
PREPARE = "--workers 1 --val-frac 0.2"
PPL = "ppl --device cpu --max-tokens 65 --block 16 --batch-size 4"
PROBES = f"probes {CPU} --instances 1 --max-new-tokens 1 --batch-size 64"
TASKS = f"tasks {CPU} --tasks boolq --tasks-dir tasks --out out"
SAMPLE = f"--mode sample {CPU} --dtype float32 --prompt 'a stone' --max-new-tokens 4 --temperature 0"

WORLD = (                                                  # what makes it
    ("prepare_fineweb", f"--dataset text --input corpus.jsonl --tokenizer word --output {DATA} {PREPARE}"),
    ("train_dba", f"--data {DATA} --out-dir {RUN} {TRAIN} --steps 4"),
    ("eval_dba", f"{PPL} --ckpt {BEST}"),
    ("eval_dba", PROBES),
    ("eval_dba", f"policy {CPU} --max-delta-nll 9 --max-kl 9 --max-tokens 64 --kernel-tokens 64"),
)

START = Command("train_dba", f"--data {DATA} --out-dir out {TRAIN} --steps 2", "losses out")
RESUME = Command("train_dba", f"--data {DATA} --out-dir {RUN} {TRAIN} --steps 5", f"losses {RUN}", (f"{RUN}/*",))
START_TEXT = Command("train_dba", f"--data corpus.txt --tokenizer word --out-dir out {TRAIN} --steps 2", "losses out")
CONTINUE = Command("train_dba", SAMPLE, "stdout")
CONTINUE_AUTO = Command("train_dba", f"{SAMPLE} --kv-cache auto", "stdout")
MEASURE = Command("eval_dba", f"{PPL} --ckpt {BEST} --out out", "loss out/eval_ppl_fp16.json")
MEASURE_DATA = Command("eval_dba", f"{PPL} --ckpt {BEST} --data {DATA} --out out", "loss out/eval_ppl_fp16.json")
MEASURE_TEXT = Command("eval_dba", f"{PPL} --ckpt {BEST} --data corpus.txt --out out", "loss out/eval_ppl_fp16.json")
MEASURE_GGUF, MEASURE_LLAMA = (
    Command("eval_dba", f"{PPL} --ckpt llama/{path} --data corpus.txt --out out", "loss out/eval_ppl_fp16.json")
    for path in ("tiny.gguf", "folder"))
PROBE = Command("eval_dba", f"{PROBES} --out out", "json out/eval_probes.json")
PROBE_COMPARE = Command("eval_dba", f"{PROBES} --compare {RUN}/eval_probes.json --out out", "json out/eval_probes.json")
TASK = Command("eval_dba", TASKS, "json out/eval_tasks.json")
TASK_COMPARE = Command("eval_dba", f"{TASKS} --compare tasks/eval_tasks.json", "json out/eval_tasks.json")
RANK = Command("eval_dba", f"rank {CPU} --block 16 --out out", "json out/eval_rank.json")
MEMORY = Command("plot_memory", f"{CPU} --tokens 64 --out out", "json out/mem64.json")
HEATMAP = Command("vis_heatmap", f"{CPU} --prompt-file prompt.txt --layers 0 --out out", "json out/heatmap.json")
PLOT = Command("plot_results", "--runs plots --out out --readme ''", "json out/results.json")
JUDGE = Command("plot_results", "--runs ledger --out out --readme ''", "json out/results.json")
DRY_RUN = Command("run_paper_manifest", "--manifest manifest.json --group cpu_mini --seeds 1 --device cpu "
                  "--dry-run", "stdout")
TOKENISE = Command("prepare_fineweb", "--dataset text --input corpus.txt --tokenizer byte --output out/t.npy "
                   f"{PREPARE}", "tokens out/t")
TOKENISE_LINES = Command("prepare_fineweb", "--dataset text --input corpus.jsonl --tokenizer byte --output out/t.npy "
                         f"{PREPARE}", "tokens out/t")
TOKENISE_WIKI = Command("prepare_fineweb", "--dataset wikitext2 --input wiki --output out/t.npy --workers 1",
                        "tokens out/t")
GO_ON = Command("prepare_fineweb", f"--dataset text --input long.jsonl --tokenizer word --output journal/long.npy "
                f"{PREPARE}", "tokens journal/long", ("journal/*",))
AGAIN = Command(*WORLD[0], "tokens data/tokens")           # finished already

EVALS = ("eval_ppl_fp16", "eval_probes", "eval_rank", "eval_latency", "eval_memory", "eval_sweep", "eval_tasks",
         "kv_policy")
BENCHMARKS = ("train_speed", "decode_speed", "cache_quality", "task_parity", "long_context", "loss_memory",
              "tokenize_speed")
CASES = (
    Case("last.pt, bytes", LAST, "bytes", RESUME, "same", 2),
    Case("last.pt, content", LAST, "last checkpoint", RESUME, "sane", 4),
    Case("best.pt, bytes", BEST, "bytes", CONTINUE, "same", 1.5),
    Case("best.pt, bytes, ppl", BEST, "bytes", MEASURE, "same"),
    Case("best.pt, content", BEST, "checkpoint", CONTINUE, "sane", 3),
    Case("best.pt, content, ppl", BEST, "checkpoint", MEASURE, "sane", 2),
    Case("best.pt, content, rank", BEST, "checkpoint", RANK),
    Case("best.pt, content, heatmap", BEST, "checkpoint", HEATMAP),
    Case("best.pt, content, memory", BEST, "checkpoint", MEMORY),
    Case("tokens.npy", DATA, "npy", START, "same", 3),
    Case("tokens.npy, resume", DATA, "npy", RESUME, "same", 1.5),
    Case("tokens.npy, ppl", DATA, "npy", MEASURE_DATA, "same", 1.5),
    Case("validation .npy, resume", "data/tokens.val.npy", "npy", RESUME, "same", 1.5),
    Case("validation .npy, ppl", "data/tokens.val.npy", "npy", MEASURE, "same"),
    Case("sidecar", "data/tokens.json", "json", START, "sane", 2),
    Case("sidecar, ppl", "data/tokens.json", "json", MEASURE_DATA, "same"),
    Case("sidecar, finished", "data/tokens.json", "json", AGAIN, "sane", 0.6),
    Case("validation sidecar", "data/tokens.val.json", "json", START),
    Case("vocabulary", "data/tokens.vocab.json", "json", START, "sane", 1.5),
    Case("vocabulary, resume", "data/tokens.vocab.json", "json", RESUME, "same"),
    Case("vocabulary, ppl", "data/tokens.vocab.json", "json", MEASURE_DATA, "same"),
    Case("text", "corpus.txt", "text", START_TEXT, "sane", 1.5),
    Case("text, ppl", "corpus.txt", "text", MEASURE_TEXT),
    Case("text, prepare", "corpus.txt", "text", TOKENISE, "sane", 1.5),
    Case("wikitext", "wiki/wiki.train.tokens", "text", TOKENISE_WIKI),
    Case("prompt file", "prompt.txt", "text", HEATMAP, "sane", 0.6),
    Case(".jsonl", "corpus.jsonl", "jsonl", TOKENISE_LINES, "sane", 1.5),
    Case("journal", "journal/long.npy.part.json", "json", GO_ON, "same", 2),
    Case("part", "journal/long.npy.part", "bytes", GO_ON, "sane", 0.6),
    Case("words of a part", "journal/long.words.part", "text", GO_ON, "sane", 0.6),
    Case("train.jsonl", f"{RUN}/train.jsonl", "jsonl", RESUME, "sane", 2),
    Case("kv_policy.json", f"{RUN}/kv_policy.json", "json", CONTINUE_AUTO, "sane", 2),
    Case("probes --compare", f"{RUN}/eval_probes.json", "json", PROBE_COMPARE, "sane", 1.5),
    Case("probes.json", "beside:probes.json", "json", PROBE, "sane", 1.5),
    Case("manifest", "manifest.json", "json", DRY_RUN),
    Case("manifest, plots", "beside:paper_manifest.json", "json", JUDGE, "sane", 0.6),
    Case("claims.json", "beside:claims.json", "json", JUDGE),
    Case("train.jsonl, plots", "plots/{plots}/train.jsonl", "jsonl", PLOT),
    Case("env.json, plots", "plots/{plots}/env.json", "json", PLOT, "sane", 0.6),
    *(Case(f"{name}, plots", f"plots/{{plots}}/{name}.json", "json", PLOT, "sane", 0.3) for name in EVALS),
    *(Case(f"bench {name}, plots", f"plots/bench/{name}.json", "json", PLOT, "sane", 0.3) for name in BENCHMARKS),
    Case("tasks, items", "tasks/boolq_valid.jsonl", "jsonl", TASK, "sane", 1, LM_EVAL),
    Case("tasks --compare", "tasks/eval_tasks.json", "json", TASK_COMPARE, "sane", 1, LM_EVAL),
    Case(".gguf", "llama/tiny.gguf", "gguf", MEASURE_GGUF, "sane", 1.5, LLAMA),
    Case("Llama, config.json", "llama/folder/config.json", "json", MEASURE_LLAMA, "sane", 2, LLAMA),
    Case("Llama, tokenizer.json", "llama/folder/tokenizer.json", "json", MEASURE_LLAMA, "sane", 1, LLAMA),
    Case("Llama, safetensors", "llama/folder/model.safetensors", "safetensors", MEASURE_LLAMA, "sane", 1.5, LLAMA),
)

# -----------------------------------------------------------------------------
# What a success is judged by: functions of (folder, standard output) that raise ValueError where it makes no sense


def read_strict(path):
    """A JSON file that other programs can read: no NaN, no infinity."""
    def refuse(name):
        raise ValueError(f"{path.name} holds {name}")

    def finite(text):
        if not math.isfinite(number := float(text)):
            raise ValueError(f"{path.name} holds {text}")
        return number

    return json.loads(path.read_bytes(), parse_constant=refuse, parse_float=finite)


def losses(folder, _output, run):
    """Steps and losses of a log."""
    lines = (folder / run / "train.jsonl").read_bytes().splitlines()
    keys = ("type", "step", "loss", "val_loss")
    log = [{key: line[key] for key in keys if key in line} for line in map(json.loads, lines)
           if line["type"] in ("train", "eval")]
    values = [line[key] for line in log for key in ("loss", "val_loss") if key in line]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError("train.jsonl has no losses, or a loss that is no number")
    return log


def whole_json(folder, _output, name):
    return read_strict(folder / name)


def loss(folder, _output, name):
    result = read_strict(folder / name)
    return [result["loss"], result["tokens"]]


def tokens(folder, _output, name):
    """Hashes of the token files, which must be as long and hold what their sidecars say."""
    made = {}
    for part in ("", ".val"):
        path = folder / f"{name}{part}.npy"
        if part and not path.exists():
            continue
        sidecar, ids = read_strict(folder / f"{name}{part}.json"), np.load(path)
        made[part] = hashlib.sha256(path.read_bytes()).hexdigest()
        promised = (sidecar["tokens"],), sidecar["sha256"]
        if promised != (ids.shape, made[part]) or ids.max(initial=0) >= sidecar["vocab_size"]:
            raise ValueError(f"{path.name} is not what its sidecar says")
    return made


def stdout(_folder, output):
    """Standard output less times and rates, which differ."""
    if not output.strip() or re.search(r"\b(nan|inf)\b", output):
        raise ValueError("printed nothing, or a number that is none")
    return re.sub(r"[\d.]+ (min|h|TFLOP/s)", r"\1", output)


PRODUCTS = {"losses": losses, "json": whole_json, "loss": loss, "tokens": tokens, "stdout": stdout}


def product_of(command, folder, output):
    """Product of a command that has ended with 0."""
    kind, *arguments = command.product.split(" ")
    return PRODUCTS[kind](folder, output, *arguments)


# -----------------------------------------------------------------------------
# Processes


@dataclass
class Result:
    """How a child ended. code: exit code, or minus a signal's number; said: what the mutator did; seconds: CPU time."""
    code: int
    stdout: str
    stderr: str
    said: str = ""
    hung: bool = False
    seconds: float = 0.0


BROKEN_HARNESS = "the harness failed:"


def import_scripts(code):
    """Import the scripts from the folder `code`, and set what makes small worlds possible."""
    sys.path.insert(0, str(code))
    for name in SCRIPTS:
        importlib.import_module(name)
    prepare = sys.modules["prepare_fineweb"]
    assert hasattr(prepare, "BATCH_CHARS") and hasattr(prepare, "JOURNAL_SECONDS")
    prepare.BATCH_CHARS, prepare.JOURNAL_SECONDS = 600, 0.0           # a journal after every few documents
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({"savefig.dpi": 20, "figure.dpi": 20})
    Figure.get_layout_engine = lambda figure: None         # layout draws everything thrice


def limit():
    """Of this process and its children: CPU time and memory."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def call(script, line):
    """Exit code of a script's main(), with what the interpreter would print of an exception."""
    try:
        code = sys.modules[script].main(shlex.split(line))
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    return code or 0


def module_files():
    """Names of imported modules that are files."""
    specs = {name: getattr(module, "__spec__", None) for name, module in list(sys.modules.items())}
    return sorted(name for name, spec in specs.items() if spec and str(spec.origin).endswith((".py", ".so")))


def fork(folder, work):
    """Start work(note) in a child whose directory is `folder` and whose output goes to files beside it; returns its
    pid. note(text) leaves a text for the parent; work returns the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(f"{folder}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        os.chdir(folder)
        code = work(Path(f"{folder}.note").write_text)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:                                  # of the harness itself; it must not go on as the parent
        os.write(2, f"{BROKEN_HARNESS} {traceback.format_exc()}".encode())
    finally:
        os._exit(code)


def finished(pid, folder, since):
    """Result of a child, or None while it runs."""
    done, status, usage = os.wait4(pid, os.WNOHANG)
    hung = not done and time.monotonic() - since > WALL_SECONDS
    if not done and not hung:
        return None
    with contextlib.suppress(ProcessLookupError):          # and what it started
        os.killpg(pid, signal.SIGKILL)
    if hung:
        os.waitpid(pid, 0)
    paths = [Path(f"{folder}{suffix}") for suffix in (".out", ".err", ".note")]
    texts = [path.read_text(errors="replace") if path.exists() else "" for path in paths]
    code = -signal.SIGKILL if hung else os.waitstatus_to_exitcode(status)
    if BROKEN_HARNESS in texts[1]:
        raise RuntimeError(f"{folder}: {texts[1]}")
    return Result(code, *texts, hung, usage.ru_utime + usage.ru_stime)


def wait(pid, folder):
    since = time.monotonic()
    while (result := finished(pid, folder, since)) is None:
        time.sleep(0.005)
    return result


def learn(folder, script, line):
    """Run a command on whole files, and import here what it imported there, so that later children find it."""
    def work(note):
        before = set(module_files())
        code = call(script, line)
        note(json.dumps([name for name in module_files() if name not in before]))
        return code

    result = wait(fork(folder, work), folder)
    if result.code != 0:
        raise RuntimeError(f"{script} {line} fails on whole files: {result}")
    for name in json.loads(result.said):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread was started: forks would keep its locks"
    return result


# -----------------------------------------------------------------------------
# Making the world


def make_corpus(folder):
    rng = random.Random(0)
    words = [a + b for a in ("sto", "ri", "bir", "moo", "gra", "lea") for b in ("ne", "ver", "d", "n", "ss", "f")]
    documents = [" ".join(rng.choice(words) for _ in range(30)) + " a naïve stone .\n" for _ in range(60)]
    (folder / "corpus.txt").write_text("".join(documents))
    rows = [json.dumps(dict(text=text, id=i)) for i, text in enumerate(documents)]
    mutations.write_lines(folder / "corpus.jsonl", rows)
    shutil.copy(folder / "corpus.jsonl", folder / "long.jsonl")
    (folder / "prompt.txt").write_text("a stone a bird")
    (folder / "wiki").mkdir()
    for split in ("train", "valid", "test"):
        text = "".join(f" \n = Title {i} = \n \n {text} \n" for i, text in enumerate(documents[:20]))
        (folder / f"wiki/wiki.{split}.tokens").write_text(text)


def copy_results(folder):
    """From the repository's own runs, what figures need: as plots/ the run folder with most results and the benchmarks,
    as ledger/ two runs of the manifest, without which no claim is judged. Returns the run folder's path below plots."""
    sweep = next(REPO.glob("runs/**/eval_sweep.json")).parent
    names = [path.name for path in sweep.iterdir() if path.is_file() and path.suffix != ".pt"]
    plots = sweep.relative_to(REPO / "runs")
    (folder / "plots" / plots).mkdir(parents=True)
    for name in names:
        shutil.copy(sweep / name, folder / "plots" / plots / name)
    shutil.copytree(REPO / "runs/bench", folder / "plots/bench")
    for run in ("standard192_s1337", "decoupled24_48_s1337"):
        shutil.copytree(REPO / "runs/cpu_mini/modes" / run, folder / "ledger/cpu_mini/modes" / run)
    return str(plots)


def interrupt(folder):
    """Data preparation that stops in the middle: its files may not grow past a limit."""
    def work(note):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        return call(GO_ON.script, GO_ON.line)

    result = wait(fork(folder, work), folder)
    journal = json.loads((folder / "journal/long.npy.part.json").read_text())
    assert result.code == 1 and 0 < journal["read"] < 60, result
    for name, part in journal["parts"].items():            # what is beyond may be cut
        for suffix, length in zip(("npy", "words"), part["bytes"]):
            os.truncate(folder / f"journal/long{name}.{suffix}.part", length)


def make_llamas(folder):
    import llamas  # imports what only some environments have
    llama = llamas.save_llama(folder / "llama/folder")
    llamas.write_gguf(folder / "llama/tiny.gguf", llama, llamas.byte_level())
    return 0


def make_world(folder, with_llamas, with_tasks):
    """The files that all cases begin with; returns the run folder below plots."""
    folder.mkdir()
    make_corpus(folder)
    for script, line in WORLD:
        learn(folder, script, line)
    interrupt(folder)
    shutil.copy(REPO / "paper_manifest.json", folder / "manifest.json")
    plots = copy_results(folder)
    if with_llamas:
        (folder / "llama").mkdir()
        result = wait(fork(folder, lambda note: make_llamas(folder)), folder)
        assert result.code == 0, result
    if with_tasks:
        (folder / "tasks").mkdir()
        items = [dict(passage=f"a stone {i}", question="is it", label=i % 2) for i in range(4)]
        mutations.write_lines(folder / "tasks/boolq_valid.jsonl", [json.dumps(item) for item in items])
        learn(folder, TASK.script, TASK.line)
        (folder / "out/eval_tasks.json").rename(folder / "tasks/eval_tasks.json")
        shutil.rmtree(folder / "out")
    return plots


def copy_code(folder):
    """The scripts and what lies beside them."""
    left_out = shutil.ignore_patterns(".*", "runs", "data", "assets", "tests", "tmp", "docs", "__pycache__")
    shutil.copytree(REPO, folder, ignore=left_out)


def content(path):
    """Bytes of a file; of a large one only its size."""
    return path.read_bytes() if path.stat().st_size < 1 << 26 else path.stat().st_size


def snapshot(folder):
    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*") if path.is_file()}


# -----------------------------------------------------------------------------
# Judging

# A run that fails later may have begun these anew.
LOGS = ("command.txt", "env.json", "resolved_config.json", "train.jsonl")


def said_lines(text):
    """Lines of a standard error, less the states of progress bars."""
    return [line for line in re.split(r"[\r\n]", text) if line.strip() and not re.search(r"[a-z]/s\b|\?tok", line)]


def misbehaviour(result):
    """What is wrong with the way a command ended, or None."""
    if result.hung:
        return f"ran for more than {WALL_SECONDS} s"
    if "Traceback (most recent call last)" in result.stderr:
        return "traceback: " + said_lines(result.stderr)[-1][:200]
    if result.code < 0:
        return f"killed by {signal.Signals(-result.code).name}"
    if result.code == 0:
        return None
    lines = said_lines(result.stderr)
    errors = [line for line in lines if line.startswith("error: ")]
    if len(errors) != 1 or lines[-1] != errors[0]:
        return f"exit {result.code} with {len(errors)} error lines; the last line: {lines[-1][:200] if lines else None}"
    if len(errors[0]) > ERROR_LENGTH or not errors[0].isprintable():
        return f"error line of {len(errors[0])} characters, or with unprintable ones: {ascii(errors[0])[:200]}"
    return None


def kept_log(old, new):
    """Whether a log still has the losses that it had."""
    wanted = [line for line in old.splitlines() if b'"val_loss"' in line or b'"loss"' in line]
    return set(wanted) <= set(new.splitlines())


def harm(case, code, before, after):
    """Files that a command should have left alone. before, after: {path: bytes}"""
    changed = [path for path, old in before.items() if after.get(path) != old]
    if code == 0:
        return [path for path in changed if not any(fnmatch.fnmatch(path, pattern) for pattern in case.command.writes)]
    begun = {path for path in changed if Path(path).name in LOGS and path in after and (
        not path.endswith("train.jsonl") or kept_log(before[path], after[path]))}
    return [path for path in changed if path not in begun] + [path for path in after.keys() - before if ".tmp" in path]


def judge(case, folder, result, before, baseline):
    """What is wrong with a result as a sentence, or None; and whether it differs from that of whole files.

    before: snapshot of the folder before the command ran, with the damaged file; baseline: (product, lines of the
    standard error) of whole files.
    """
    if wrong := misbehaviour(result):
        return wrong, True
    if harmed := harm(case, result.code, before, snapshot(folder)):
        return f"exit {result.code}, changed or left {', '.join(sorted(harmed))}", True
    if result.code:
        return None, True
    try:
        product = product_of(case.command, folder, result.stdout)
    except (ValueError, KeyError, TypeError, OSError) as e:
        return f"exit 0, but no right output: {type(e).__name__} {e}", True
    if case.rule == "same" and product != baseline[0]:
        return f"exit 0, and {product!s:.100} instead of {baseline[0]!s:.100}", True
    return None, (product, said_lines(result.stderr)) != baseline


# -----------------------------------------------------------------------------
# Variants


@dataclass(frozen=True)
class Variant:
    """One damage of one file. key: names it, with the seed, for ever."""
    case: Case
    index: int
    mutator: object

    @property
    def key(self):
        return f"{self.case.name}:{self.index}"

    def rng(self, seed):
        return random.Random(f"{seed} {self.key}")


def missing_packages(case):
    return [name for name in case.needs if importlib.util.find_spec(name) is None]


def make_variants(cases, seed, count):
    """At least `count` variants of all cases by their shares, two of a case at the least. A case goes through its
    mutators in a random order, after the first in their list, which makes a difference wherever the file is read."""
    total = sum(case.share for case in cases)
    variants = []
    for case in cases:
        pool = mutations.FORMATS[case.format]
        order = pool[:1]
        rng = random.Random(f"{seed} {case.name}")
        wanted = max(2, math.ceil(count * case.share / total))
        while len(order) < wanted:
            order += rng.sample(pool, len(pool))
        variants += [Variant(case, i, mutator) for i, mutator in enumerate(order[:wanted])]
    return variants


class Fuzzer:
    """The world, and what its children are started with."""

    def __init__(self, root, seed):
        self.root, self.seed, self.code, self.template = root, seed, root / "code", root / "world"
        copy_code(self.code)
        import_scripts(self.code)
        has_all = {needs: all(importlib.util.find_spec(name) for name in needs) for needs in (LLAMA, LM_EVAL)}
        self.plots = make_world(self.template, has_all[LLAMA], has_all[LM_EVAL])
        self.before, self.baselines = snapshot(self.template), {}
        self.besides = {case.file: next(self.code.rglob(case.file.removeprefix("beside:")))
                        for case in CASES if case.file.startswith("beside:")}

    def beside(self, case):
        """Path, in the copy of the code, of a file that lies beside the scripts, or None."""
        return self.besides.get(case.file)

    def target(self, case, folder):
        return self.beside(case) or folder / case.file.format(plots=self.plots)

    def baseline(self, case):
        """(product, lines of the standard error) of a case's command on whole files."""
        command = case.command
        if command not in self.baselines:                  # before the variants, so that children find what it imports
            folder = self.root / f"baseline{len(self.baselines)}"
            shutil.copytree(self.template, folder)
            result = learn(folder, command.script, command.line)
            self.baselines[command] = product_of(command, folder, result.stdout), said_lines(result.stderr)
        return self.baselines[command]

    def start(self, variant, folder):
        """Pid of a child that damages its copy of the world and runs the command on it."""
        shutil.copytree(self.template, folder)
        path = self.target(variant.case, folder)

        def work(note):
            said = variant.mutator(variant.rng(self.seed), path)
            note(said)
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 26:
                shutil.copy(path, f"{folder}.was")
            limit()
            return call(variant.case.command.script, variant.case.command.line)

        return fork(folder, work)

    def end(self, variant, folder, result):
        """Outcome of a variant whose child has ended."""
        case, before = variant.case, dict(self.before)
        damaged, was = self.target(case, folder), Path(f"{folder}.was")
        if beside := self.beside(case):
            restore(beside, REPO / beside.relative_to(self.code))
        else:
            before.pop(case.file.format(plots=self.plots))
            if was.exists() and not damaged.is_symlink():
                before[case.file.format(plots=self.plots)] = was.read_bytes()
        wrong, differs = judge(case, folder, result, before, self.baselines[case.command])
        return Outcome(variant, result, wrong, differs)


@dataclass
class Outcome:
    """fault: what is wrong, or None; differs: whether the damage made a difference."""
    variant: Variant
    result: Result
    fault: str | None
    differs: bool

    def describe(self, seed):
        case = self.variant.case
        judged = self.fault or f"right, exit {self.result.code}: {said_lines(self.result.stderr)[-1:]}"
        return (f"{self.variant.key} (seed {seed}): {judged}\n    {case.file}: {self.result.said}\n"
                f"    {case.command.script} {case.command.line}")


def restore(path, original):
    """Put a file back, whatever is in its place."""
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    shutil.copy(original, path)


def run_variants(fuzzer, variants, jobs, keep, tell):
    """Outcomes of variants, `jobs` at a time; those that damage a file that all share run alone, at the end."""
    waiting = [v for v in variants if not fuzzer.beside(v.case)]
    alone = [v for v in variants if fuzzer.beside(v.case)]
    running, outcomes = {}, []
    while waiting or alone or running:
        while waiting and len(running) < jobs or alone and not running:
            variant = (waiting or alone).pop(0)
            folder = fuzzer.root / f"variant{len(outcomes) + len(running)}"
            running[fuzzer.start(variant, folder)] = variant, folder, time.monotonic()
        for pid, (variant, folder, since) in list(running.items()):
            if (result := finished(pid, folder, since)) is None:
                continue
            del running[pid]
            outcomes.append(fuzzer.end(variant, folder, result))
            tell(outcomes[-1])
            if not keep:
                for path in fuzzer.root.glob(f"{folder.name}*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        time.sleep(0.005)
    return outcomes


def without_difference(outcomes):
    """Names of cases none of whose damages made a difference: does the command read the file at all?"""
    differing = {outcome.variant.case.name for outcome in outcomes if outcome.differs}
    return sorted({outcome.variant.case.name for outcome in outcomes} - differing)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED, help=f"of all damages ({SEED})")
    parser.add_argument("--variants", type=int, default=VARIANTS, help=f"at least so many ({VARIANTS})")
    parser.add_argument("--part", choices=("all", "base", "optional"), default="all",
                        help="optional: the kinds that need more packages; base: the others (all)")
    parser.add_argument("--only", action="append", default=[], help="a case, or one variant as CASE:INDEX")
    parser.add_argument("--jobs", type=int, default=2, help="variants at once (2)")
    parser.add_argument("--keep", type=Path, help="leave the world and every variant's folder here")
    parser.add_argument("--report", type=Path, help="write outcomes to this JSON file")
    parser.add_argument("--list", action="store_true", help="print the table of cases")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    cases = [case for case in CASES if args.part == "all" or (args.part == "optional") == bool(case.needs)]
    skipped = {case.name: missing_packages(case) for case in cases if missing_packages(case)}
    if args.list:
        for case in cases:
            print(f"{case.name}: {case.file} ({case.format}), {case.command.script} {case.command.line}")
        return 0
    if ENVIRONMENT.items() - os.environ.items():           # NumPy starts its threads when it's imported
        arguments = sys.argv[1:] if argv is None else argv
        os.execve(sys.executable, [sys.executable, __file__, *arguments], {**os.environ, **ENVIRONMENT})
    variants = [variant for variant in make_variants([case for case in cases if case.name not in skipped],
                                                         args.seed, args.variants)
                if not args.only or {variant.key, variant.case.name} & set(args.only)]
    with contextlib.ExitStack() as stack:
        root = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-")))
        root.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        fuzzer = Fuzzer(root.resolve(), args.seed)
        for variant in variants:
            fuzzer.baseline(variant.case)
        gc.freeze()                                        # or each child's collector would copy all that is imported
        print(f"made the world and ran all commands on whole files in {time.monotonic() - started:.0f} s", flush=True)

        def tell(outcome):
            if outcome.fault or args.only:
                print(outcome.describe(args.seed), flush=True)

        outcomes = run_variants(fuzzer, variants, args.jobs, args.keep, tell)
        gc.unfreeze()
    idle = [] if args.only else without_difference(outcomes)
    faults = [outcome for outcome in outcomes if outcome.fault]
    refused = sum(outcome.result.code != 0 for outcome in outcomes)
    print(f"{len(outcomes)} variants in {time.monotonic() - started:.0f} s: {refused} ended with an error, "
          f"{len(outcomes) - refused} went on, {len(faults)} faults")
    seconds = Counter()
    for outcome in outcomes:
        seconds[outcome.variant.case.name] += outcome.result.seconds
    slowest = ", ".join(f"{name} {most:.0f} s" for name, most in seconds.most_common(12))
    print(f"CPU time: {seconds.total():.0f} s, of which {slowest}")
    for name, lacking in skipped.items():
        print(f"skipped: {name}, without {', '.join(lacking)}")
    for name in idle:
        print(f"no damage made a difference: {name}")
    if args.report:
        args.report.write_text(json.dumps(dict(
            seed=args.seed, variants=len(outcomes), refused=refused, skipped=skipped, idle=idle,
            faults=[outcome.describe(args.seed) for outcome in faults]), indent=1) + "\n")
    return 1 if faults or idle else 0


if __name__ == "__main__":
    sys.exit(main())
