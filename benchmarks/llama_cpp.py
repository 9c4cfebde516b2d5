"""
A decode step of a pretrained Llama through the KV cache, here and in llama.cpp, on the same threads and file.

    python3 benchmarks/llama_cpp.py data/SmolLM2-135M-Instruct.Q4_1.gguf --out runs/bench/llama_cpp.json

Needs xllamacpp (pip install xllamacpp), or --llama-cpp with the Python of an environment that has it. Each engine is a
process of its own that holds a cache of each format at each depth; they take turns, some steps each. What a cache costs
is the slope of a step's time between the first and the last depth, ms per 1,000 cached tokens: weights, which the
engines hold in different types, don't change it.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

FORMATS = ("fp16", "q8_0", "q4_0")


def prompt(tokens):
    return [(7 * i * i + 3 * i) % 40_000 + 100 for i in range(tokens)]


# -----------------------------------------------------------------------------
# The engines: functions (format, depth, steps) -> seconds of wall and of CPU time a step

def llama_cpp(path, formats, depths, threads):
    import xllamacpp

    servers = {}
    for fmt in formats:
        params = xllamacpp.CommonParams()
        params.model.path, params.verbosity = path, 0
        params.n_parallel, params.n_ctx = len(depths), len(depths) * (max(depths) + 256)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        kind = {"fp16": "F16"}.get(fmt, fmt.upper())
        params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kind}")
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        servers[fmt] = xllamacpp.Server(params)

    def steps(fmt, depth, count):
        spent = time.process_time()
        answer = servers[fmt].handle_completions(dict(prompt=prompt(depth), n_predict=count, ignore_eos=True,
                                                      id_slot=depths.index(depth), cache_prompt=True, temperature=0))
        timings = answer["timings"]                        # of its own clock; the last prompt token is decoded again
        return timings["predicted_per_token_ms"] / 1000, (time.process_time() - spent) / (count + 1)
    return steps


def ours(path, formats, depths, threads):
    import torch

    from common import train_dba
    from evals.subject import load_subject

    torch.set_num_threads(threads)
    train_dba.keep_freed_memory()
    subject = load_subject(path, "cpu", "float32")
    model, device = subject.model.requires_grad_(), subject.device              # autocast keeps casts of such alone
    dtype, _ = train_dba.pick_dtype("auto", device, lambda: train_dba.product_rates(    # as sample() picks it
        1, model.cfg.d_model, model.cfg.d_ff, training=False, layers=model.cfg.layers))
    kernel, _ = train_dba.resolve_kernel("auto", device)
    caches = {}

    @torch.no_grad()
    def steps(fmt, depth, count):
        if (fmt, depth) not in caches:
            cache = train_dba.KVCache(model.cfg, 1, depth + 256, fmt, device=device, kernel=kernel)
            for part in torch.tensor([prompt(depth)]).split(512, 1):
                model.logits(model.hidden(part, cache)[:, -1:])
            caches[fmt, depth] = cache
        cache, token = caches[fmt, depth], torch.tensor([[1]])
        cache.truncate(depth)
        started, spent = time.perf_counter(), time.process_time()
        for _ in range(count):
            token = model.logits(model.hidden(token, cache)[:, -1:]).argmax(-1)
        return (time.perf_counter() - started) / count, (time.process_time() - spent) / count

    train_dba.autocast(device, dtype).__enter__()          # for good, so that weights are cast once
    return steps


ENGINES = {"llama.cpp": llama_cpp, "ours": ours}


def serve(engine, path, formats, depths, threads):
    """Fill the caches; then answer lines "format depth count" by the seconds a step."""
    steps = ENGINES[engine](path, formats, depths, threads)
    for fmt in formats:
        for depth in depths:
            steps(fmt, depth, 2)
    print("ready", flush=True)
    for line in sys.stdin:
        fmt, depth, count = line.split()
        print(json.dumps(steps(fmt, int(depth), int(count))), flush=True)


# -----------------------------------------------------------------------------
# Both

def start(engine, python, args):
    command = [python, __file__, args.path, "--serve", engine, "--threads", str(args.threads), "--depths",
               *map(str, args.depths), "--formats", *args.formats]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while (line := process.stdout.readline()) != "ready\n":                     # llama.cpp may print, too
        if not line:
            sys.exit(f"error: {engine} has ended with exit code {process.wait()}")
    return process


def ask(process, fmt, depth, count):
    process.stdin.write(f"{fmt} {depth} {count}\n")
    process.stdin.flush()
    while not (line := process.stdout.readline()).startswith("["):
        if not line:
            sys.exit(f"error: an engine has ended with exit code {process.wait()}")
    return json.loads(line)


def main():
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="a .gguf file of a Llama")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--llama-cpp", default=sys.executable, help="Python of an environment with xllamacpp")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--depths", type=int, nargs="+", default=[2048, 6144], help="cached tokens (2048 6144)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16, help="decode steps of a turn (16)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (5)")
    parser.add_argument("--serve", choices=ENGINES, help="be one of them (for this script itself)")
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.path, args.formats, args.depths, args.threads)
        return
    pythons = {"llama.cpp": args.llama_cpp, "ours": sys.executable}
    processes = {engine: start(engine, pythons[engine], args) for engine in ENGINES}
    seconds, load = {}, os.getloadavg()[0]
    for _ in range(args.rounds):
        for fmt in args.formats:
            for depth in args.depths:
                for engine, process in processes.items():
                    seconds.setdefault((engine, fmt, depth), []).append(ask(process, fmt, depth, args.steps))
    for process in processes.values():
        process.stdin.close()
    rows, (first, last) = [], (min(args.depths), max(args.depths))
    for fmt in args.formats:
        for engine in ENGINES:
            clocks = {depth: [1000 * median(clock) for clock in zip(*seconds[engine, fmt, depth])]
                      for depth in args.depths}
            slopes = [(b - a) / (last - first) * 1000 for a, b in zip(clocks[first], clocks[last])]
            rows.append(dict(engine=engine, format=fmt, slope_ms=slopes[0], slope_cpu_ms=slopes[1],
                             ms={depth: wall for depth, (wall, _) in clocks.items()},
                             cpu_ms={depth: cpu for depth, (_, cpu) in clocks.items()}))
            print(f"{fmt} {engine:10} {slopes[0]:.2f} ms per 1,000 cached tokens ({slopes[1]:.2f} by CPU time); a step "
                  + ", ".join(f"{wall:.1f} ms at {depth:,} ({cpu:.1f})" for depth, (wall, cpu) in clocks.items()))
    if args.out:
        import torch

        from common import write
        write(args.out, torch.device("cpu"), block="llama_cpp", toy=False, load=load, threads=args.threads,
              rounds=args.rounds, steps=args.steps, rows=rows)
    for process in processes.values():
        process.wait()


if __name__ == "__main__":
    main()
