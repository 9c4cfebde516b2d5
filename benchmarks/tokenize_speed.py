"""How fast prepare_fineweb.py tokenizes, as a ratio to what tiktoken itself reaches on the same cores.

    python benchmarks/tokenize_speed.py                                    # Python's own documentation
    python benchmarks/tokenize_speed.py --input folder/of/texts            # .txt, .jsonl, .parquet

Baseline: `encode_ordinary_batch` on the documents in memory, a thread per core. Pipeline: the whole command on the
same documents in a .jsonl file, from reading the line to the sidecar's sha256: parsing, processes, files, journal and
syncs. Start-up of Python and of the tokenizer is left out of both. The two take turns; medians of the repeats.
"""

import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

import common
import prepare_fineweb as prep


def load_documents(inputs, megabytes):
    """Texts of at least so many MB, repeated where the source has less (numbered, so that no two are equal)."""
    if inputs:
        documents = prep.open_inputs(inputs)[2]
    else:
        documents = prep.read_sample
    texts = [text for text, _ in documents(None)]
    repeats = -(-int(megabytes * 1e6) // sum(map(len, texts)))
    return [f"{n} {text}" for n in range(repeats) for text in texts]


def pipeline_seconds(source, output, workers):
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prep.main(["--dataset", "text", "--tokenizer", "gpt2", "--input", str(source), "--output", str(output),
                   "--val-frac", "0", "--workers", str(workers), "--overwrite"])
    return time.perf_counter() - start


def baseline_seconds(bpe, texts, threads):
    """Seconds and tokens; the lists are freed after the clock is read."""
    start = time.perf_counter()
    ids = bpe.encode_ordinary_batch(texts, num_threads=threads)
    return time.perf_counter() - start, sum(map(len, ids))


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--input", nargs="+", type=Path, help="texts to use instead of Python's documentation")
    parser.add_argument("--megabytes", type=float, default=100, help="text per repeat [%(default)s]")
    parser.add_argument("--repeats", type=int, default=5, help="of each, taking turns [%(default)s]")
    args = parser.parse_args()

    texts = load_documents(args.input, args.megabytes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bpe = prep.GPT2Tokenizer().bpe
    rates = {"tiktoken": [], "pipeline": []}
    with tempfile.TemporaryDirectory(dir=".") as folder:       # the disk that a run would write to, not a memory disk
        source, output = Path(folder, "texts.jsonl"), Path(folder, "texts.npy")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        for repeat in range(args.repeats + 1):                 # the first one warms up
            seconds, tokens = baseline_seconds(bpe, texts, cores)
            wall = pipeline_seconds(source, output, cores)
            written = json.loads(output.with_suffix(".json").read_text())["tokens"]
            assert written == tokens + len(texts), (written, tokens, len(texts))   # the pipeline adds an eot to each
            if repeat:
                rates["tiktoken"].append(tokens / seconds)
                rates["pipeline"].append(tokens / wall)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = statistics.median(p / t for p, t in zip(rates["pipeline"], rates["tiktoken"]))
    print(f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.0f} MB, {tokens:,} tokens, {cores} cores, "
          f"median of {args.repeats}")
    for name, values in rates.items():
        print(f"{name:9s} {medians[name] / 1e6:6.2f} M tokens/s   ({min(values) / 1e6:.2f} to {max(values) / 1e6:.2f})")
    print(f"ratio     {ratio:6.3f}   (median of the pairs)")
    common.write(args.out, torch.device("cpu"), documents=len(texts), tokens=tokens, cores=cores, repeats=args.repeats,
                 tokens_per_second=rates, ratio=ratio)


if __name__ == "__main__":
    main()
