"""
From run folders to one dict, which figures, tables and the ledger are made of.

    results = collect(Path("runs"), manifest)

runs        every finished run: what it is, its losses, its curve, the losses of its checkpoint through quantised caches
series      runs that differ in nothing but the seed: means and 95 % t-intervals
evals       other measurements of eval_dba.py: {run: {file without eval_: {command, result, from}}}
surgery     what benchmarks/surgery_quality.py measured of conversions: {run: {row: bytes, {text: KL of its windows}}}
benchmarks  runs/bench/<name>.json, and as `devices` runs/bench/<machine>/*.json
manifest    {group/set: [finished, listed]}
problems    files that were left out, a line each

paper.claims adds contrasts and claims.

A run's name is its folder below the root: <group>/<set>/<row>[_lr<rate>]_s<seed> for what the manifest lists, anything
for a user's own. What data a run saw is told by the hashes in its log, never by a path: runs of different data share
neither a series, a panel nor a contrast.
"""

import itertools
import operator
import statistics
from collections.abc import Iterable
from pathlib import Path

from paper.shapes import (
    BENCHMARKS,
    BLOCKS,
    CHECKS,
    COMMANDS,
    DEVICE,
    ENV,
    EVAL,
    META,
    RANKS,
    RESULT,
    SURGERY,
    TEXT,
    TRAIN,
    UNREADABLE,
    list_of,
    map_of,
    number,
    read_json,
)
from paper.stats import mean_interval
from run_paper_manifest import Run
from train_dba import DEFAULTS, Config, UserError, brief, check, out_of_range, read_log, whole_number

CHANCE = {"arc_easy": 0.25, "hellaswag": 0.25, "piqa": 0.5, "winogrande": 0.5, "boolq": 0.5}
LEAST_ENERGY = 1e-5                                        # less than this share of a score is not drawn
SAME_PARAMETERS = 0.001                                    # relative


# -----------------------------------------------------------------------------
# Runs

def label(config: dict) -> str:
    """Short name of a model: its mode, its widths, what was switched on."""
    mode, c = config["attn_mode"], config
    width = {"standard": c["d_model"], "bottleneck": c["attn_dim"], "decoupled": f"{c['sem_dim']}/{c['geo_dim']}",
             "gqa": f"{c['n_head']}Q/{c['kv_head']}KV", "mla": f"{c['kv_lora_rank']}+{c['rope_dim']}"}[mode]
    names = [mode, str(width)]
    if mode == "mla" and c["attn_dim"] not in (None, c["d_model"]):
        names.append(f"v{c['attn_dim']}")
    if mode == "decoupled" and c["kv_lora_rank"]:
        names.append(f"latent {c['kv_lora_rank']}")
    if mode == "decoupled" and c["kv_head"]:
        names.append(f"{c['kv_head']} groups")
    for switch, name in (("null_attn", "null"), ("tie_qk", "tied"), ("one_temperature", "one temperature"),
                         ("learned_temp", "learned temperature")):
        if c[switch]:
            names.append(name)
    if not c["rope"]:
        names.append("no RoPE")
    if c["mlp"] == "gelu":
        names.append("GELU")
    return " ".join(names)


def score_channels(config: dict) -> list[int]:
    """[without, with] rotation: channels of a head's score."""
    channels = [0, 0]
    for path in Config(**config).attention.paths:
        channels[path.rotate] += path.width
    return channels


def hardware_name(env: dict) -> str:
    """The device of an env.json; of a CPU its name, with how many threads."""
    if env["device"] != "cpu":
        return env["device"]
    return f"{env['cpu']}, {env['threads']} thread" + ("s" if env["threads"] > 1 else "")


def read_config(logged: dict) -> dict:
    """Settings of a log as this version has them: a flag that is younger than the log has its default. Raises
    ValueError for values that no flag allows."""
    config = {name: logged.get(name, default) for name, default in DEFAULTS.items()}
    for problem in out_of_range(vars(Config(**config))):
        raise ValueError(problem)
    return config


def lines_of(lines: list, kind: str, shape: dict) -> list:
    """The log's lines of a type. Raises ValueError where one lacks what is read of it."""
    chosen = []
    for line in lines:
        if line["type"] == kind:
            check(line, shape, kind)
            chosen.append(line)
    return chosen


def column(rows: Iterable, *path) -> list:
    """What every row holds at row[path[0]][path[1]]..."""
    values = list(rows)
    for key in path:
        values = [value[key] for value in values]
    return values


def known(values: list) -> list:
    """Those that are not None."""
    return [value for value in values if value is not None]


def read_run(folder: Path, name: str) -> dict | None:
    """One finished run as a dict of what is reported of it, or None for a run that isn't finished. Raises one of
    UNREADABLE or UserError for a damaged one."""
    lines = read_log(folder / "train.jsonl")
    if not lines or lines[-1]["type"] != "done":
        return None
    meta, env = lines[0], read_json(folder / "env.json", ENV)
    check(meta, META, "meta")
    last_meta = meta
    for line in lines_of(lines, "resume_meta", dict(config=dict)):
        last_meta = line
    config = read_config(last_meta["config"])
    train, evals = lines_of(lines, "train", TRAIN), lines_of(lines, "eval", EVAL)
    check(lines[-1], dict(tokens=whole_number), "done")
    series = name.removesuffix(f"_s{config['seed']}")
    return dict(
        run=name, series=series, row=series.removesuffix(f"_lr{config['lr']:g}"), best_of_sweep=None,
        mode=config["attn_mode"], label=label(config), score_channels=score_channels(config),
        data=Path(config["data"]).name, identity=meta["data"],
        lr=config["lr"], layers=config["layers"], context=config["block"],
        batch=config["batch_size"] * config["grad_accum"], seed=config["seed"], steps=config["steps"],
        tokens=lines[-1]["tokens"], params=meta["params"]["total"],
        kv_bytes_fp16=meta["kv_bytes_per_token"]["fp16"], val_tokens=evals[-1]["val_tokens"],
        last_val_loss=evals[-1]["val_loss"], best_val_loss=evals[-1]["best_val_loss"],
        last_train_loss=train[-1]["loss"] if train else None,
        tokens_per_second=statistics.median(column(train, "tok_s")) if train else None,
        hardware=hardware_name(env), peak_bytes=max(known(column(train, "mem_bytes")), default=None),
        dtype=config["dtype"], compiled=config["compile"], commit=env["commit"], dirty=env["dirty"], caches={},
        gradient_spike=gradient_spike(train, config["warmup_steps"] or 0),
        curve=list(map(list, zip(column(evals, "tokens"), column(evals, "val_loss")))), train_curve=thin(train))


def gradient_spike(train: list, warmup: int) -> float | None:
    """The largest gradient norm that was logged after the warm-up, as times their median; None where none was."""
    norms = [line["grad_norm"] for line in train if line["step"] > warmup and line.get("grad_norm")]
    return max(norms) / statistics.median(norms) if norms else None


def thin(train: list, most: int = 25) -> list:
    """[[tokens, mean training loss]] of a log, in at most so many steps of equal length, the first maybe shorter: a
    last one of a line or two would end the curve in noise."""
    size = -(-len(train) // most) or 1
    points = []
    for end in range(len(train) % size or size, len(train) + 1, size):
        part = train[max(0, end - size):end]
        points.append([part[-1]["tokens"], rounded_mean(column(part, "loss"))])
    return points


def rounded_mean(values: Iterable[float]) -> float:
    """The mean in 5 digits."""
    return float(f"{statistics.mean(values):.5g}")


def read_runs(root: Path) -> tuple[list, list]:
    """(finished runs at any depth under root, or in it, by name; a line on each that was left out)."""
    runs, problems = [], []
    for log in sorted(root.rglob("train.jsonl")):
        folder = log.parent
        name = folder.name if folder == root else folder.relative_to(root).as_posix()
        try:
            name.encode()                                  # which results have to hold
            if run := read_run(folder, name):
                runs.append(run)
            else:
                problems.append(f"{folder}: not finished, left out")
        except UserError as e:
            problems.append(f"{e}; left out")
        except UNREADABLE as e:
            problems.append(f"{folder}: damaged ({brief(e)}), left out")
    return runs, problems


def same_data(a: dict, b: dict) -> bool:
    """Whether two runs saw the same data: whatever both logs say of it, hashes and numbers of tokens, is equal."""
    for key, value in a["identity"].items():
        if b["identity"].get(key, value) != value:
            return False
    return True


def is_swept(run: dict) -> bool:
    """Whether a run or series is of a sweep over learning rates, by its name."""
    return run["row"] != run["series"]


def choose_rates(runs: list, listed: list[Run]) -> None:
    """Note in best_of_sweep, for runs at the best learning rate of their row, what the row is called: the rate with the
    least mean of best losses over the seeds by which the manifest chooses. Those runs are of no other series; a run
    that helps to choose has none. A row that lacks one of its rates has no best one."""
    rates, choosing = {}, set()                            # {row: its series}, names of runs
    for run in listed:
        if run.for_rate:
            rates.setdefault(run.row, set()).add(run.series)
            choosing.add(run.name)
    losses = {}                                            # {row: {series: best losses}}
    for run in runs:
        if run["run"] in choosing:
            losses.setdefault(run["row"], {}).setdefault(run["series"], []).append(run["best_val_loss"])
    best = {}
    for row, of_series in losses.items():
        if of_series.keys() >= rates[row]:
            best[min(sorted(of_series), key=lambda series: statistics.mean(of_series[series]))] = row
    for run in runs:
        run["best_of_sweep"] = None if run["run"] in choosing else best.get(run["series"])


# -----------------------------------------------------------------------------
# Series

def interval(values: list) -> dict:
    mean, half = mean_interval(values)
    return dict(mean=mean, half=half)


def alike(run: dict, first: dict) -> bool:
    """Whether two runs have the data, schedule and points of evaluation in common that one mean of them needs."""
    if not same_settings(run, first):
        return False
    return column(run["curve"], 0) == column(first["curve"], 0)


def same_settings(a: dict, b: dict) -> bool:
    """Whether two runs or series have data, batch, context and steps in common."""
    return keep(a, "steps", "batch", "context") == keep(b, "steps", "batch", "context") and same_data(a, b)


def keep(record: dict, *names: str) -> dict:
    return {name: record[name] for name in names}


def series_caches(members: list) -> dict:
    """{format of the cache: loss, its difference from fp16, bytes} of the formats that all members were measured in."""
    measured = column(members, "caches")
    shared = set(measured[0]).intersection(*measured)
    if "fp16" not in shared:
        return {}
    caches, plain = {}, column(measured, "fp16", "loss")
    for name, cache in measured[0].items():
        if name in shared:
            losses = column(measured, name, "loss")
            caches[name] = dict(interval(losses), delta=interval(list(map(operator.sub, losses, plain))),
                                bytes_per_token=cache["bytes_per_token"])
    return caches


def make_series(runs: list) -> tuple[list, list]:
    """(one dict per series: what its runs share, its seeds, mean and half-width of the interval of its losses, also
    through formats of the cache; a line on each run that doesn't fit its series)."""
    grouped, series, problems = {}, [], []
    for run in runs:
        grouped.setdefault(run["best_of_sweep"] or run["series"], []).append(run)
    for name, candidates in grouped.items():
        first, members = candidates[0], []
        for run in candidates:
            if alike(run, first):
                members.append(run)
            else:
                problems.append(f"{run['run']}: other data or settings than {first['run']}, left out of the series")
        series.append(one_series(name, members))
    mark_matched(series)
    return series, problems


def one_series(name: str, members: list) -> dict:
    """What the runs of a series share, and their means."""
    first, speeds = members[0], known(column(members, "tokens_per_second"))
    series = dict(
        series=name, **keep(first, "row", "mode", "label", "score_channels", "data", "identity", "context", "batch",
                            "steps", "lr", "params", "kv_bytes_fp16", "layers"),
        runs=column(members, "run"), seeds=column(members, "seed"), caches=series_caches(members),
        last_val_loss=interval(column(members, "last_val_loss")),
        best_val_loss=interval(column(members, "best_val_loss")),
        tokens_per_second=statistics.median(speeds) if speeds else None, **mean_curves(members))
    if name == first["best_of_sweep"]:
        series["row"] = name                               # no longer a rate among others
    return series


def mean_curves(members: list) -> dict:
    """Curves of a series: [tokens, mean validation loss, half-width] at every evaluation, [tokens, mean training
    loss] where all logged the same steps."""
    curve, train_curve = [], []
    for points in zip(*column(members, "curve")):
        tokens, losses = zip(*points)
        curve.append([tokens[0], *mean_interval(list(losses))])
    for points in zip(*column(members, "train_curve")):
        tokens, losses = zip(*points)
        if len(set(tokens)) == 1:
            train_curve.append([tokens[0], rounded_mean(losses)])
    return dict(curve=curve, train_curve=train_curve)


def mark_matched(series: list) -> None:
    """Note which series have the parameters of a standard series of the same data and schedule."""
    for member in series:
        member["matched"] = False
        for other in series:
            if (other["mode"] == "standard" != member["mode"] and comparable(member, other)
                    and abs(member["params"] / other["params"] - 1) < SAME_PARAMETERS):
                member["matched"] = True
        if member["matched"]:
            member["label"] += " matched"


def experiment(series: dict) -> str:
    """<group>/<set> of a series that the manifest lists or could list; "" for a user's own."""
    parts = series["series"].split("/")
    return "/".join(parts[:2]) if len(parts) == 3 else ""


def comparable(a: dict, b: dict) -> bool:
    """Whether two series share data, batch, context and steps, and are of one set of the manifest, which holds equal
    what else matters."""
    return same_settings(a, b) and experiment(a) == experiment(b)


def panels(series: list) -> list:
    """[(title, series)]: those of one set, data, context, batch and number of steps. Of sweeps over the learning rate,
    which have their own figure, the best rates; of sets named lr, which only choose a rate, none."""
    return titled([member for member in series if not is_swept(member) and not in_rate_set(member)])


def in_rate_set(series: dict) -> bool:
    """Whether a series is in a set named lr: <group>/lr/<row>."""
    return series["series"].split("/")[-2:-1] == ["lr"]


def rate_panels(series: list) -> list:
    """[(title, series)] of the sweeps over learning rates."""
    return titled(list(filter(is_swept, series)))


def titled(series: list) -> list:
    """[(title, the series that can be compared)], by title: set, data, batch and steps, and where two data share a
    name, the start of its hash."""
    groups = []
    for member in series:
        for group in groups:
            if comparable(member, group[0]):
                group.append(member)
                break
        else:
            groups.append([member])
    pairs = []
    for group in groups:
        first = group[0]
        name = first["data"]
        for other in groups:
            if other[0]["data"] == first["data"] and not same_data(other[0], first):
                name = f"{first['data']} ({first['identity']['sha256']:.6})"
        if experiment(first):
            name = f"{experiment(first)}: {name}"
        pairs.append((f"{name}, {first['batch']} x {first['context']}, {first['steps']:,} steps", group))
    return sorted(pairs, key=lambda pair: pair[0])


# -----------------------------------------------------------------------------
# Measurements of eval_dba.py

def keep_ppl(result: dict) -> dict:
    model = Config(**read_config(result["model"]["config"]))
    bits = 8 * result["bytes_per_token"] / sum(model.attention.streams.values()) / model.layers
    return dict(keep(result, *COMMANDS["ppl"]), bits_per_value=bits)


def keep_tasks(result: dict) -> dict:
    tasks = {}
    for name, task in result["tasks"].items():
        tasks[name] = {key: value for key, value in task.items() if key not in ("items", "correct")}
    return tasks


def keep_probes(result: dict) -> dict:
    for row in [*result["counts"], *result["compare"]]:
        for name in CHECKS:
            if len(row[name]) != 3:
                raise ValueError("a count or comparison of probes has three numbers")
    return dict(compare=result["compare"], counts=[count for count in result["counts"] if count["kind"] == "all"])


def left_out(record: dict) -> list:
    """Energy of a head's score beyond its first 1, 2, ... singular values, the median over heads, as far as it is
    drawn. A file that holds whole spectra [H][w] in place of it is from before November 25, 2026."""
    if "left_out" in record:
        energies = record["left_out"]
    else:
        energies, widths = [], min(map(len, record["spectra"]))
        for r in range(1, widths):
            beyond = [sum(spectrum[r:]) for spectrum in record["spectra"]]
            energies.append(float(f"{statistics.median(beyond):.4g}"))
    check(energies, list_of(number), "left_out")
    return [energy for energy in energies if energy >= LEAST_ENERGY]


def keep_rank(result: dict) -> dict:
    """Per path, stage of RoPE and matrix: medians over layers of the ranks, trained and at initialisation; of QK what
    narrower scores leave out, layer by layer."""
    places = {}
    for stage in ("trained", "initial"):
        for record in result[stage]:
            place = record["path"], record["rope"], record["of"]
            row = places.setdefault(place, dict(keep(record, "path", "rope", "of", "channels"), trained=[], initial=[]))
            row[stage].append(record)
    for row in places.values():
        for stage in ("trained", "initial"):
            row[stage] = stage_medians(row[stage], drawn=row["rope"] in ("after", "none"))
    return dict(keep(result, "moment", "tokens", "block"), rows=list(places.values()))


def stage_medians(records: list, drawn: bool) -> dict:
    """Medians over the records of layers, and where that is drawn, what narrower scores leave out of each."""
    medians = {}
    for name in RANKS:
        medians[name] = statistics.median(column(records, "ranks", name))
    if "share" in records[0]:
        medians["share"] = {}
        for width in records[0]["share"]:
            shares = column(records, "share", width)
            check(shares, list_of(number), "share")
            medians["share"][width] = statistics.median(shares)
        if drawn:
            medians["left_out"] = list(map(left_out, records))
    return medians


def keep_policy(result: dict) -> dict:
    kept = keep(result, "formats", "rotate", "residual", "bytes_per_token", "bytes_per_token_with_residual",
                "thresholds", "short", "long", "kernel", "kernel_ms")
    settings = keep(result["settings"], *COMMANDS["policy"]["settings"])
    block = result.get("block", result["model"]["config"]["block"])
    return dict(kept, tried=len(result["tried"]), settings=settings, block=block)


def keep_rows(result: dict) -> list:
    return result["rows"]


def keep_latency(result: dict) -> list:
    """The rows, which must hold every format, fp16 among them, at every length of prompt."""
    rows, of_prompt = result["rows"], {}
    for row in rows:
        of_prompt.setdefault(row["prompt"], set()).add(row["cache"])
    formats = set(column(rows, "cache"))
    for prompt, timed in of_prompt.items():
        if "fp16" not in timed or timed != formats:
            raise ValueError(f"not every format was timed at {prompt} tokens")
    return rows


def keep_sweep(result: dict) -> dict:
    return keep(result, "formats", "rows")


def keep_mask(result: dict) -> dict:
    return {name: result.get(name, []) for name in ("summary", "gradients", "costs")}


KEPT = {"ppl": keep_ppl, "tasks": keep_tasks, "probes": keep_probes, "rank": keep_rank, "policy": keep_policy,
        "latency": keep_latency, "memory": keep_rows, "sweep": keep_sweep, "mask": keep_mask}


def read_evals(root: Path) -> tuple[dict, list]:
    """({run folder: {file without eval_: its command, what is kept of its result, and `from`: hardware, commit}}, a
    line on each file that was left out)."""
    evals, problems = {}, []
    for path in sorted([*root.rglob("eval_*.json"), *root.rglob("kv_policy.json")]):
        folder = path.parent
        try:
            str(path.relative_to(root)).encode()           # which results have to hold
            result = read_json(path, RESULT)
            env, command = result["env"], result["settings"]["command"]
            check(result, COMMANDS[command], path.stem)
            kept = {"command": command, "result": KEPT[command](result), "from": dict(
                keep(env, "commit", "dirty"), hardware=hardware_name(env), dtype=result["settings"]["dtype"],
                context=result["model"]["config"]["block"])}
        except UserError as e:
            problems.append(f"{e}; left out")
        except UNREADABLE as e:
            problems.append(f"{path} is damaged ({brief(e)}); left out")
        else:
            name = folder.name if folder == root else folder.relative_to(root).as_posix()
            evals.setdefault(name, {})[path.stem.removeprefix("eval_")] = kept
    return evals, problems


def read_surgery(root: Path) -> tuple[dict, list]:
    """({run folder: {row: bytes, as a share of the teacher's, and texts: {text: KL of its windows}}}, a line on each
    file that was left out)."""
    surgery, problems = {}, []
    for path in sorted(root.rglob("surgery.json")):
        try:
            rows = {}
            for name, row in read_json(path, SURGERY)["rows"].items():
                measured = {text: each for text, each in row.items() if isinstance(each, dict) and "kls" in each}
                check(measured, map_of(TEXT), name)
                rows[name] = dict(bytes=row["bytes"], texts={text: each["kls"] for text, each in measured.items()})
            surgery[path.parent.relative_to(root).as_posix()] = rows
        except UserError as e:
            problems.append(f"{e}; left out")
        except UNREADABLE as e:
            problems.append(f"{path} is damaged ({brief(e)}); left out")
    return surgery, problems


def of_command(evals: dict, command: str):
    """Yield (run folder, name, result) of every result of a command."""
    for run, files in evals.items():
        for name, file in files.items():
            if file["command"] == command:
                yield run, name, file["result"]


def caches(evals: dict, run: str) -> dict:
    """{cache: what ppl measured} of a run folder."""
    of_run = {}
    for folder, name, result in of_command(evals, "ppl"):
        if folder == run:
            of_run[name.removeprefix("ppl_")] = result
    return of_run


def take_caches(evals: dict, run: str) -> dict:
    """The same, taken out of evals: what was measured of a finished run stands with the run."""
    taken = caches(evals, run)
    for cache in taken:
        del evals[run][f"ppl_{cache}"]
    if run in evals and not evals[run]:
        del evals[run]
    return taken


def read_benchmarks(folder: Path) -> tuple[dict, list]:
    """({name: result} of the benchmarks that were measured; under "devices" what bench_dba.py measured of other
    machines; a line on each damaged one)."""
    devices, problems = read_devices(folder)
    benchmarks = dict(devices=devices) if devices else {}
    for name, shape in BENCHMARKS.items():
        path = folder / f"{name}.json"
        if path.exists():
            try:
                benchmarks[name] = read_json(path, shape)
            except UserError as e:
                problems.append(f"{e}; left out")
    return benchmarks, problems


def read_devices(folder: Path) -> tuple[list, list]:
    """(blocks of bench_dba.py that were measured on GPUs, rehearsals left out: name, block, env, rows; a line on each
    damaged one)."""
    devices, problems = [], []
    for path in sorted(folder.glob("*/*.json")):
        try:
            document = read_json(path, DEVICE)
            if document["block"] in BLOCKS and not document["toy"] and document["env"]["device"] != "cpu":
                read_json(path, dict(rows=BLOCKS[document["block"]]))
                devices.append(dict(keep(document, "block", "env", "rows"), name=f"{path.parent.name}/{path.stem}"))
        except UserError as e:
            problems.append(f"{e}; left out")
    return devices, problems


# -----------------------------------------------------------------------------
# All of it

def finished(runs: list, listed: dict[str, list[Run]]) -> dict:
    """{group/set: (finished, listed)} of {group: runs that the manifest lists}."""
    names, counts = set(column(runs, "run")), {}
    for members in listed.values():
        for run in members:
            name = run.row.rsplit("/", 1)[0]
            done, total = counts.get(name, (0, 0))
            counts[name] = (done + int(run.name in names), total + 1)
    return counts


def collect(root: Path, listed: dict[str, list[Run]]) -> dict:
    """Everything under root. listed: {group: runs of the manifest}."""
    runs, problems = read_runs(root)
    evals, damaged = read_evals(root)
    surgery, unread = read_surgery(root)
    benchmarks, broken = read_benchmarks(root / "bench")
    for run in runs:
        run["caches"] = take_caches(evals, run["run"])
    choose_rates(runs, list(itertools.chain.from_iterable(listed.values())))
    series, odd = make_series(runs)
    return dict(runs=runs, series=series, evals=evals, surgery=surgery, benchmarks=benchmarks,
                manifest=finished(runs, listed), problems=[*problems, *damaged, *unread, *broken, *odd])


def split_by_group(results: dict) -> dict:
    """{file name: content}: results.json; beside it evals.json and surgery.json, and every run,
    runs_<group>.json or, of runs without one, runs.json."""
    apart = ("evals", "surgery", "runs", "problems")
    files = {"results.json": {key: value for key, value in results.items() if key not in apart},
             "evals.json": results["evals"], "surgery.json": results["surgery"]}
    for run in results["runs"]:
        parts = run["run"].split("/")
        name = f"runs_{parts[0]}.json" if len(parts) > 1 else "runs.json"
        kept = {key: value for key, value in run.items() if key != "train_curve"}
        files.setdefault(name, {"runs": []})["runs"].append(kept)
    return files
