"""
Measure a checkpoint.

    python3 eval_dba.py ppl --ckpt runs/demo/decoupled --kv-cache fp16 hetero q4_0
    python3 eval_dba.py latency --ckpt runs/demo/decoupled --contexts 128 1024 8192
    python3 eval_dba.py tasks --ckpt runs/demo/decoupled --tasks piqa boolq --tasks-dir data/eval --limit 200
    python3 eval_dba.py ppl --ckpt SmolLM2.q8_0.gguf --data wiki.test.tokens --kv-cache q4_0

--ckpt is a run folder (its best.pt), a checkpoint, or a pretrained Llama as a .gguf file or a Hugging Face folder. A
command prints a short table and writes a file with its settings, the hash of its data and the hardware, beside the
checkpoint or where --out says: eval_ppl_<cache>.json for each cache, eval_probes.json and eval_tasks.json (with
_<cache> unless that is the default), kv_policy.json, else eval_<command>.json, with the spectra of rank in
eval_rank.npz. <cache> is a --kv-cache, with _rotated and _residual<n> where given. A --kv-cache is one format for all
that is cached, hetero (k_sem q4_0, k_geo q8_0, v q4_0), or a format for each stream: k=q4_0,v=q3_0.
"""

import argparse
import math
import sys

from evals import policy, ppl, probes, rank, tasks, timing
from evals.tasks import TASKS
from evals.timing import COMPARED, WARM_UP
from train_dba import FORMATS, Parser, exit_code

CACHES = (*FORMATS, "hetero")


# -----------------------------------------------------------------------------
# Flags

def positive(least=1):
    """Type of a flag: a whole number of at least `least` that tensors can be sized by."""
    def parse(text):
        if not least <= (value := int(text)) < 2**53:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least} and below 2**53")
        return value
    parse.__name__ = "whole number"                        # by which argparse calls it: invalid whole number value: 'x'
    return parse


def number(text):
    """Type of a flag: a finite number of at least 0."""
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a finite number of at least 0")
    return value


def add_data(p):
    p.add_argument("--data", help=".npy or text (the checkpoint's validation part)")


def cache(text):
    """Type of a flag: the format of a cache, or of each of its streams."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    known = all(stream and fmt in FORMATS for stream, _, fmt in pairs)
    if text not in CACHES and not (known and len({stream for stream, _, _ in pairs}) == len(pairs)):
        raise argparse.ArgumentTypeError(f"{text} is neither a format ({', '.join(CACHES)}) nor one for each stream, "
                                         "such as k=q4_0,v=q3_0")
    return text


def add_caches(p, **kwargs):
    p.add_argument("--kv-cache", type=cache, metavar="FORMAT", **kwargs)


def add_cache_changes(p, rotate=True):
    p.add_argument("--kv-residual", type=positive(0), default=0, help="newest tokens that stay fp16 (0)")
    if rotate:
        p.add_argument("--kv-rotate", action="store_true", help="rotate what is cached")


def add_contexts(p, least, default, help, dest):
    """dest: what results call them."""
    p.add_argument("--contexts", dest=dest, type=positive(least), nargs="+", default=default, metavar="N",
                   help=f"{help} ({' '.join(map(str, default))})")


def add_kernel(p):
    p.add_argument("--kernel", default="auto", choices=("auto", "torch", "triton", "metal"))


def ppl_flags(p):
    add_data(p)
    add_caches(p, nargs="+", default=["fp16"], help="one or several, compared with fp16 if that is among them (fp16)")
    add_cache_changes(p)
    p.add_argument("--block", type=positive(2), help="tokens of a window (the model's context)")
    p.add_argument("--stride", type=positive(), help="tokens between windows (half a window)")
    p.add_argument("--batch-size", type=positive(), default=8, help="windows at once (8)")
    p.add_argument("--max-tokens", type=positive(2), help="measure only the first so many tokens")


def tasks_flags(p):
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], metavar="TASK", help=f"{', '.join(TASKS)}")
    p.add_argument("--tasks-dir", metavar="DIR", help="local data in the hub's fields: DIR/<task>_valid.jsonl, and "
                   "arc_easy_test.jsonl (the Hugging Face hub)")
    add_caches(p, default="fp32", help="format of the cache that texts are read through (fp32)")
    add_cache_changes(p)
    p.add_argument("--limit", type=positive(), help="only the first so many items of each task")
    p.add_argument("--batch-size", type=positive(), default=8, help="texts at once (8)")
    p.add_argument("--compare", metavar="RESULT", help="another result of this command, to test against item by item")


def probes_flags(p):
    add_caches(p, default="fp16", help="format of the cache (fp16)")
    add_cache_changes(p)
    p.add_argument("--instances", type=positive(), default=50, help="cases made of each template (50)")
    p.add_argument("--seed", type=positive(0), default=0, help="seed of the templates (0)")
    p.add_argument("--max-new-tokens", type=positive(), default=96, help="tokens of an output (96)")
    p.add_argument("--batch-size", type=positive(), default=32, help="cases at once (32)")
    p.add_argument("--compare", metavar="RESULT", help="another result of this command, to test the difference")


def latency_flags(p):
    add_contexts(p, 1, [128, 512, 2048, 8192], "tokens of the prompts", "prompts")
    add_caches(p, nargs="+", help=f"compared with fp16 ({' '.join(COMPARED)})")
    add_kernel(p)
    p.add_argument("--steps", type=positive(), default=64, help="decode steps (64)")
    p.add_argument("--prefills", type=positive(), default=3, help="times that a prompt is read (3)")


def memory_flags(p):
    add_contexts(p, 4 * WARM_UP, [2**n for n in range(9, 15)], "tokens of the cache", "tokens")
    add_caches(p, nargs="+", help=f"compared with fp16 ({' '.join(COMPARED)})")
    add_cache_changes(p, rotate=False)
    add_kernel(p)


def sweep_flags(p):
    add_data(p)
    add_caches(p, default="fp16", help="format of the cache (fp16)")
    add_cache_changes(p)
    add_contexts(p, 1, [2**n for n in range(11, 18)], "tokens of the prompts", "contexts")
    p.add_argument("--chunk", type=positive(), default=1024, help="prompt tokens per forward pass (1024)")
    p.add_argument("--steps", type=positive(), default=128, help="decode steps (128)")
    add_kernel(p)
    p.add_argument("--max-seconds", type=number, default=600, help="of a context; longer ones are not run (600)")


def rank_flags(p):
    add_data(p)
    p.add_argument("--max-tokens", dest="tokens", type=positive(), help="tokens to measure over (20 per query channel, "
                   "if there are)")
    p.add_argument("--block", type=positive(), help="tokens of a window (the model's context)")
    p.add_argument("--batch-size", type=positive(), default=8, help="windows at once (8)")
    p.add_argument("--centred", action="store_true", help="second moments about the mean, not about zero")


def policy_flags(p):
    add_data(p)
    p.add_argument("--max-kv-bytes-per-token", type=positive(), help="budget: the least loss in so many bytes")
    p.add_argument("--max-delta-nll", type=number, help="budget: the fewest bytes for so much loss, nats per token")
    p.add_argument("--max-kl", type=number, default=0.02, help="largest mean KL of the next token (0.02)")
    p.add_argument("--max-delta-logit", type=number, help="largest difference of any logit (not limited)")
    p.add_argument("--block", type=positive(2), help="tokens of a window (the model's context)")
    p.add_argument("--max-tokens", dest="tokens", type=positive(), default=16384, help="calibration tokens (16384)")
    p.add_argument("--long", action="store_true", help="check the choice on longer windows too")
    p.add_argument("--long-factor", type=positive(2), default=4, help="their length in windows (4)")
    p.add_argument("--kernel-tokens", type=positive(64), default=8192, help="length at which kernels are timed (8192)")
    p.add_argument("--batch-size", type=positive(), default=8, help="windows at once (8)")


# -----------------------------------------------------------------------------
# Main

COMMANDS = {
    "ppl": (ppl.main, ppl_flags),
    "tasks": (tasks.main, tasks_flags),
    "probes": (probes.main, probes_flags),
    "latency": (timing.latency_main, latency_flags),
    "memory": (timing.memory_main, memory_flags),
    "sweep": (timing.sweep_main, sweep_flags),
    "rank": (rank.main, rank_flags),
    "policy": (policy.main, policy_flags),
}


def make_parser():
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, add_flags) in COMMANDS.items():
        p = commands.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
        p.add_argument("--ckpt", required=True, help="run folder, checkpoint, .gguf or Hugging Face folder")
        p.add_argument("--device", default="auto")
        p.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16", "float16"))
        p.add_argument("--out", help="file.json, or folder of the result files (the checkpoint's)")
        add_flags(p)
        p.set_defaults(run=run)
    return parser


@exit_code("lower the numbers that were given, or those of the model")
def main(argv=None):
    args = make_parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
