"""The work of `convert_dba.py mask`: learn gates in steps that can be interrupted, set them to a KL, measure them."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import pickle
import statistics
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import train_dba
from evals.subject import Report, Subject, json_text, load_subject, quiet
from evals.timing import forget_peak, peak_since
from surgery.mask import (
    Gates,
    Host,
    Point,
    Sparse,
    equal_loss,
    learn_logits,
    learn_mass,
    load_gates,
    plain_attention,
    refuse_unknown,
    save_gates,
    survey,
    window,
)
from surgery.measure_mask import (
    Choice,
    Reference,
    controls,
    gate_point,
    gate_top,
    gradient_cosines,
    summary,
)
from surgery.sparse_attention import Grid
from train_dba import BROKEN, UserError, brief, file_hash, whole_number

WARM, COLD = 1.0, 0.1                                      # of the sigmoid, in nats of a block's share
DROPPED = 0.01                                             # heads that read less of their far blocks drop their keys
STRIDE, TRIALS = 1.5, 4                                    # nats between shifts until a KL is between two; tries a KL
GRADIENTS = ("oracle mass 0.9", "window 10", "gates KL")   # choices whose gradients are looked at, by their beginnings
SAVE_EVERY = 4                                             # steps
SURVEYED = 4                                               # windows that indices and first thresholds are fitted to
AFTER_ALL = 2**31                                          # steps: their windows are none that a step learns from
RECORD = {"text": str, "ids?": str, "length": whole_number, "start": whole_number, "choice": str}


@dataclass(frozen=True)
class Plan:
    """What is learned from what: that of a folder never changes."""
    block: int
    rows: int
    index_bits: float
    lengths: list[int]
    mass_steps: int
    updates: int
    lost: float
    logits_steps: int
    logits_length: int
    kl: list[float]
    lr: float
    seed: int
    model: str                                             # sha256
    data: str

    @property
    def steps(self) -> int:
        return self.mass_steps + self.logits_steps


# -----------------------------------------------------------------------------
# Learning

def open_host(path: str, device: str) -> tuple[Host, Subject]:
    """The model of --model and the Subject that reads texts in its tokens. Raises UserError."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        subject = load_subject(path, device)
        return Host(subject.model), subject
    from convert_dba import LlamaTokenizer
    try:
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as e:
        raise UserError(f"{path} needs {e.name}: pip install -r requirements-eval.txt") from None
    try:
        local = dict(local_files_only=True, trust_remote_code=False)            # nor ask whether to run a folder's code
        config = AutoConfig.from_pretrained(folder, **local)
        refuse_unknown(config)
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, use_safetensors=True,
                                                     **local)
        tokenizer = LlamaTokenizer(AutoTokenizer.from_pretrained(folder, **local), config.vocab_size)
    except (*BROKEN, OSError, RuntimeError, SafetensorError, StrictDataclassError) as e:
        raise UserError(f"{path} can't be read as a language model of transformers ({brief(e)})") from None
    device = train_dba.pick_device(device)
    subject = Subject(model.to(device), tokenizer, folder, None, file_hash(folder), device, torch.float32)
    return Host(model), subject


def plan_of(flags: dict, subject: Subject) -> Plan:
    """The Plan of the command's flags. Raises UserError for values that can't be."""
    for name in ("rows", "calibration", "updates"):
        if flags[name] < 1:
            raise UserError(f"--{name} {flags[name]}: at least 1")
    for name in ("mass_steps", "logits_steps", "seed"):
        if flags[name] < 0:
            raise UserError(f"--{name.replace('_', '-')} {flags[name]}: at least 0")
    if not 0 <= flags["index_bits"] <= 6:
        raise UserError(f"--index-bits {flags['index_bits']}: from 0, which is four vectors a block, to 6")
    if flags["block"] % flags["rows"]:
        raise UserError(f"--rows {flags['rows']} doesn't divide --block {flags['block']}")
    if not all(0 < x < math.inf for x in (*flags["kl"], flags["lr"])) or not 0 < flags["lost"] < 1:
        raise UserError("--kl and --lr are above 0 and finite, --lost between 0 and 1")
    if min(flags["budgets"]) < 3:
        raise UserError(f"--budgets {min(flags['budgets'])}: a query reads 3 blocks at least")
    sources = dict(model=subject.sha256, data=file_hash(flags["data"]))
    return Plan(**{field.name: {**flags, **sources}[field.name] for field in dataclasses.fields(Plan)})


def windows_of(flags: dict) -> dict[int, int]:
    """{length: windows of it} to measure on. Raises UserError."""
    lengths, counts = flags["eval_lengths"], flags["windows"]
    if min(counts) < 1:
        raise UserError(f"--windows {min(counts)}: at least 1")
    if len(counts) not in (1, len(lengths)):
        raise UserError(f"--windows has {len(counts)} numbers, --eval-lengths {len(lengths)}: one, or as many")
    return dict(zip(lengths, counts * len(lengths) if len(counts) == 1 else counts))


def check_lengths(plan: Plan, host: Host, ids: torch.Tensor, texts: dict, windows: dict[int, int]) -> None:
    """Raise UserError for windows that the model or the texts are too short for."""
    for length in (*plan.lengths, plan.logits_length, *(windows if texts else [])):
        if not 4 * plan.block <= length <= host.most:
            raise UserError(f"a window of {length} tokens: from {4 * plan.block}, which is four blocks, to the "
                            f"{host.most} that the model reads")
    if len(ids) < max(*plan.lengths, plan.logits_length):
        raise UserError(f"--data has {len(ids):,} tokens, fewer than a window of {max(plan.lengths)}")
    for name, text in texts.items():
        for length, count in windows.items():
            if len(text) // count <= length:
                raise UserError(f"{name} has {len(text):,} tokens: too few for {count} windows of {length}")


@contextlib.contextmanager
def held(folder: Path):
    """Make a folder and hold its lock. Raises UserError, also where it is a model's."""
    if (folder / "best.pt").exists():
        raise UserError(f"--out-dir {folder} holds best.pt of another run; use another --out-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with train_dba.exclusive(folder / "lock", folder):
            yield
    except OSError as e:
        raise UserError(f"--out-dir {folder} can't be used ({brief(e)})") from None


def optimizers_of(gates: Gates, plan: Plan, step: int) -> list[torch.optim.Optimizer]:
    """Those of the stage that a step belongs to: one for each layer, then one for all with the thresholds."""
    if step < plan.mass_steps:
        return [torch.optim.Adam(gate.parameters(), lr=plan.lr) for gate in gates.layers]
    return [torch.optim.Adam([dict(params=gates.layers.parameters(), lr=plan.lr / 4),
                              dict(params=[gates.thresholds], lr=plan.lr * 4)])]


def rate_at(done: float) -> float:
    """The share of the learning rate after a share of a stage: half a cosine down to a twentieth."""
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def learn(host: Host, ids: torch.Tensor, plan: Plan, folder: Path, report: Report = quiet) -> Gates:
    """Gates learned by a plan from ids [N], going on with what the folder has. Writes last.pt and train.jsonl."""
    gates = Gates(len(host.attentions), host.heads, host.groups, host.width, plan.block, plan.rows, plan.index_bits)
    gates, last = gates.to(host.device), folder / "last.pt"
    begun = last.exists()
    step, price, optimizers = resume(last, plan, gates)
    keep_lines(folder / "train.jsonl", step)

    def save():
        content = dict(plan=dataclasses.asdict(plan), step=step, price=price, gates=gates.state_dict(),
                       optimizers=[optimizer.state_dict() for optimizer in optimizers])
        train_dba.write_whole(last, partial(save_to, content))

    if not begun:
        passes = SURVEYED * (2 if plan.index_bits else 1)
        counter = itertools.count(1)

        def texts():
            for i in range(SURVEYED):
                yield window(ids, plan.lengths[i % len(plan.lengths)], plan.seed, AFTER_ALL + i).to(host.device)
                report(next(counter), passes)

        if plan.index_bits:
            survey(host, gates, texts())
        equal_loss(host, gates, texts(), plan.lost)
        save()
    while step < plan.steps:
        started, mass = time.monotonic(), step < plan.mass_steps
        if step == plan.mass_steps:
            optimizers = optimizers_of(gates, plan, step)
        done = step / plan.mass_steps if mass else (step - plan.mass_steps) / plan.logits_steps
        for optimizer, fresh in zip(optimizers, optimizers_of(gates, plan, step)):
            for group, its_fresh in zip(optimizer.param_groups, fresh.param_groups):
                group["lr"] = its_fresh["lr"] * rate_at(done)
        length = plan.lengths[step % len(plan.lengths)] if mass else plan.logits_length
        batch = window(ids, length, plan.seed, step).to(host.device)
        if mass:
            line = dict(type="mass", kl_of_mass=learn_mass(host, gates, batch, optimizers, plan.updates))
        else:
            temperature = WARM * (COLD / WARM) ** done
            kl, kept = learn_logits(host, gates, batch, temperature, price, plan.kl[-1])
            optimizers[0].step()
            optimizers[0].zero_grad()
            line = dict(type="logits", kl=kl, kept=kept, price=price, temperature=temperature)
            price *= math.exp(0.3 * max(-1.0, min(1.0, kl / plan.kl[-1] - 1)))  # dual ascent
        step += 1
        if not all(p.isfinite().all() for p in gates.parameters()):
            raise UserError(f"step {step}: the gates aren't finite any more; use another --out-dir, and a lower --lr "
                            "or a larger --kl")
        if step == plan.mass_steps:
            equal_loss(host, gates, [batch], plan.lost)
        train_dba.append_line(folder / "train.jsonl", step=step, tokens=length, **line,
                              seconds=round(time.monotonic() - started, 2))
        if step % SAVE_EVERY == 0 or step in (plan.mass_steps, plan.steps):
            save()
        report(step, plan.steps)
    return gates.requires_grad_(False)


def resume(path: Path, plan: Plan, gates: Gates) -> tuple[int, float, list[torch.optim.Optimizer]]:
    """(step, price, optimizers) where last.pt left off, whose gates are put in; those of a beginning where there is
    none. Raises UserError for that of another plan."""
    if not path.exists():
        return 0, 1.0, optimizers_of(gates, plan, 0)
    try:
        with open(path, "rb") as f:
            train_dba.verify_records(f)
            state = torch.load(f, weights_only=True)
        for name, value in dataclasses.asdict(plan).items():
            if state["plan"].get(name) != value:
                raise UserError(f"{path.parent} holds gates learned with {name} {state['plan'].get(name)}, not "
                                f"{value}; use another --out-dir")
        optimizers = optimizers_of(gates, plan, max(state["step"] - 1, 0))
        gates.load_state_dict(state["gates"])
        for optimizer, its_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        return state["step"], state["price"], optimizers
    except (*BROKEN, OSError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} can't be read ({brief(e)}); use another --out-dir") from None


def save_to(content: dict, path: Path) -> None:
    with open(path, "wb") as f:                            # by its name alone, PyTorch doesn't say that a disk is full
        torch.save(content, f)


def keep_lines(path: Path, step: int) -> None:
    """Drop what a log says of steps after `step`, which will be done again, and a torn last line. Raises UserError for
    the log of something else."""
    lines = train_dba.read_log(path)
    if strange := {line["type"] for line in lines} - {"mass", "logits"}:
        raise UserError(f"{path} is the log of another run, with lines of type {min(strange)}; use another --out-dir")
    write_lines(path, [line for line in lines if line.get("step", 0) <= step])


def write_lines(path: Path, lines: list[dict]) -> None:
    train_dba.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


# -----------------------------------------------------------------------------
# Operating points

def best_shift(target: float, kls: dict[float, float]) -> tuple[float | None, float]:
    """Of {shift: KL}, the largest shift up to which every KL stays within the target (None: not even the smallest
    does), and the shift to try next: between that and the next larger one, or a stride further."""
    best = None
    for shift in sorted(kls):
        if not kls[shift] <= target:
            return best, shift - STRIDE if best is None else (best + shift) / 2
        best = shift
    return best, 0.0 if best is None else best + STRIDE


def set_points(host: Host, gates: Gates, ids: torch.Tensor, plan: Plan, windows: int, report: Report = quiet
               ) -> list[dict]:
    """For each KL of the plan the largest of the shifts tried that stays below it, else the smallest of all, on windows
    of the training text that no step has drawn: dict(target, shift, kl, kept, drops [[layer, head], ...]). drops: heads
    that read less than DROPPED of their far blocks, with all that share their keys; kl and kept are with them."""
    references = []
    for i in range(windows):
        references.append(Reference(host, window(ids, plan.lengths[0], plan.seed, plan.steps + i)[0].to(host.device)))
    seen, kls, points, group = {}, {}, [], host.heads // host.groups
    total = len(plan.kl) * (TRIALS + 1)

    def measure(point: Point) -> tuple[float, float, torch.Tensor]:
        kl, kept, far = [], [], []
        for reference in references:
            result, attention = reference.measure(partial(gate_point, gates, point), gates.block)
            kl.append(result["kl"])
            kept.append(result["kept"])
            far.append(torch.stack([attention.far[layer] for layer in range(len(gates.layers))]))
        return statistics.mean(kl), statistics.mean(kept), torch.stack(far).mean(0)

    for i, target in enumerate(plan.kl):
        for j in range(TRIALS):
            _, shift = best_shift(target, kls)
            seen[shift] = measure(Point(shift))
            kls[shift] = seen[shift][0]
            report(i * (TRIALS + 1) + j + 1, total)
        shift, _ = best_shift(target, kls)
        shift = min(kls) if shift is None else shift
        rarely = (seen[shift][2] < DROPPED).unflatten(1, (-1, group)).all(-1)   # [L, G]
        drops = rarely.repeat_interleave(group, 1)
        kl, kept, _ = measure(Point(shift, drops)) if drops.any() else seen[shift]
        points.append(dict(target=target, shift=shift, kl=kl, kept=kept, windows=windows,
                           drops=drops.nonzero().tolist()))
        report((i + 1) * (TRIALS + 1), total)
    return points


def points_of_folder(host: Host, gates: Gates, ids: torch.Tensor, plan: Plan, folder: Path, windows: int,
                     report: Report = quiet) -> dict:
    """The facts of a folder's gates.json: `points` of set_points(), which are sought where the folder lacks those of
    this plan."""
    if (folder / "gates.json").is_file():
        _, facts = load_gates(folder)
        if facts.get("plan") == dataclasses.asdict(plan) and facts.get("points"):
            if sought := [point["windows"] for point in facts["points"] if point["windows"] != windows]:
                raise UserError(f"{folder} has thresholds sought on {sought[0]} windows, not --calibration {windows}; "
                                "use another --out-dir")
            return facts
    points = set_points(host, gates, ids, plan, windows, report)
    save_gates(folder, gates, plan=dataclasses.asdict(plan), points=points)
    return load_gates(folder)[1]


def point_of(gates: Gates, record: dict) -> Point:
    """The Point of a record of set_points()."""
    drops = torch.zeros(gates.thresholds.shape, dtype=torch.bool)
    for layer, head in record["drops"]:
        drops[layer, head] = True
    return Point(record["shift"], drops.to(gates.thresholds.device))


def dropped_bytes(gates: Gates, record: dict, tokens: int) -> float:
    """The share of a cache of so many tokens that is kept: heads that drop old keys hold the sink, the block before and
    their own."""
    share = len(record["drops"]) / gates.thresholds.numel()
    return 1 - share * (1 - min(1.0, 3 * gates.block / tokens))


# -----------------------------------------------------------------------------
# Measuring

def choices_of(kinds: list[str], gates: Gates, points: list[dict], budgets: list[int]) -> dict[str, Choice | None]:
    """What is measured, by name. kinds: floor, controls, gates."""
    choices: dict[str, Choice | None] = {"bfloat16": None} if "floor" in kinds else {}
    if "controls" in kinds:
        choices |= controls(gates.block, budgets)
    if "gates" in kinds:
        together = gates.by_block()
        for record in points:
            name, point = f"gates KL {record['target']:g}", point_of(gates, record)
            choices[name] = partial(gate_point, gates, point)
            choices[f"{name}, by block"] = partial(gate_point, together, point)
        for budget in budgets:
            choices[f"gates top {budget}"] = partial(gate_top, gates, budget)
    return choices


def measure(host: Host, texts: dict[str, torch.Tensor], windows: dict[int, int], choices: dict, block: int, log: Path,
            report: Report = quiet) -> list[dict]:
    """Records of every choice on windows of every text, the same for all; what the log has of these very ids isn't
    measured again."""
    records = train_dba.read_log(log, RECORD)
    write_lines(log, records)                              # without a torn last line
    known = {(r["text"], r.get("ids"), r["length"], r["start"], r["choice"]): r for r in records}
    wanted, total = [], len(texts) * sum(windows.values()) * len(choices)
    digests = {text: hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest() for text, ids in texts.items()}
    for length, count in windows.items():
        for index in range(count):
            for text, ids in texts.items():
                start = index * (len(ids) // count)
                reference = None
                for name, choice in choices.items():
                    key = (text, digests[text], length, start, name)
                    if key not in known:
                        reference = reference or Reference(host, ids[start:start + length + 1])
                        known[key] = dict(text=text, ids=digests[text], length=length, start=start, choice=name,
                                          **reference.measure(choice, block)[0])
                        train_dba.append_line(log, **known[key])
                    wanted.append(known[key])
                    report(len(wanted), total)
    return wanted


def measure_gradients(host: Host, texts: dict[str, torch.Tensor], length: int, windows: int, choices: dict,
                      block: int) -> list[dict]:
    """The least and the median over layers of the cosine of gradients, for each choice and window."""
    rows = []
    for text, ids in texts.items():
        for index in range(windows):
            start = index * (len(ids) // windows)
            cosines = gradient_cosines(host, ids[start:start + length + 1], choices, block)
            for name, values in cosines.items():
                rows.append(dict(text=text, length=length, start=start, choice=name, least=min(values),
                                 median=statistics.median(values), below=sum(value < 0.95 for value in values),
                                 layers=len(values)))
    return rows


def measure_all(host: Host, gates: Gates, points: list[dict], texts: dict, folder: Path, flags: dict,
                report: Report = quiet) -> dict:
    """What the flags ask for: records and their summary, and where asked for gradients and costs."""
    kinds, windows = flags["measure"], windows_of(flags)
    shortest = min(windows)
    texts = {name: ids.to(host.device) for name, ids in texts.items()}
    choices = choices_of(kinds, gates, points, flags["budgets"])
    records = measure(host, texts, windows, choices, gates.block, folder / "eval.jsonl", report)
    result = dict(summary=summary(records), records=records)
    for row in result["summary"]:
        if row["choice"].startswith("gates"):
            row["index_bits"] = gates.bits_read
        for record in points:
            if row["choice"].split(",")[0] == f"gates KL {record['target']:g}":
                row["kv_kept"] = dropped_bytes(gates, record, row["length"])
    if "gradients" in kinds:
        looked_at = {name: choice for name, choice in choices.items() if name.startswith(GRADIENTS)}
        result["gradients"] = measure_gradients(host, texts, shortest, windows[shortest], looked_at, gates.block)
    if "costs" in kinds:
        result["costs"] = costs(host, next(iter(texts.values())), list(windows), gates, points, times=5)
    return result


def table(rows: list[dict]) -> list[tuple]:
    """(head, *rows) of a summary."""
    cells = [("text", "tokens", "choice", "read", "mass", "MSE", "KL", "ΔNLL", "accuracy kept")]
    for row in rows:
        half = "" if row["kl_half"] is None else f" ± {row['kl_half']:.2g}"
        mse = f"{row['mse']:.1e}" if "mse" in row else "-"
        mass = f"{row['mass']:.4f}" if "mass" in row else "-"
        accuracy = "-" if row["accuracy_kept"] is None else f"{row['accuracy_kept']:.1f} %"
        cells.append((row["text"], f"{row['windows']} x {row['length']}", row["choice"], f"{100 * row['kept']:.1f} %",
                      mass, mse, f"{row['kl']:.5f}{half}", f"{row['delta_nll']:+.4f}",
                      accuracy))
    return cells


def write(host: Host, subject: Subject, flags: dict, plan: Plan, facts: dict, result: dict) -> Path:
    """Write eval_mask.json: what was asked for, learned and measured, where."""
    settings = {name: value for name, value in flags.items() if name not in ("out_dir", "data", "eval_data", "model")}
    path = flags["out_dir"] / "eval_mask.json"
    texts = {text.name: file_hash(text) for text in flags["eval_data"]}
    model = dict(step=subject.step, sha256=subject.sha256, config=dict(
        block=host.most, layers=len(host.attentions), heads=host.heads, groups=host.groups, width=host.width))
    train_dba.write_text(path, json_text(dict(
        settings=dict(settings, dtype="float32"), model=model, plan=dataclasses.asdict(plan), points=facts["points"],
        texts=texts, env=train_dba.provenance(subject.device), **result)))
    return path


# -----------------------------------------------------------------------------
# Cost

def eager_attention(layer, q, k, v, scale, visible):
    """Attention as a matrix of all scores."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1).to(q.dtype) for x in (k, v))
    later = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).triu(1 + k.size(2) - q.size(2))
    return (q @ k.mT * scale).masked_fill(later, -torch.inf).softmax(-1) @ v


def fused_attention(layer, q, k, v, scale, visible):
    return plain_attention(q, k, v, scale)


def inputs_of(host: Host, ids: torch.Tensor, layer: int) -> tuple:
    """What a layer's attention is given on ids [1, T]: (q, k, v, scale, visible)."""
    seen = {}

    def look(at, *inputs):
        seen[at] = inputs
        return fused_attention(at, *inputs)

    host.hidden(ids, look)
    return seen[layer]


def timed_peak(device: torch.device, run: Callable[[], object], times: int) -> tuple[float, int | None]:
    """(median ms of run(), extra bytes at its peak); on a CPU ms of its own time, whatever else the machine does."""
    clock, spans = time.process_time if device.type == "cpu" else time.perf_counter, []
    before = forget_peak(device)
    for _ in range(times):
        started = clock()
        run()
        train_dba.synchronize(device)
        spans.append(1000 * (clock() - started))
    return statistics.median(spans), None if before is None else peak_since(device) - before


@torch.no_grad()
def costs(host: Host, ids: torch.Tensor, lengths: list[int], gates: Gates, points: list[dict], times: int
          ) -> list[dict]:
    """For each length and attention: ms and peak bytes of one layer's attention alone and of the whole forward pass
    without logits, with rows of whole blocks that choose together, as a prompt is read. kept is of all blocks in
    reach."""
    rows, middle, prompt = [], len(host.attentions) // 2, gates.by_block()
    for length in lengths:
        attentions = {"eager": eager_attention, "sdpa": fused_attention}
        for record in points:
            attentions[f"gates KL {record['target']:g}"] = Sparse(prompt, point_of(gates, record))
        inputs = inputs_of(host, ids[None, :length], middle)
        for name, attention in attentions.items():
            ms, extra = timed_peak(host.device, partial(attention, middle, *inputs), times)
            whole_ms, whole_extra = timed_peak(host.device, partial(host.hidden, ids[None, :length], attention), 1)
            row = dict(length=length, attention=name, layer_ms=ms, layer_bytes=extra, forward_ms=whole_ms,
                       forward_bytes=whole_extra, ms_per_token=whole_ms / length)
            if isinstance(attention, Sparse):
                q, k, _, scale, _ = inputs
                grid = Grid(1, length, length, gates.block)
                kept = prompt.keep(middle, grid, grid.pad_rows(q), grid.pad_keys(k), scale, attention.point)
                row["layer_kept"] = kept.sum().item() / (host.heads * (grid.near | grid.far).sum().item())
            rows.append(row)
    return rows
