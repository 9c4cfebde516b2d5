"""
Run what paper_manifest.json lists: groups of training runs that replicate the papers, and fair versions of them.

    python3 run_paper_manifest.py --group cpu_mini --dry-run
    python3 run_paper_manifest.py --group a100_1b --dry-run --for h100 -- --compile --micro-batch 8
    python3 run_paper_manifest.py --group cpu_mini --jobs 2
    python3 run_paper_manifest.py --group wikitext2 --only fair/standard512 fair/decoupled32_64 --seeds 1337
    python3 run_paper_manifest.py --group wikitext2 --only compare/ -- --compile --device cuda

Flags of train_dba.py after -- go to every run, as settings after --set do.

A group holds sets; a set holds `base` settings, `rows` of settings over them, seeds, and perhaps learning rates
(`lrs`, also of a row) that it is run with, and other seeds (`rate_seeds`) by which each row's rate is chosen. Settings
are named as the flags of train_dba.py, with underscores. A run is <runs>/<group>/<set>/<row>[_lr<lr>]_s<seed>; started
again it resumes, a finished one is left alone. A run that fails is reported at the end, where it left its messages, and
makes the exit code 1; the others go on.

A group's `contrasts` are what was decided to be tested before any of its runs: a - b, paired by seed, of two rows of a
set. `kind` better: the difference is below 0; no_worse: below `margin` nats; equivalent: within it. paper/claims.py
tests them, corrected by Holm at the group's `alpha`.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from estimate import PEAKS, model_flops, training_memory, utilisation
from paper.shapes import list_of, map_of, number
from train_dba import (
    BROKEN,
    CONFIG,
    DEFAULTS,
    Config,
    Parser,
    UserError,
    brief,
    bytes_per_token,
    cache_formats,
    catch_signals,
    check,
    count_params,
    exit_code,
    flag_name,
    make_config,
    parse_args,
    pick_device,
    pick_dtype,
    product_rates,
    read_bytes,
    synchronize,
    whole_number,
    writing,
)

HERE = Path(__file__).parent
GPUS = ("H100", "H200", "A100")                            # of --for
CACHES = ("fp16", "q8_0", "q4_0", "hetero")                # whose losses --post-ppl measures, where they fit the mode


@dataclass(frozen=True)
class Run:
    """One training run: its folder's name, <group>/<set>/<row>[_lr<lr>]_s<seed>, and what of it remains without seed,
    and without learning rate too; the settings that it is given, the Config that they resolve to; whether it only helps
    to choose its row's rate."""
    name: str
    series: str
    row: str
    given: dict
    cfg: Config
    vocab_size: int
    for_rate: bool = False

    @property
    def tokens(self):
        return self.cfg.steps * self.cfg.tokens_per_step

    @property
    def flops(self):
        return self.tokens * model_flops(self.cfg, self.vocab_size)

    @property
    def tokens_done(self):
        """Tokens that its log tells of."""
        log = Path(self.cfg.out_dir) / "train.jsonl"
        for line in reversed(log.read_bytes().splitlines() if log.is_file() else []):
            with contextlib.suppress(*BROKEN):             # a line without, or one that is being written
                return json.loads(line)["tokens"]
        return 0

    @property
    def is_finished(self):
        return self.tokens_done >= self.tokens

    @property
    def best(self):
        """Its best checkpoint; of a run that was made elsewhere there may be the log alone."""
        return Path(self.cfg.out_dir) / "best.pt"

    def is_measured(self, *names):
        """Whether files of the run folder are newer than the checkpoint that they were made from."""
        made = [self.best.with_name(name) for name in names]
        return all(path.is_file() and path.stat().st_mtime >= self.best.stat().st_mtime for path in made)

    def post_ppl(self):
        """Commands that measure the loss of the best checkpoint through quantised caches, plain and rotated, and of
        decoupled attention with one stream at a time in 4 bits, where it has not been measured yet."""
        flags = ["--ckpt", self.cfg.out_dir, "--device", self.cfg.device, "--batch-size", 32, "--max-tokens", 2**15 + 1]
        plain = [name for name in CACHES if cache_formats(self.cfg, name)]
        if "hetero" in plain:
            plain += one_in_4_bits(self.cfg.attention.streams)
        if not self.is_measured(*(f"eval_ppl_{name}.json" for name in plain)):
            yield ["eval_dba.py", "ppl", *flags, "--kv-cache", *plain]
        if not self.is_measured("eval_ppl_q4_0_rotated.json"):
            yield ["eval_dba.py", "ppl", *flags, "--kv-cache", "q4_0", "--kv-rotate"]

    def post_mem128k(self):
        """Command that measures the memory of that checkpoint's KV cache at 128k tokens, where it has not been."""
        if not self.is_measured("mem128k.json"):
            yield ["plot_memory.py", "--ckpt", self.cfg.out_dir, "--device", self.cfg.device]

    def command(self):
        """Flags of train_dba.py."""
        flags = []
        for name, value in self.given.items():
            if isinstance(value, bool):
                flags.append(flag_name(name) if value else flag_name("no_" + name))
            else:
                auto = (name, value) == ("micro_batch", 0)
                flags += [flag_name(name), "auto" if auto else f"{value}"]
        return flags


def one_in_4_bits(streams):
    """Caches in fp16 but for one of their streams, as --kv-cache names them."""
    caches = []
    for chosen in streams:
        formats = {**dict.fromkeys(streams, "fp16"), chosen: "q4_0"}
        caches.append(",".join(f"{name}={kind}" for name, kind in formats.items()))
    return caches


def number_above_zero(value):
    return number(value) and value > 0


def count_above_zero(value):
    return whole_number(value) and value > 0


def kind_of_contrast(value):
    return value in ("better", "no_worse", "equivalent")


SEEDS, RATES = list_of(whole_number), list_of(number_above_zero)
ROW = {"lrs?": RATES}                                      # beside settings, which make_run() checks
SET = {"base": dict, "rows": map_of(ROW), "seeds": SEEDS, "rate_seeds?": SEEDS, "lrs?": RATES, "about?": str,
       "data?": str, "vocab_size?": count_above_zero}
CONTRAST = {"name": str, "set": str, "a": str, "b": str, "kind": kind_of_contrast, "margin": number_above_zero}
GROUP = {"data": str, "vocab_size": count_above_zero, "sets": map_of(SET), "contrasts?": list_of(CONTRAST),
         "alpha?": number_above_zero, "about?": str}


def read_manifest(path):
    """The manifest as a dict. Raises UserError where it's damaged."""
    try:
        manifest = json.loads(read_bytes(path, 2**20), object_pairs_hook=named_once)
        check(manifest, dict, "it")
        for name, group in manifest.items():
            check(group, GROUP, name)
            check_group(group)
        return manifest
    except (*BROKEN, OSError) as e:
        raise UserError(f"{path} is no manifest ({brief(e)})") from None


def named_once(pairs):
    """The object of a JSON file's names and values. Raises ValueError where a name comes twice."""
    names = [name for name, _ in pairs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{min(twice)} is there twice")
    return dict(pairs)


def check_known(names, shape, what):
    if unknown := set(names) - {name.removesuffix("?") for name in shape}:
        raise ValueError(f"{what} has an unknown key {min(unknown)}")


def check_group(group):
    """Raises ValueError for what the shape of a group can't say."""
    check_known(group, GROUP, "the group")
    for name, part in group["sets"].items():
        check_known(part, SET, name)
        if not part["rows"] or not part["seeds"]:
            raise ValueError(f"{name} has no rows, or no seeds")
        for folder in (name, *part["rows"]):
            if not re.fullmatch(r"\w[\w.-]*", folder):
                raise ValueError(f"{folder!r} can't be a part of a folder's name")
        if shared := set(part["seeds"]).intersection(part.get("rate_seeds", [])):
            raise ValueError(f"the seed {min(shared)} is for tests, so that it may not choose a rate")
    for contrast in group.get("contrasts", []):
        check_known(contrast, CONTRAST, contrast["name"])
        rows = group["sets"].get(contrast["set"], dict(rows=()))["rows"]
        if absent := {contrast["a"], contrast["b"]}.difference(rows):
            raise ValueError(f"contrast {contrast['name']}: no row {min(absent)} in {contrast['set']}")


def list_runs(manifest, groups, data, runs, only=(), seeds=None, overrides=()):
    """Every Run of the groups, resolved. only: beginnings of what follows the group in a run's name. Raises UserError
    for a group that isn't there, and for settings that train_dba.py would refuse."""
    if unknown := set(groups) - manifest.keys():
        raise UserError(f"no group {min(unknown)} in the manifest; it has {', '.join(manifest)}")
    listed = []
    for group in dict.fromkeys(groups):                    # one that is named twice is one
        for name, part in manifest[group]["sets"].items():
            source, rate_seeds = {**manifest[group], **part}, part.get("rate_seeds", [])
            for row, settings in part["rows"].items():
                for lr in settings.get("lrs", part.get("lrs", [None])):
                    for seed in dict.fromkeys(seeds or rate_seeds + part["seeds"]):
                        series = f"{name}/{row}" + (f"_lr{lr:g}" if lr else "")
                        if only and not f"{series}_s{seed}".startswith(tuple(only)):
                            continue
                        rate = {"lr": lr} if lr else {}
                        if named := dict(overrides).keys() & {"seed", "data", "out_dir", *rate}:
                            raise UserError(f"{flag_name(min(named))} after -- is part of what runs are named by; see "
                                            "--seeds, --data-dir, --runs and --only")
                        given = {**part["base"], **settings, **rate, **dict(overrides), "seed": seed,
                                 "data": f"{data}/{source['data']}", "out_dir": f"{runs}/{group}/{series}_s{seed}"}
                        given.pop("lrs", None)
                        listed.append(make_run(group, f"{name}/{row}", series, given, source["vocab_size"],
                                               for_rate=seed in rate_seeds))
    if not listed:
        raise UserError(f"nothing in {', '.join(groups)} begins with {' or '.join(only)}")
    folders = [run.cfg.out_dir for run in listed]
    if twice := {folder for folder in folders if folders.count(folder) > 1}:
        raise UserError(f"{min(twice)} would be the folder of two runs; name a row otherwise, or choose other rates")
    return listed


def as_flags(settings):
    """Flags of train_dba.py for settings as name=value, where true and false are those of a switch."""
    flags = []
    for setting in settings:
        name, _, value = setting.partition("=")
        switch = {"true": flag_name(name), "false": flag_name(f"no_{name}")}
        flags.append(switch.get(value, f"{flag_name(name)}={value}"))
    return flags


def make_run(group, row, series, given, vocab_size, for_rate):
    """Run of the settings that it is given. Raises UserError, with its name, where train_dba.py would refuse them."""
    name = f"{group}/{series}_s{given['seed']}"
    if unknown := given.keys() - DEFAULTS.keys():
        raise UserError(f"{name}: no setting {min(unknown)}")
    try:
        check(given, CONFIG, "it")
        cfg = make_config(**given)
    except (UserError, ValueError) as e:
        raise UserError(f"{name}: {e}") from None
    return Run(name, f"{group}/{series}", f"{group}/{row}", given, cfg, vocab_size, for_rate)


def product_rate(cfg, device, seconds=0.2):
    """FLOP/s of matrix products on this device in the type that a run would take here, and that type's name."""
    if device.type == "cpu":
        rates = product_rates(cfg.batch_size * cfg.block, cfg.d_model, cfg.d_ff)
        name = str(pick_dtype(cfg.dtype, device, lambda: rates)[0]).removeprefix("torch.")
        return rates[name] * 1e12, name
    dtype, size = pick_dtype(cfg.dtype, device)[0], 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    a @ b
    synchronize(device)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        a @ b
        synchronize(device)
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - started), str(dtype).removeprefix("torch.")


def short(n):
    """A count in three digits: 655M."""
    unit = ""
    for larger in "kMBT":
        if n >= 999.5:
            n, unit = n / 1000, larger
    return f"{n:#.3g}".rstrip(".") + unit if unit else f"{n}"


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.2g} s"
    if seconds < 5400:
        return f"{seconds / 60:.2g} min"
    return f"{seconds / 3600:.1f} h" if seconds < 96 * 3600 else f"{seconds / 86_400:.1f} days"


def aligned(rows):
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  " + "  ".join(cells))
    return lines


def span(values, form):
    """The least and the largest, or what they both are."""
    ends = dict.fromkeys(format(value, form) for value in (min(values), max(values)))
    return " to ".join(ends)


def rates_here(runs, device):
    """({run: FLOP/s} of matrix products of its shape and type on this device, what that is)"""
    measured, rates = {}, {}
    for run in runs:
        cfg = run.cfg
        shape = cfg.dtype, cfg.batch_size * cfg.block, cfg.d_model, cfg.d_ff
        if shape not in measured:
            measured[shape] = product_rate(cfg, device)
        rates[run.name] = measured[shape][0]
    by_dtype = {}
    for rate, dtype in measured.values():
        by_dtype.setdefault(dtype, []).append(rate / 1e12)
    said = ", ".join(f"{span(teraflops, '.3g')} TFLOP/s in {dtype}" for dtype, teraflops in by_dtype.items())
    return rates, f"at least: at the rate of matrix products alone on this {device.type}, {said}"


def rates_of(gpu, runs):
    """The same of a GPU by its name: its peak, and the share of it that was measured or is assumed."""
    rates, by_source = {}, {}
    for run in runs:
        share, source = utilisation(run.cfg, Path(os.path.relpath(HERE / "runs/bench")))
        rates[run.name] = share * PEAKS[gpu]
        by_source.setdefault(source, []).append(100 * share)
    said = ", ".join(f"{span(percent, '.0f')} % of it ({source})" for source, percent in by_source.items())
    return rates, f"estimated for one {gpu}: {PEAKS[gpu] / 1e12:.0f} TFLOP/s in bfloat16 at its peak, {said}"


def gib(n):
    return f"{n / 2**30:.1f} GiB"


def set_rows(runs, rates, on_gpu):
    """A head, and a row for each row of a set: its runs over rates and seeds, how many are finished, and of each of
    them the parameters, cache, tokens read, training memory (of a GPU, under autocast) and time."""
    rows = [["", "runs", "finished", "parameters", "KV a token", "reads", *["memory"] * on_gpu, "time"]]
    by_row = {}
    for run in runs:
        by_row.setdefault(run.row, []).append(run)
    for name, members in by_row.items():
        run, done = members[0], sum(member.is_finished for member in members)
        memory = "-" if run.cfg.dtype == "float32" else gib(training_memory(run.cfg, run.vocab_size)["peak"])
        rows.append([name.rsplit("/", 1)[1], f"{len(members)}", "all" if done == len(members) else f"{done}",
                     short(count_params(run.cfg, run.vocab_size)["total"]),
                     short(bytes_per_token(run.cfg, "fp16")) + "B", short(run.tokens), *[memory] * on_gpu,
                     duration(run.flops / rates[run.name])])
    return rows


def describe(runs, device, gpu):
    """Print what the runs are, a table a set, and what they would take: on this device, or on a GPU by its name. Of a
    single run its memory by part and its command too. Needs no data, and builds no model."""
    rates, said = rates_of(gpu, runs) if gpu else rates_here(runs, device)
    on_gpu = bool(gpu) or device.type == "cuda"
    by_set = {}
    for run in runs:
        by_set.setdefault(run.row.rsplit("/", 1)[0], []).append(run)
    for name, members in by_set.items():
        print(name, *aligned(set_rows(members, rates, on_gpu)), "", sep="\n")
    left = [run for run in runs if not run.is_finished]
    seconds = sum(run.flops / rates[run.name] for run in left)
    print(f"KV cache in fp16; time {said}.")
    if len(runs) == 1:
        run, = runs
        if on_gpu and run.cfg.dtype != "float32":
            parts = training_memory(run.cfg, run.vocab_size)
            print("Memory by formula:", ", ".join(f"{part} {gib(n)}" for part, n in parts.items() if n) + ".")
        print(f"{run.name}:\n  train_dba.py {shlex.join(run.command())}")
    print(f"{len(left)} of {len(runs)} runs are to be made: {short(sum(run.tokens for run in left))} tokens to read, "
          f"{duration(seconds)}")


class Runner:
    """Runs on so many jobs at once; each shares the CPU's cores evenly."""

    def __init__(self, jobs, post):
        self.jobs, self.post, self.processes, self.stopped = jobs, post, set(), False

    def call(self, command, log):
        """Exit code of a command whose output goes to the end of a log file."""
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        with open(log, "a") as out:
            process = subprocess.Popen([sys.executable, *map(str, command)], stdout=out, stderr=out,
                                       env={"OMP_NUM_THREADS": threads, **os.environ})
            self.processes.add(process)
            if self.stopped:                               # meanwhile
                process.terminate()
            code = process.wait()
            self.processes.discard(process)
        return code

    def run(self, run):
        """Exit code of a run, and of what follows it."""
        if self.stopped:
            return 1
        log = Path(f"{run.cfg.out_dir}.console")
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
        code = self.call([HERE / "train_dba.py", *run.command()], log)
        for commands in self.post if code == 0 and run.best.is_file() else ():
            for script, *flags in commands(run):
                code = code or self.call([HERE / script, *flags], log)
        if code == 0:
            log.unlink()
        return code

    def stop(self):
        """Let every run save and end."""
        self.stopped = True
        for process in list(self.processes):
            process.terminate()


def run_all(runs, jobs, post):
    """Run all, each followed by the commands that `post` makes of it; a bar counts tokens. Returns the exit code: that
    of SIGINT or SIGTERM, on which the runs that are at work save and end."""
    runner, failed, caught = Runner(jobs, post), [], catch_signals(lambda: "\nstopping; runs save first\n")
    bar = tqdm(total=sum(run.tokens for run in runs), initial=sum(run.tokens_done for run in runs), unit="tok",
               unit_scale=True, dynamic_ncols=True, desc=f"{len(runs)} runs")
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(runner.run, run) for run in runs]
        while not caught and not all(future.done() for future in futures):
            time.sleep(1)
            done = sum(future.done() for future in futures)
            bar.set_postfix_str(f"{done} done", refresh=False)
            bar.update(sum(run.tokens_done for run in runs) - bar.n)
        if caught:
            runner.stop()
    bar.update(sum(run.tokens_done for run in runs) - bar.n)
    bar.close()
    if caught:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + caught[0]
    for run, future in zip(runs, futures):
        if code := future.result():
            failed.append(run)
            print(f"{run.name}: exit code {code}, see {run.cfg.out_dir}.console", file=sys.stderr)
    print(f"{len(runs) - len(failed)} of {len(runs)} runs are finished")
    if lacking := sum(not run.best.is_file() for run in runs if run not in failed):
        print(f"{lacking} of them are logs without a checkpoint; with another --runs they are made anew")
    return 1 if failed else 0


@exit_code()
def main(argv=None):
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, default=HERE / "paper_manifest.json")
    parser.add_argument("--group", nargs="+", required=True, help="groups of the manifest")
    parser.add_argument("--only", nargs="+", default=[], help="only runs whose <set>/<row> begins so")
    parser.add_argument("--seeds", type=int, nargs="+", help="these in place of the manifest's")
    parser.add_argument("--steps", type=int, help="so many steps a run, in place of the manifest's")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--runs", default="runs", help="where run folders go (runs)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (1)")
    parser.add_argument("--dry-run", action="store_true", help="print what is finished, sizes and time; run nothing")
    parser.add_argument("--for", dest="gpu", type=str.upper, choices=GPUS,
                        help="dry run for one such GPU in place of this device: " + ", ".join(GPUS).lower())
    parser.add_argument("--post-mem128k", action="append_const", dest="post", default=[], const=Run.post_mem128k,
                        help="then measure each checkpoint's KV memory at 128k tokens")
    parser.add_argument("--post-ppl", action="append_const", dest="post", const=Run.post_ppl,
                        help="then measure each checkpoint's loss through quantised caches")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of every run, such as "
                        "compile=true micro_batch=8: what flags after -- say, too")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="flags of train_dba.py for every run")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1")
    if args.gpu and not args.dry_run:
        raise UserError(f"--for {args.gpu} estimates, and belongs to --dry-run")
    overrides = {"device": args.device} if args.steps is None else {"steps": args.steps, "device": args.device}
    overrides |= parse_args([*as_flags(args.set), *args.flags])
    runs = list_runs(read_manifest(args.manifest), args.group, args.data_dir, args.runs, args.only, args.seeds,
                     overrides.items())
    device = pick_device(args.device)
    if args.dry_run:
        describe(runs, device, args.gpu)
        return 0
    ready = [run for run in runs if Path(run.cfg.data).is_file()]
    code = run_all(ready, args.jobs, args.post) if ready else 1
    if missing := sorted({run.cfg.data for run in runs if run not in ready}):
        raise UserError(f"{len(runs) - len(ready)} runs lack their data, {', '.join(missing)}: `make setup` "
                        "prepares WikiText-2, prepare_fineweb.py FineWeb-Edu")
    return code


if __name__ == "__main__":
    sys.exit(main())
