"""Text to token files: FineWeb-Edu, WikiText-2, local text, or an offline sample.

    python prepare_fineweb.py --dataset fineweb-edu --tokens 100M --output data/fineweb_100m.npy
    python prepare_fineweb.py --dataset wikitext2 --output data/wikitext2.npy
    python prepare_fineweb.py --dataset wikitext2 --input folder/with/wiki.train.tokens --output data/wikitext2.npy
    python prepare_fineweb.py --dataset text --input notes.txt corpus/ --tokenizer byte --output data/notes.npy
    python prepare_fineweb.py --dataset sample --output data/sample.npy

NAME.npy holds the token ids of the training documents, one after the other, each ended by the tokenizer's eot;
NAME.val.npy those of the validation documents. A sidecar .json beside each says what it holds. It is written last:
a .npy without one is unfinished.

    source -> batches -> worker processes, in order -> NAME.npy.part, NAME.val.npy.part + journal -> .npy -> sidecar

A source yields (text, cursor), where cursor is a JSON value from which the same source goes on after that document.
The journal says how long the synced parts were at which cursor, so that a run killed at any moment goes on from there,
to the same bytes.
"""

import argparse
import ast
import collections
import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from decimal import Decimal
from pathlib import Path

import numpy as np
from tqdm import tqdm

from train_dba import EOS, ByteTokenizer, GPT2Tokenizer, UserError, WordTokenizer, split_words

BATCH_CHARS = 1 << 19                              # text that a worker gets at once
JOURNAL_SECONDS = 5.0                              # the work that a kill can cost
HEADER_BYTES = 128                                 # of a 1-D .npy
CHUNK_BYTES = 1 << 22
FIXED_TOKENIZERS = {"gpt2": GPT2Tokenizer, "byte": ByteTokenizer}     # the vocabulary of "word" grows as it reads
TEXT_BYTES_PER_TOKEN = {"word": 5, "gpt2": 4, "byte": 1}              # of English, to estimate disk space and time left

# -----------------------------------------------------------------------------
# Files: all that must survive a kill is synced, then renamed


def read_json(path):
    """The object in a JSON file, or None where there is no such file."""
    try:
        return json.loads(path.read_bytes()) if path.exists() else None
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}): delete it and run again") from None


def replace(source, path):
    """Renames atomically and durably."""
    os.replace(source, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_chunks(path, chunks):
    """Writes an iterable of bytes; the file has all of them or, after a kill, is what it was."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        for chunk in chunks:
            f.write(chunk)
        f.flush()
        os.fsync(f.fileno())
    replace(temporary, path)


def write_json(path, value):
    write_chunks(path, [json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"])


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def npy_header(tokens, dtype):
    """Header of a .npy of shape [tokens]: HEADER_BYTES long for any number, so that it can be filled in at the end."""
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (tokens,)})
    assert f.tell() == HEADER_BYTES
    return f.getvalue()


# -----------------------------------------------------------------------------
# Sources: readers of one file yield (text, position); sources yield (text, cursor)


def optional(module, package, purpose):
    """An optional dependency, imported where it is first needed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{purpose} needs {package}: pip install {package}") from None


def read_text(path):
    try:
        return path.read_bytes().decode()                  # no newline translation: tokens decode to the file's bytes
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 (byte {e.start}): convert it first, for instance with iconv") from None


def read_txt(path, start):
    """A .txt file is one document."""
    if start == 0:
        yield read_text(path), 1


def read_jsonl(path, start):
    """The string under "text" of each line; position: lines read."""
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            if n <= start or not line.strip():
                continue
            try:
                row = json.loads(line.decode())
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise UserError(f'{path}, line {n}: no string in a field "text"')
                row["text"].encode()                       # JSON can spell lone surrogates, which UTF-8 can't
            except ValueError as e:
                raise UserError(f"{path}, line {n}: bad JSON or UTF-8 ({e}): correct or remove the line") from None
            yield row["text"], n


def read_parquet(path, start):
    """The rows of the column "text"; position: rows read. Row groups before it are not read."""
    parquet = optional("pyarrow.parquet", "pyarrow", "reading .parquet")
    try:
        file, row = parquet.ParquetFile(path), 0
        if "text" not in file.schema_arrow.names:
            raise UserError(f'{path}: no column "text", only {", ".join(file.schema_arrow.names)}')
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows <= start:
                row += rows
                continue
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if row > start:
                        if not isinstance(text, str):
                            raise UserError(f'{path}, row {row}: no string in the column "text" but {text!r:.40}')
                        yield text, row
    except (ValueError, OSError, NotImplementedError) as e:          # which Arrow's own errors derive from
        raise UserError(f"{path}: can't be read as parquet ({str(e).partition(chr(10))[0]})") from None


def read_articles(path, start):
    """The articles of a WikiText file; position: characters read.

    A level-1 heading ` = Title = ` has blank lines around it, which tells it from table rests that look like one. The
    first article takes the blank line before it, so that the articles together are the file.
    """
    text = read_text(path)
    ends = [m.start() + 2 for m in re.finditer(r"(?<=\n) \n = [^=\n]+ = \n(?= \n)", text)]
    for begin, end in zip([0, *ends], [*ends, len(text)]):
        if start <= begin < end:
            yield text[begin:end], end


def read_files(files, reader, cursor):
    """Documents of files one after the other. files: list of Path; cursor: None or [file, position in it]."""
    first, start = cursor or (0, 0)
    for n, path in enumerate(files[first:], first):
        for text, position in reader(path)(path, start if n == first else 0):
            yield text, [n, position]


@contextlib.contextmanager
def hub_errors(repo):
    """Turns what the hub's libraries raise into one line. The base of their HTTP errors depends on the version."""
    optional("datasets", "datasets", "reading from the Hugging Face hub")
    errors = optional("huggingface_hub.errors", "huggingface_hub", "reading from the Hugging Face hub")
    try:
        yield
    except (OSError, *errors.HfHubHTTPError.__bases__) as e:
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            raise
        raise UserError(f"can't read {repo} from the Hugging Face hub ({type(e).__name__}): go online and run the same "
                        "command again; --dataset sample needs no network") from None


def hub_revision(repo):
    """The commit that a hub dataset is at now."""
    with hub_errors(repo):
        return importlib.import_module("huggingface_hub").HfApi().dataset_info(repo).sha


def read_hub(repo, config, split, revision, cursor):
    """Documents streamed from the hub. The cursor is the stream's state_dict, which names a file and row group to go on
    from; skip(n) would download everything before again."""
    with hub_errors(repo):
        import datasets
        datasets.disable_progress_bars()
        rows = datasets.load_dataset(repo, config, split=split, revision=revision, streaming=True)
        rows = rows.select_columns(["text"])
        if cursor is not None:
            rows.load_state_dict(cursor)
        for row in rows:
            yield row["text"], rows.state_dict()


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def content(files):
    """What identifies local files, whatever they are called: a hash of their contents in order."""
    return "sha256:" + hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def open_text(args, _revision):
    """--dataset text: every .txt, .jsonl and .parquet that --input names, or that lies below a folder it names."""
    files = []
    for path in args.input:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in READERS and p.is_file())
            if not found:
                raise UserError(f"no {', '.join(READERS)} file in {path}: name another folder with --input")
            files += found
        elif not path.exists():
            raise UserError(f"{path} does not exist: correct --input")
        elif path.suffix not in READERS:
            raise UserError(f"can't read {path}: --input takes {', '.join(READERS)} files and folders of them")
        else:
            files.append(path)
    size = sum(p.stat().st_size * (3 if p.suffix == ".parquet" else 1) for p in files)     # parquet is compressed
    return content(files), size, functools.partial(read_files, files, lambda path: READERS[path.suffix])


def open_wikitext(args, _revision):
    """--dataset wikitext2: file 0 is the official validation split; it goes first so that --tokens can't cut it off."""
    folder = args.input[0] if args.input else args.output.parent
    files = [folder / f"wiki.{split}.tokens" for split in ("valid", "train", "test")]
    if not args.input and not all(path.exists() for path in files):
        repo = "Salesforce/wikitext"
        revision = hub_revision(repo)
        for path, split in zip(files, ("validation", "train", "test")):
            if not path.exists():                          # the hub has "" for a blank line, the original files " \n"
                rows = read_hub(repo, "wikitext-2-v1", split, revision, None)
                write_chunks(path, ((text if text.strip() else " \n").encode() for text, _ in rows))
    for path in files[:2]:
        if not path.exists():
            raise UserError(f"{path} does not exist: --input takes the folder of wiki.{{train,valid,test}}.tokens; "
                            "without --input they come from the Hugging Face hub")
    size = files[1].stat().st_size
    return content(files[:2]), size, functools.partial(read_files, files[:2], lambda path: read_articles)


def read_sample(start):
    """Python's documentation: a document is a topic of help(), or the docstrings of a standard library module."""
    from pydoc_data.topics import topics
    library = Path(sysconfig.get_path("stdlib"))
    modules = (path for path in sorted(library.rglob("*.py"))
               if not {"site-packages", "dist-packages", "test", "tests"} & set(path.relative_to(library).parts))

    def docstrings(node):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
        for child in ast.iter_child_nodes(node):
            yield from docstrings(child)

    def pieces():
        for _, text in sorted(topics.items()):
            yield [text]
        for path in modules:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")            # about escapes in the library's own source
                tree = ast.parse(path.read_bytes())
            yield docstrings(tree)

    seen, n = {""}, 0
    for parts in pieces():
        text = "\n\n".join(p for p in parts if not (p in seen or seen.add(p)))
        if text:
            n += 1
            if n > (start or 0):
                yield text + "\n", n


def open_sample(_args, _revision):
    return f"Python {platform.python_version()}", 2_300_000, read_sample


def open_fineweb(args, revision):
    """--dataset fineweb-edu. A resumed run stays with the revision it began with."""
    repo = "HuggingFaceFW/fineweb-edu"
    revision = revision or hub_revision(repo)
    return revision, None, functools.partial(read_hub, repo, fineweb_config(args.tokens), "train", revision)


def fineweb_config(tokens):
    return "sample-10BT" if tokens <= 9_500_000_000 else "sample-100BT"     # its 10B hold the validation part, too


# val_frac None: the source has its own validation split, its file 0.
DATASETS = {
    "fineweb-edu": {"open": open_fineweb, "tokenizer": "gpt2", "val_frac": 0.005},
    "wikitext2": {"open": open_wikitext, "tokenizer": "word", "val_frac": None},
    "text": {"open": open_text, "tokenizer": "gpt2", "val_frac": 0.05},
    "sample": {"open": open_sample, "tokenizer": "byte", "val_frac": 0.1},
}

# -----------------------------------------------------------------------------
# Tokens: worker processes, in the order of the documents


TOKENIZER = None                                   # of a worker process; None there for words


def start_worker(name, parent):
    """Runs first in each worker; builds the tokenizer there, so that spawned workers (macOS) do as forked ones."""
    global TOKENIZER
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C goes to the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    TOKENIZER = FIXED_TOKENIZERS[name]() if name != "word" else None

    def watch():                                           # a killed parent can't tell its workers to end
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def encode_batch(texts):
    """Runs in a worker. Returns
        ids      [tokens of all documents], each document ended by eot; a blank document has none
        lengths  [documents] tokens of each
        sizes    [documents] UTF-8 bytes of each
        words    distinct words of the batch, which word ids index; empty for other tokenizers
    """
    words, pieces = {}, [np.empty(0, np.uint16)]
    for text in texts:
        if not text or text.isspace():
            pieces.append(pieces[0])
        elif TOKENIZER is None:
            pieces.append(np.array([words.setdefault(w, len(words)) for w in (*split_words(text), EOS)], np.uint32))
        else:
            pieces.append(np.append(TOKENIZER.encode(text), np.uint16(TOKENIZER.eot)))
    lengths = np.array([len(p) for p in pieces[1:]], np.int64)
    sizes = np.array([len(text.encode()) for text in texts], np.int64) * (lengths > 0)
    return np.concatenate(pieces), lengths, sizes, list(words)


@contextlib.contextmanager
def worker_pool(args):
    """Worker processes, begun before there is a thread or connection that a fork could break."""
    if args.tokenizer in FIXED_TOKENIZERS:
        FIXED_TOKENIZERS[args.tokenizer]()                 # what it lacks is said here; forked workers find it loaded
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(args.workers, context, start_worker, (args.tokenizer, os.getpid()))
    try:
        pool.submit(encode_batch, []).result()
        yield pool
    except BrokenProcessPool:
        raise UserError("a worker process died (out of memory?): run the same command again to go on, "
                        "perhaps with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def batches(documents, index, val_frac):
    """Yields (texts, is_val [documents], cursor after the last); index: that of the first document.

    Document i is held out for validation where the number to hold out so far, (i + 1) * val_frac, reaches an integer.
    """
    texts, is_val, chars = [], [], 0
    for index, (text, cursor) in enumerate(documents, index):
        texts.append(text)
        is_val.append(cursor[0] == 0 if val_frac is None
                      else math.floor((index + 1) * val_frac) > math.floor(index * val_frac))
        chars += len(text) + 64                            # an empty document takes room, too
        if chars >= BATCH_CHARS:
            yield texts, is_val, cursor
            texts, is_val, chars = [], [], 0
    if texts:
        yield texts, is_val, cursor


def encode_in_order(pool, items, ahead):
    """Yields (*batch, *encode_batch(texts)) in the order of the batches, never more than `ahead` of them in memory."""
    waiting = collections.deque()
    for item in items:
        waiting.append((item, pool.submit(encode_batch, item[0])))
        if len(waiting) >= ahead:
            item, future = waiting.popleft()
            yield *item, *future.result()
    for item, future in waiting:
        yield *item, *future.result()


# -----------------------------------------------------------------------------
# Parts: token files that grow, and the journal that says how far they are good


class Part:
    """The growing NAME.npy.part, and for the word tokenizer NAME.words.part, its words in order of first appearance.

    Training and validation words are numbered apart, so that both are written as they come; finish() translates.
    """

    def __init__(self, stack, paths, counts, dtype):
        """stack: closes the files; paths: tokens and, for words, the vocabulary; counts: the journal's, see EMPTY."""
        self.counts, self.dtype, self.files = dict(counts), dtype, []
        for path, length in zip(paths, counts["bytes"]):
            if not path.exists() and length == 0:
                path.touch()
            if not path.exists() or path.stat().st_size < length:
                raise UserError(f"{path} is missing or shorter than its journal says: delete the .part.json beside it "
                                "to start afresh")
            self.files.append(stack.enter_context(open(path, "r+b")))
            self.files[-1].truncate(length)
            self.files[-1].seek(length)
        if counts["bytes"][0] == 0:
            self.files[0].write(bytes(HEADER_BYTES))
        self.ids = {w: i for i, w in enumerate(read_words(paths[1]))} if len(paths) > 1 else None

    def add(self, ids, lengths, sizes, words):
        """Appends documents as encode_batch() returns them."""
        if self.ids is not None:
            known, first = np.unique(ids, return_index=True)
            table = np.zeros(len(words), np.uint32)
            for i in known[np.argsort(first)]:
                if words[i] not in self.ids:
                    self.files[1].write(words[i].encode() + b"\n")
                table[i] = self.ids.setdefault(words[i], len(self.ids))
            ids = table[ids]
        self.files[0].write(ids.astype(self.dtype, copy=False).data)
        self.counts["tokens"] += len(ids)
        self.counts["documents"] += int((lengths > 0).sum())
        self.counts["text_bytes"] += int(sizes.sum())

    def sync(self):
        """Makes what was added durable; returns the counts that say so."""
        for f in self.files:
            f.flush()
            os.fsync(f.fileno())
        self.counts["bytes"] = [f.tell() for f in self.files]
        return dict(self.counts)


PARTS = ("", ".val")
EMPTY = {"tokens": 0, "documents": 0, "text_bytes": 0, "bytes": [0, 0]}


def read_words(path):
    return path.read_bytes().decode().split("\n")[:-1]


def stream(args, pool, documents, journal, expected, beside):
    """Writes the parts from the journal's cursor to the end of the source, or of the document that reaches --tokens."""
    def commit():
        journal["parts"] = {name: part.sync() for name, part in parts.items()}
        write_json(beside(".npy.part.json"), journal)

    with contextlib.ExitStack() as stack:
        word = args.tokenizer == "word"
        parts = {name: Part(stack, [beside(name + ".npy.part"), beside(name + ".words.part")][:1 + word],
                            journal["parts"][name], np.uint32 if word else np.uint16) for name in PARTS}
        train, val = parts.values()
        commit()
        synced = time.monotonic()
        bar = stack.enter_context(tqdm(total=expected, initial=train.counts["tokens"], unit="tok", unit_scale=True,
                                       desc=args.output.name, mininterval=0.5 if sys.stderr.isatty() else 30))
        items = batches(documents(journal["cursor"]), journal["read"], args.val_frac)
        for texts, is_val, cursor, ids, lengths, sizes, words in encode_in_order(pool, items, 2 * args.workers + 2):
            is_val = np.array(is_val)
            total = train.counts["tokens"] + np.cumsum(lengths * ~is_val)    # [documents] training tokens up to each
            keep = len(texts) if args.tokens is None else int(np.searchsorted(total, args.tokens)) + 1
            lengths, sizes, is_val = lengths[:keep], sizes[:keep], is_val[:keep]
            in_val = np.repeat(is_val, lengths)                              # [tokens kept]
            ids = ids[:len(in_val)]
            train.add(ids[~in_val], lengths[~is_val], sizes[~is_val], words)
            val.add(ids[in_val], lengths[is_val], sizes[is_val], words)
            bar.update(train.counts["tokens"] - bar.n)
            journal["read"] += len(texts)
            journal["cursor"] = cursor
            if args.tokens is not None and train.counts["tokens"] >= args.tokens:
                break
            if time.monotonic() - synced >= JOURNAL_SECONDS:
                commit()
                synced = time.monotonic()
        journal["complete"] = True
        commit()


def place(part, path, tokens, dtype, table):
    """Turns a part into its .npy; table: [part's ids] -> ids, or None. A repeat after a kill gives the same bytes."""
    if not part.exists():                                  # it was renamed before the kill
        return
    if table is None:
        with open(part, "r+b") as f:
            f.write(npy_header(tokens, dtype))
            f.flush()
            os.fsync(f.fileno())
        replace(part, path)
        return
    with open(part, "rb") as f:
        f.seek(HEADER_BYTES)
        chunks = iter(lambda: f.read(CHUNK_BYTES), b"")
        translated = (table[np.frombuffer(chunk, np.uint32)].astype(dtype).tobytes() for chunk in chunks)
        write_chunks(path, itertools.chain([npy_header(tokens, dtype)], translated))
    part.unlink()


def finish(args, settings, journal, beside):
    """Turns completed parts into token files with sidecars. A repeat after a kill gives the same bytes."""
    tables = {}
    for name in PARTS:                                     # from here on, what --overwrite replaces is unfinished
        beside(name + ".json").unlink(missing_ok=True)
    if args.tokenizer == "word":
        tokenizer = WordTokenizer.build(read_words(beside(".words.part")))
        tables = {name: tokenizer.encode_words(read_words(beside(name + ".words.part"))) for name in PARTS}
        write_json(beside(".vocab.json"), tokenizer.words)
    else:
        tokenizer = FIXED_TOKENIZERS[args.tokenizer]()
        beside(".vocab.json").unlink(missing_ok=True)
    has_val = journal["parts"][".val"]["tokens"] > 0
    if not has_val:
        beside(".val.npy").unlink(missing_ok=True)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    for name in (".val", "") if has_val else ("",):
        counts, path = journal["parts"][name], beside(name + ".npy")
        place(beside(name + ".npy.part"), path, counts["tokens"], dtype, tables.get(name))
        sidecar = {**settings, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
                   "tokens": counts["tokens"], "documents": counts["documents"], "text_bytes": counts["text_bytes"],
                   "sha256": sha256(path), "val": beside(".val.npy").name if has_val and not name else None,
                   "vocab": beside(".vocab.json").name if args.tokenizer == "word" else None}
        write_json(beside(name + ".json"), sidecar)
        print(f"{path}: {counts['tokens']:,} tokens, {counts['documents']:,} documents, "
              f"vocabulary {tokenizer.vocab_size:,}")


def clear(beside):
    """Removes what only a run in progress needs; the journal first, since it vouches for the rest."""
    for suffix in (".npy.part.json", *(name + part for name in PARTS for part in (".npy.part", ".words.part"))):
        beside(suffix).unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# Main


def differences(settings, earlier):
    """What the settings that decide every byte have in a sidecar or journal instead; empty if they agree."""
    return ", ".join(f"{key} {earlier.get(key)!r:.20} instead of {value!r:.20}" for key, value in settings.items()
                     if earlier.get(key) != value)


def check_disk(args, size, journal):
    """Refuses a disk that is too small by estimate; returns the training tokens to expect."""
    known = [n for n in (args.tokens, size and size // TEXT_BYTES_PER_TOKEN[args.tokenizer]) if n is not None]
    expected = min(known)
    # Word ids are 4 bytes until their number is known, then up to 4 bytes more in the final file.
    with_val = 1.1 if args.val_frac is None else 1 + args.val_frac
    need = int(expected * with_val * (8 if args.tokenizer == "word" else 2))
    need -= sum(part["bytes"][0] for part in journal["parts"].values())
    free = shutil.disk_usage(args.output.parent).free
    if need > free:
        raise UserError(f"about {need / 1e9:.2f} GB are needed in {args.output.parent}, {free / 1e9:.2f} GB are free: "
                        "make room, or pass fewer --tokens or another --output")
    return expected


@contextlib.contextmanager
def exclusive(path):
    """Holds a lock that the system releases however this process ends: two runs would cut each other's parts."""
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {path.with_suffix('')}: wait for it or stop it") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def prepare(args, pool):
    """Makes args.output, or finishes what an earlier run began. Raises UserError or OSError; what is synced is kept."""
    def beside(suffix):
        return args.output.with_name(args.output.name.removesuffix(".npy") + suffix)

    settings = {"dataset": args.dataset, "tokenizer": args.tokenizer, "tokens_asked": args.tokens,
                "val_frac": args.val_frac}
    journal, sidecar = read_json(beside(".npy.part.json")), None if args.overwrite else read_json(beside(".json"))
    if journal and journal["read"] == 0 and not journal["complete"]:     # nothing to lose, so nothing to refuse
        journal = None
    known = next((old["revision"] for old in (sidecar, journal) if old and not differences(settings, old)), None)
    revision, size, documents = DATASETS[args.dataset]["open"](args, known)
    settings["revision"] = revision

    if sidecar and args.output.exists():
        if wrong := differences(settings, sidecar):
            raise UserError(f"{args.output} is finished, with {wrong}: pass --overwrite or another --output")
        print(f"{args.output} is finished already: {sidecar['tokens']:,} tokens")
        return clear(beside)
    if journal and (wrong := differences(settings, journal)):
        if not args.overwrite:
            raise UserError(f"{args.output} is begun, with {wrong}: pass --overwrite or another --output")
        journal = None
    if not journal and not args.overwrite and args.output.exists():
        raise UserError(f"{args.output} exists without a sidecar {beside('.json').name}: pass --overwrite or another "
                        "--output")

    resumed = journal is not None
    if not resumed:
        journal = {**settings, "cursor": None, "read": 0, "complete": False, "parts": {name: EMPTY for name in PARTS}}
    expected = check_disk(args, size, journal)
    if resumed:
        print(f"going on after document {journal['read']:,}")
    if not journal["complete"]:
        stream(args, pool, documents, journal, expected, beside)
    tokens = journal["parts"][""]["tokens"]
    if tokens == 0:
        clear(beside)
        raise UserError("no document with text in it to train on: nothing was written")
    if args.tokens is not None and tokens < args.tokens:
        print(f"note: the source ended at {tokens:,} of {args.tokens:,} tokens", file=sys.stderr)
    finish(args, settings, journal, beside)
    clear(beside)


def token_count(text):
    """'100M' -> 100_000_000"""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.upper())
    tokens = Decimal(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[match[2]] if match else 0
    if tokens < 1 or tokens != int(tokens):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens: write 100M, 1B or 250000")
    return int(tokens)


def parse_args(argv=None):
    """The command line, with the dataset's defaults filled in; ends the program with 2 where it makes no sense."""
    def defaults(key):
        return ", ".join(f"{name} {spec[key]}" for name, spec in DATASETS.items() if spec[key] is not None)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    parser.add_argument("--dataset", required=True, choices=DATASETS, help="where the documents come from")
    parser.add_argument("--input", nargs="+", type=Path, metavar="PATH", help="text: .txt, .jsonl (field text) and "
                        ".parquet (column text) files, or folders of them; wikitext2: a folder of "
                        "wiki.{train,valid,test}.tokens [from the hub, into the folder of --output]")
    parser.add_argument("--tokenizer", choices=TEXT_BYTES_PER_TOKEN, help=f"[{defaults('tokenizer')}]")
    parser.add_argument("--tokens", type=token_count, metavar="N", help="end with the document that reaches N training "
                        "tokens: 100M, 1B, 250000; validation comes on top [all; fineweb-edu needs it]")
    parser.add_argument("--val-frac", type=float, metavar="F", help="share of the documents held out for "
                        f"validation, evenly spaced [{defaults('val_frac')}]; wikitext2 has its own split")
    parser.add_argument("--output", "--out", required=True, type=Path, metavar="NAME.npy", help="token file to write")
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="tokenizer processes [one per core]")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished output, or what a run with other "
                        "settings began; a run with the same settings still goes on where it was stopped")
    args = parser.parse_args(argv)
    name, inputs = args.dataset, args.input or []
    for wrong, message in (
            (args.output.suffix != ".npy",
             f"--output must end in .npy: write {os.path.splitext(args.output)[0]}.npy instead of {args.output}"),
            (name == "text" and not inputs, "--dataset text needs --input"),
            (inputs and name not in ("text", "wikitext2"), f"--dataset {name} takes no --input; --dataset text does"),
            (name == "wikitext2" and (len(inputs) > 1 or not all(path.is_dir() for path in inputs)),
             "--dataset wikitext2 takes one existing folder as --input"),
            (name == "wikitext2" and args.val_frac is not None,
             "--dataset wikitext2 has its own validation split: leave out --val-frac"),
            (not 0 <= (args.val_frac or 0) < 1, f"--val-frac must be at least 0 and less than 1, not {args.val_frac}"),
            (name == "fineweb-edu" and not args.tokens, "--dataset fineweb-edu needs --tokens, for instance 100M"),
            (args.workers < 1, f"--workers must be at least 1, not {args.workers}")):
        if wrong:
            parser.error(message)
    spec = DATASETS[name]
    args.tokenizer = args.tokenizer or spec["tokenizer"]
    args.val_frac = spec["val_frac"] if args.val_frac is None else args.val_frac
    return args


def main(argv=None):
    """Ends the program with 1 for what the user can mend, 2 for a wrong command line, 130 or 143 when stopped."""
    args = parse_args(argv)

    def stop(signum, _frame):
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with worker_pool(args) as pool, exclusive(args.output.with_name(args.output.name + ".lock")):
            prepare(args, pool)
    except UserError as e:
        sys.exit(f"error: {e}")
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        what = "make room" if e.errno == errno.ENOSPC else "correct that"
        sys.exit(f"error: {e.strerror or e}{where}: {what} and run the same command again")
    except SystemExit as e:
        print("stopped; run the same command again to go on", file=sys.stderr)
        raise e


if __name__ == "__main__":
    main()
