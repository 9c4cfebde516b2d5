"""Text to token files: FineWeb-Edu, WikiText-2, local text, or an offline sample.

    python prepare_fineweb.py --dataset fineweb-edu --tokens 100M --output data/fineweb_100m.npy
    python prepare_fineweb.py --dataset wikitext2 --output data/wikitext2.npy
    python prepare_fineweb.py --dataset wikitext2 --input folder/with/wiki.train.tokens --output data/wikitext2.npy
    python prepare_fineweb.py --dataset text --input notes.txt corpus/ --tokenizer byte --output data/notes.npy
    python prepare_fineweb.py --dataset text --input corpus/ --tokenizer bpe:8192 --output data/corpus.npy
    python prepare_fineweb.py --dataset sample --output data/sample.npy

NAME.npy holds the token ids of the training documents, one after the other, each ended by the tokenizer's eot;
NAME.val.npy those of the validation documents. A sidecar .json beside each says what it holds. It is written last:
a .npy without one is unfinished. NAME.vocab.json is the vocabulary of a word or bpe tokenizer, made of the training
part.

    source -> batches -> worker processes, in order -> NAME.npy.part, NAME.val.npy.part + journal -> .npy -> sidecar

A source yields (text, cursor), where cursor is a JSON value from which the same source goes on after that document.
The journal says how long the synced parts were at which cursor, so that a run killed at any moment goes on from there,
to the same bytes. It carries checksums of the parts and of itself: damage is said, not built upon.
"""

import argparse
import ast
import codecs
import collections
import contextlib
import errno
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
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from decimal import Decimal
from pathlib import Path

import numpy as np
from tqdm import tqdm

from train_dba import (
    BYTE_CHARS,
    EOS,
    LONGEST_TOKEN,
    BPETokenizer,
    ByteTokenizer,
    GPT2Tokenizer,
    UserError,
    WordTokenizer,
    exclusive,
    exit_code,
    split_words,
)

BATCH_CHARS = 1 << 19                              # text that a worker gets at once
LINE_BYTES = 1 << 28                               # the longest line of a .jsonl
JOURNAL_SECONDS = 5.0                              # the work that a kill can cost
HEADER_BYTES = 128                                 # of a 1-D .npy
CHUNK_BYTES = 1 << 22
MOST_WORKERS = 1024
JSON_BYTES = 1 << 24                               # the most that a sidecar or journal may have
BPE_TEXT_BYTES = 100_000_000                       # training text that a bpe vocabulary is learned from, at most
BPE_SIZES = range(257, (1 << 20) + 1)              # 256 bytes and end of text at least
FIXED_TOKENIZERS = {"gpt2": GPT2Tokenizer, "byte": ByteTokenizer}     # "word" and "bpe" learn theirs from the text
TEXT_BYTES_PER_TOKEN = {"word": 5, "gpt2": 4, "bpe": 3, "byte": 1}    # of English, to estimate disk space and time left

# -----------------------------------------------------------------------------
# Files: all that must survive a kill is synced, then renamed


def read_json(path):
    """The object in a JSON file, or None where there is no such file."""
    if not path.exists():
        return None
    try:
        if not path.is_file() or path.stat().st_size > JSON_BYTES:
            raise ValueError("no small regular file")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}): delete it and run again") from None


def read_sidecar(path):
    """What a sidecar says of the token file beside it, or None where there is none."""
    sidecar = read_json(path)
    if sidecar is not None and type(sidecar.get("tokens")) is not int:
        raise UserError(f"{path} is damaged (it has no number of tokens): delete it and run again")
    return sidecar


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


def write_json(path, value, indent=1):
    """A name in it whose bytes are no UTF-8 holds lone surrogates, which are written as JSON's escapes."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    write_chunks(path, [text.encode(errors="backslashreplace") + b"\n"])


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
        # No newline translation: tokens decode to the file's bytes, less the byte-order mark.
        return path.read_bytes().removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 (byte {e.start}): convert it first, for instance with iconv") from None


def read_txt(path, start):
    """A .txt file is one document."""
    if start == 0:
        yield read_text(path), 1


def read_jsonl(path, start):
    """The string under "text" of each line; position: lines read."""
    with open(path, "rb") as f:
        for n, line in enumerate(iter(lambda: f.readline(LINE_BYTES + 1), b""), 1):
            if len(line) > LINE_BYTES:
                raise UserError(f"{path}, line {n}: more than {LINE_BYTES:,} bytes: cut the document up, or remove it")
            if n == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if n <= start or not line.strip():
                continue
            try:
                row = json.loads(line.decode())
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise UserError(f'{path}, line {n}: no string in a field "text"')
                row["text"].encode()                       # JSON can spell lone surrogates, which UTF-8 can't
            except (ValueError, RecursionError) as e:
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
    except (ValueError, OSError, LookupError, TypeError, NotImplementedError, MemoryError) as e:  # Arrow's are of them
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


READERS = {".txt": read_txt, ".md": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def content(files):
    """What identifies local files, whatever they are called: a hash of their contents in order."""
    return "sha256:" + hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def list_folder(folder):
    """The files below a folder that READERS read, sorted; what else lies there is named."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    readable = [path for path in files if path.suffix.lower() in READERS]
    skipped = [path for path in files if path.suffix.lower() not in READERS]
    if not readable:
        raise UserError(f"no {', '.join(READERS)} file in {folder}: name another folder with --input")
    if skipped:
        kinds = collections.Counter(path.suffix or "no suffix" for path in skipped)
        names = ", ".join(str(path.relative_to(folder)) for path in skipped[:3])
        print(f"note: {len(skipped)} files of {folder} are left out ({names}{', ...' if len(skipped) > 3 else ''}); by "
              f"suffix: {', '.join(f'{kind} {count}' for kind, count in kinds.most_common(8))}", file=sys.stderr)
    return readable


def list_inputs(paths):
    """The files that --input names, in its order, those of a folder sorted. Raises UserError for one named twice, which
    could be in the training and the validation part at once, and for what can't be read."""
    files = []
    for path in paths:
        if path.is_dir():
            files += list_folder(path)
        elif not path.exists():
            raise UserError(f"{path} does not exist: correct --input")
        elif not path.is_file() or path.suffix.lower() not in READERS:
            raise UserError(f"can't read {path}: --input takes {', '.join(READERS)} files and folders of them")
        else:
            files.append(path)
    seen = {}
    for path in files:
        status = path.stat()
        first = seen.setdefault((status.st_dev, status.st_ino), path)
        if first is not path:
            raise UserError(f"{path} is {first if path != first else 'named twice'}: name each file once with --input")
    return files


def open_text(args, _revision):
    """--dataset text."""
    return open_inputs(args.input)


def open_inputs(inputs):
    """Every .txt, .md, .jsonl and .parquet that --input names, or that lies below a folder it names."""
    files = list_inputs(inputs)
    sizes = {path: path.stat().st_size for path in files}
    size = sum(n * 3 if path.suffix.lower() == ".parquet" else n for path, n in sizes.items())     # it is compressed
    return content(files), size, functools.partial(read_files, files, lambda path: READERS[path.suffix.lower()])


def fetch_wikitext(files):
    """Fetches those of the files, validation, training and test, that aren't there yet."""
    repo = "Salesforce/wikitext"
    if all(path.exists() for path in files):               # another run has fetched them while this one waited
        return
    revision = hub_revision(repo)
    for path, split in zip(files, ("validation", "train", "test")):
        if not path.exists():                              # the hub has "" for a blank line, the original files " \n"
            rows = read_hub(repo, "wikitext-2-v1", split, revision, None)
            write_chunks(path, ((text if text.strip() else " \n").encode() for text, _ in rows))


def open_wikitext(args, _revision):
    """--dataset wikitext2: file 0 is the official validation split; it goes first so that --tokens can't cut it off."""
    folder = args.input[0] if args.input else args.output.parent
    files = [folder / f"wiki.{split}.tokens" for split in ("valid", "train", "test")]
    if not args.input and not all(path.exists() for path in files):
        with exclusive(folder / "wiki.lock", folder, wait=True):                 # two fetches would write one file
            fetch_wikitext(files)
    for path in files[:2]:
        if not path.is_file():
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


TOKENIZER = None                                   # of a worker process: a function that returns it; None for words


def start_worker(name, vocabulary, parent):
    """Runs first in each worker; builds the tokenizer there, so that spawned workers (macOS) do as forked ones.
    vocabulary: the path of a bpe tokenizer's, which is made later."""
    global TOKENIZER
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C goes to the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if name == "bpe":
        TOKENIZER = functools.cache(lambda: read_bpe(vocabulary))
    elif name != "word":
        tokenizer = FIXED_TOKENIZERS[name]()
        TOKENIZER = lambda: tokenizer                      # noqa: E731

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
            ids = TOKENIZER().encode(text)
            pieces.append(np.append(ids, ids.dtype.type(TOKENIZER().eot)))
    lengths = np.array([len(p) for p in pieces[1:]], np.int64)
    sizes = np.array([len(text.encode()) for text in texts], np.int64) * (lengths > 0)
    return np.concatenate(pieces), lengths, sizes, list(words)


@contextlib.contextmanager
def worker_pool(args):
    """Worker processes, begun before there is a thread or connection that a fork could break."""
    if args.tokenizer in FIXED_TOKENIZERS:
        FIXED_TOKENIZERS[args.tokenizer]()                 # what it lacks is said here; forked workers find it loaded
    if args.tokenizer == "bpe":
        optional("tokenizers", "tokenizers", "--tokenizer bpe")
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(args.workers, context, start_worker,
                               (args.tokenizer, beside(args, VOCABULARY), os.getpid()))
    try:
        pool.submit(encode_batch, []).result()
        yield pool
    except BrokenProcessPool:
        raise UserError("a worker process died (out of memory?): run the same command again to go on, "
                        "perhaps with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def batches(documents, first, val_frac):
    """Yields (texts, is_val [documents], cursor after the last); first: the first document's index.

    Document i is held out for validation where the number to hold out so far, (i + 1) * val_frac, reaches an integer.
    """
    texts, is_val, chars = [], [], 0
    for index, (text, cursor) in enumerate(documents, first):
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
        self.counts, self.dtype, self.files, self.crc = dict(counts), dtype, [], list(counts["crc"])
        for path, length, crc in zip(paths, counts["bytes"], counts["crc"]):
            if not path.exists() and length == 0:
                path.touch()
            if not path.is_file() or path.stat().st_size < length or checksum(path, length) != crc:
                raise UserError(f"{path} is not what its journal says: delete the .part.json beside it to start afresh")
            self.files.append(stack.enter_context(open(path, "r+b")))
            self.files[-1].truncate(length)
            self.files[-1].seek(length)
        if counts["bytes"][0] == 0:
            self.write(0, bytes(HEADER_BYTES))
        self.ids = {w: i for i, w in enumerate(read_words(paths[1]))} if len(paths) > 1 else None

    def write(self, file, data):
        self.files[file].write(data)
        self.crc[file] = zlib.crc32(data, self.crc[file])

    def add(self, ids, lengths, sizes, words):
        """Appends documents as encode_batch() returns them."""
        if self.ids is not None:
            known, first = np.unique(ids, return_index=True)
            table = np.zeros(len(words), np.uint32)
            for i in known[np.argsort(first)]:
                if words[i] not in self.ids:
                    self.write(1, words[i].encode() + b"\n")
                table[i] = self.ids.setdefault(words[i], len(self.ids))
            ids = table[ids]
        self.write(0, ids.astype(self.dtype, copy=False).data)
        self.counts["tokens"] += len(ids)
        self.counts["documents"] += int((lengths > 0).sum())
        self.counts["text_bytes"] += int(sizes.sum())

    def sync(self):
        """Makes what was added durable; returns the counts that say so."""
        for f in self.files:
            f.flush()
            os.fsync(f.fileno())
        self.counts.update(bytes=[f.tell() for f in self.files], crc=list(self.crc))
        return dict(self.counts)


PARTS = ("", ".val")
EMPTY = {"tokens": 0, "documents": 0, "text_bytes": 0, "bytes": [0, 0], "crc": [0, 0]}
JOURNAL, VOCABULARY = ".npy.part.json", ".bpe.part"         # of a run in progress, beside its parts


def beside(args, suffix):
    """The path of NAME + suffix, where --output is NAME.npy."""
    return args.output.with_name(args.output.name.removesuffix(".npy") + suffix)


def checksum(path, length):
    """CRC-32 of the first `length` bytes of a file."""
    crc = 0
    with open(path, "rb") as f:
        while length > 0 and (chunk := f.read(min(length, CHUNK_BYTES))):
            crc, length = zlib.crc32(chunk, crc), length - len(chunk)
    return crc


def seal(journal):
    """The hash of a journal's content, which it carries: a damaged one is noticed whatever was damaged."""
    content = {key: value for key, value in journal.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_journal(path):
    journal = read_json(path)
    if journal is not None and journal.get("seal") != seal(journal):
        raise UserError(f"{path} is damaged, or by another version of this script: delete it to start afresh")
    return journal


def write_journal(path, journal):
    write_json(path, {**journal, "seal": seal(journal)})


def read_words(path):
    return path.read_bytes().decode().split("\n")[:-1]


def read_bpe(path):
    return BPETokenizer(json.loads(path.read_bytes()))


def training_texts(documents, val_frac):
    """The training documents from the start of the source, BPE_TEXT_BYTES of them at most."""
    size = 0
    for texts, is_val, _ in batches(documents(None), 0, val_frac):
        for text, held_out in zip(texts, is_val):
            if not held_out:
                size += len(text.encode())
                if size > BPE_TEXT_BYTES:
                    return
                yield text


def learn_bpe(args, documents):
    """Learns the vocabulary of --tokenizer bpe:N from the training part and saves it; a repeat gives the same bytes."""
    print(f"learning a vocabulary of {args.vocab:,} from the training part")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=args.vocab - 1, initial_alphabet=BYTE_CHARS, min_frequency=2,
                                  max_token_length=LONGEST_TOKEN, special_tokens=[], show_progress=False)
    learner.train_from_iterator(training_texts(documents, args.val_frac), trainer)
    ids = {char: byte for byte, char in enumerate(BYTE_CHARS)}
    merges = []
    for first, second in json.loads(learner.to_str())["model"]["merges"]:
        merges.append([ids[first], ids[second]])
        ids.setdefault(first + second, len(ids))
    if len(ids) + 1 < args.vocab:
        print(f"note: the text has pairs for {len(ids) + 1:,} of {args.vocab:,} types", file=sys.stderr)
    write_json(beside(args, VOCABULARY), merges, indent=None)


def progress(args, total, done):
    """The bar of a run that expects `total` training tokens and has `done` of them."""
    return tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc=args.output.name,
                mininterval=0.5 if sys.stderr.isatty() else 30)


def open_parts(args, stack, journal, tokenizer):
    """The training and the validation Part as the journal has them. tokenizer: None for words, whose ids are as wide as
    can be until their number is known."""
    parts = {}
    for name in PARTS:
        paths = [beside(args, name + ".npy.part")]
        if tokenizer is None:
            paths.append(beside(args, name + ".words.part"))
        dtype = id_type(tokenizer.vocab_size) if tokenizer else np.uint32
        parts[name] = Part(stack, paths, journal["parts"][name], dtype)
    return parts


def stream(args, pool, documents, journal, expected, tokenizer):
    """Writes the parts from the journal's cursor to the end of the source, or of the document that reaches --tokens."""
    def commit():
        journal["parts"] = {name: part.sync() for name, part in parts.items()}
        write_journal(beside(args, JOURNAL), journal)

    with contextlib.ExitStack() as stack:
        parts = open_parts(args, stack, journal, tokenizer)
        train, val = parts.values()
        commit()
        synced = time.monotonic()
        bar = stack.enter_context(progress(args, expected, train.counts["tokens"]))
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


def id_type(vocab_size):
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


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


def finish(args, settings, journal, tokenizer):
    """Turns completed parts into token files with sidecars. A repeat after a kill gives the same bytes."""
    tables, vocabulary = {}, beside(args, ".vocab.json")
    for name in PARTS:                                     # from here on, what --overwrite replaces is unfinished
        beside(args, name + ".json").unlink(missing_ok=True)
    if tokenizer is None:
        tokenizer = WordTokenizer.build(read_words(beside(args, ".words.part")))
        tables = {name: tokenizer.encode_words(read_words(beside(args, name + ".words.part"))) for name in PARTS}
    if tokenizer.name in FIXED_TOKENIZERS:
        vocabulary.unlink(missing_ok=True)
    else:
        write_json(vocabulary, tokenizer.words, indent=1 if tokenizer.name == "word" else None)
    has_val = journal["parts"][".val"]["tokens"] > 0
    val_path = beside(args, ".val.npy")
    if not has_val:
        val_path.unlink(missing_ok=True)
    for name in (".val", "") if has_val else ("",):
        counts, path = journal["parts"][name], beside(args, name + ".npy")
        place(beside(args, name + ".npy.part"), path, counts["tokens"], id_type(tokenizer.vocab_size), tables.get(name))
        sidecar = {**settings, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
                   "tokens": counts["tokens"], "documents": counts["documents"], "text_bytes": counts["text_bytes"],
                   "sha256": sha256(path), "val": val_path.name if has_val and not name else None,
                   "vocab": vocabulary.name if tokenizer.name not in FIXED_TOKENIZERS else None}
        if tokenizer.name == "bpe":
            sidecar["vocab_sha256"] = sha256(vocabulary)
        write_json(beside(args, name + ".json"), sidecar)
        print(f"{path}: {counts['tokens']:,} tokens, {counts['documents']:,} documents, "
              f"vocabulary {tokenizer.vocab_size:,}")


def clear(args):
    """Removes what only a run in progress needs; the journal first, since it vouches for the rest."""
    parts = [name + part for name in PARTS for part in (".npy.part", ".words.part")]
    for suffix in (JOURNAL, *parts, VOCABULARY):
        beside(args, suffix).unlink(missing_ok=True)


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
    id_bytes = 8 if args.tokenizer == "word" else np.dtype(id_type(args.vocab or 0)).itemsize
    need = int(expected * with_val * id_bytes)
    need -= sum(part["bytes"][0] for part in journal["parts"].values())
    free = shutil.disk_usage(args.output.parent).free
    if need > free:
        raise UserError(f"about {need / 1e9:.2f} GB are needed in {args.output.parent}, {free / 1e9:.2f} GB are free: "
                        "make room, or pass fewer --tokens or another --output")
    return expected


def earlier_run(args, settings):
    """(sidecar of a finished output, journal of a begun one), each None if there is none or it isn't to be kept."""
    sidecar = None if args.overwrite else read_sidecar(beside(args, ".json"))
    journal = read_journal(beside(args, JOURNAL))
    if journal and journal["read"] == 0 and not journal["complete"]:     # nothing to lose, so nothing to refuse
        journal = None
    known = next((old.get("revision") for old in (sidecar, journal) if old and not differences(settings, old)), None)
    return sidecar, journal, known


def prepare(args, pool):
    """Makes args.output, or finishes what an earlier run began. Raises UserError or OSError; what is synced is kept."""
    settings = {"dataset": args.dataset, "tokenizer": args.tokenizer, "tokens_asked": args.tokens,
                "val_frac": args.val_frac}
    if args.vocab is not None:
        settings["vocab_asked"] = args.vocab
    sidecar, journal, revision = earlier_run(args, settings)
    settings["revision"], size, documents = DATASETS[args.dataset]["open"](args, revision)

    if sidecar and args.output.exists():
        if wrong := differences(settings, sidecar):
            raise UserError(f"{args.output} is finished, with {wrong}: pass --overwrite or another --output")
        print(f"{args.output} is finished already: {sidecar['tokens']:,} tokens")
        return clear(args)
    if journal and (wrong := differences(settings, journal)):
        if not args.overwrite:
            raise UserError(f"{args.output} is begun, with {wrong}: pass --overwrite or another --output")
        journal = None
    if not journal and not args.overwrite and args.output.exists():
        raise UserError(f"{args.output} exists without a sidecar {beside(args, '.json').name}: pass --overwrite or "
                        "another --output")

    resumed = journal is not None
    if not resumed:
        journal = {**settings, "cursor": None, "read": 0, "complete": False, "parts": {name: EMPTY for name in PARTS}}
    expected = check_disk(args, size, journal)
    if resumed:
        print(f"going on after document {journal['read']:,}")
    tokenizer = open_tokenizer(args, documents, journal)
    if not journal["complete"]:
        stream(args, pool, documents, journal, expected, tokenizer)
    tokens = journal["parts"][""]["tokens"]
    if tokens == 0:
        clear(args)
        raise UserError("no document with text in it to train on: nothing was written")
    if args.tokens is not None and tokens < args.tokens:
        print(f"note: the source ended at {tokens:,} of {args.tokens:,} tokens", file=sys.stderr)
    finish(args, settings, journal, tokenizer)
    clear(args)


def open_tokenizer(args, documents, journal):
    """The tokenizer, with the vocabulary that a bpe run has or learns now; None for words, whose vocabulary grows."""
    if args.tokenizer == "word":
        return None
    if args.tokenizer in FIXED_TOKENIZERS:
        return FIXED_TOKENIZERS[args.tokenizer]()
    path = beside(args, VOCABULARY)
    if "vocab_sha256" not in journal:
        learn_bpe(args, documents)
        journal["vocab_sha256"] = sha256(path)
    elif not path.is_file() or sha256(path) != journal["vocab_sha256"]:
        raise UserError(f"{path} is not what its journal says: delete the .part.json beside it to start afresh")
    return read_bpe(path)


def token_count(text):
    """'100M' -> 100_000_000"""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.upper())
    tokens = Decimal(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[match[2]] if match else 0
    if tokens < 1 or tokens != int(tokens):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens: write 100M, 1B or 250000")
    return int(tokens)


def tokenizer_name(text):
    """'bpe:8192' -> ('bpe', 8192); 'byte' -> ('byte', None)"""
    name, _, size = text.partition(":")
    if name == "bpe" and re.fullmatch("[0-9]{1,9}", size) and int(size) in BPE_SIZES:
        return name, int(size)
    if text == "word" or text in FIXED_TOKENIZERS:
        return text, None
    raise argparse.ArgumentTypeError(f"{text!r} is none of word, {', '.join(FIXED_TOKENIZERS)}, bpe:N with N from "
                                     f"{BPE_SIZES[0]} to {BPE_SIZES[-1]}")


def path_of(text):
    """Type of a flag: a path; an empty one would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: a variable that isn't set?")
    return Path(text)


def parse_args(argv=None):
    """The command line, with the dataset's defaults filled in; ends the program with 2 where it makes no sense."""
    def defaults(key):
        return ", ".join(f"{name} {spec[key]}" for name, spec in DATASETS.items() if spec[key] is not None)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    parser.add_argument("--dataset", required=True, choices=DATASETS, help="where the documents come from")
    parser.add_argument("--input", nargs="+", type=path_of, metavar="PATH", help="text: .txt, .md, .jsonl (field text) "
                        "and .parquet (column text) files, or folders of them; wikitext2: a folder of "
                        "wiki.{train,valid,test}.tokens [from the hub, into the folder of --output]")
    parser.add_argument("--tokenizer", type=tokenizer_name, metavar="NAME", help="word, gpt2, byte, or bpe:N, byte "
                        f"pairs learned from the training part, N types in all [{defaults('tokenizer')}]")
    parser.add_argument("--tokens", type=token_count, metavar="N", help="end with the document that reaches N training "
                        "tokens: 100M, 1B, 250000; validation comes on top [all; fineweb-edu needs it]")
    parser.add_argument("--val-frac", type=float, metavar="F", help="share of the documents held out for "
                        f"validation, evenly spaced [{defaults('val_frac')}]; wikitext2 has its own split")
    parser.add_argument("--output", "--out", required=True, type=path_of, metavar="NAME.npy",
                        help="token file to write")
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
            (not 1 <= args.workers <= MOST_WORKERS, f"--workers must be 1 to {MOST_WORKERS}, not {args.workers}")):
        if wrong:
            parser.error(message)
    spec = DATASETS[name]
    args.tokenizer, args.vocab = args.tokenizer or (spec["tokenizer"], None)
    args.val_frac = spec["val_frac"] if args.val_frac is None else args.val_frac
    return args


@exit_code("a .txt file is read whole; cut it up, or write it as .jsonl")
def main(argv=None):
    """Raises UserError, and SystemExit of 2 for a wrong command line, 130 or 143 when stopped."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):           # a path may hold what the terminal's encoding can't
            output.reconfigure(errors="backslashreplace")
    args = parse_args(argv)

    def stop(signum, _frame):
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with worker_pool(args) as pool, exclusive(beside(args, ".npy.lock"), args.output):
            prepare(args, pool)
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"disk full{where}: make room and run the same command again to go on") from None
        raise UserError(f"{e.strerror or e}{where}: correct that and run the same command again") from None
    except SystemExit:
        print("stopped; run the same command again to go on", file=sys.stderr)
        raise


if __name__ == "__main__":
    sys.exit(main())
