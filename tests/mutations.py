"""Ways to damage a file. Every mutator takes (rng, path), changes the file in place, and returns in words what it did.

FORMATS lists the mutators of a kind of file; one that stands there twice is drawn twice as often.
"""

import collections
import json
import os
import struct
import zipfile

import numpy as np

DEEP = 100_000                                             # levels of nesting
SPARSE_BYTES = 3 << 30                                     # a file that must not be read whole
MARK = "fuzz:"                                             # begins a name of what json or pickle can't write

# -----------------------------------------------------------------------------
# Any file, as bytes and as a place in the file system


def empty(rng, path):
    path.write_bytes(b"")
    return "empty"


def truncate(rng, path):
    data = path.read_bytes()
    length = rng.randrange(len(data))
    path.write_bytes(data[:length])
    return f"cut to {length} of {len(data)} bytes"


def flip_bits(rng, path):
    data = bytearray(path.read_bytes())
    places = [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 8)))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bits flipped in bytes {places}"


def zeros(rng, path):
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    length = min(len(data) - start, rng.choice((1, 16, 512, 4096)))
    data[start:start + length] = bytes(length)
    path.write_bytes(data)
    return f"{length} bytes from {start} zeroed"


def garbage(rng, path):
    data = path.read_bytes()
    length = rng.choice((1, 100, 10_000))
    path.write_bytes(data + rng.randbytes(length))
    return f"{length} random bytes appended"


def noise(rng, path):
    path.write_bytes(rng.randbytes(5000))
    return "5000 random bytes"


def folder(rng, path):
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def missing(rng, path):
    path.unlink()
    return "deleted"


def dangling(rng, path):
    path.unlink()
    path.symlink_to("nowhere")
    return "a link to nowhere"


def endless(rng, path):
    path.unlink()
    path.symlink_to("/dev/zero")
    return "a link to /dev/zero"


def sparse(rng, path):
    os.truncate(path, SPARSE_BYTES)
    return f"zeros appended up to {SPARSE_BYTES:,} bytes"


# -----------------------------------------------------------------------------
# Text


def recode(rng, path):
    encoding = rng.choice(("utf-16", "utf-32", "latin-1", "cp500"))
    path.write_bytes(path.read_bytes().decode().encode(encoding, "replace"))
    return f"encoded as {encoding}"


def byte_order_mark(rng, path):
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return "a byte-order mark before it"


def not_utf8(rng, path):
    data = path.read_bytes()
    place = rng.randrange(len(data))
    wrong = rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"))
    path.write_bytes(data[:place] + wrong + data[place:])
    return f"bytes {wrong!r} at {place}"


def odd_text(rng, path):
    name, text = rng.choice((
        ("one character", "a"), ("blanks", " \n\t" * 1000), ("NULs", "\0" * 1000), ("digits", "1234567890 " * 500),
        ("a line of 1 MB", "x" * 1_000_000), ("controls", "".join(map(chr, range(32))) * 50),
        ("surrogates' neighbours", "\ud7ff\ue000\uffff\U0010ffff" * 500), ("carriage returns", "a b\r\n\r" * 500),
        ("separators", "a\u2028b\u0085c\u00a0d " * 300)))
    path.write_bytes(text.encode())
    return name


# -----------------------------------------------------------------------------
# JSON

RAW = {
    "100,000 lists": "[" * DEEP + "]" * DEEP,
    "100,000 objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "a number of 5000 digits": "9" * 5000,
    "a number of 400 digits": "9" * 400,
    "1e999": "1e999",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
}
STRANGE_NAMES = {"type", "constructor", "__class__", ""}
VALUES = [None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, -2**63, 2**70, 0.5, -0.5, 1e-300, 1e308, 710.5, "", "nan",
          "-1", "1e9", "x" * 100_000, "\ud800", "a\0b", "\x1b[31m\r", "🦙", "../../../etc/passwd", "/dev/zero", ".",
          "%s{}", [], {}, [1, 2, 3], {"a": 1}, [[]], [None], [1] * 10_000]


def spot(rng, tree):
    """A random (container, key) in nested dicts and lists; shallow ones come as often as deep ones."""
    node = tree
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        child = node[key]
        if not (isinstance(child, (dict, list)) and child) or rng.random() < 0.3:
            return node, key
        node = child


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def to_text(value):
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(f'"{MARK}{name}"', raw)
    return text


def short(value):
    return repr(value) if len(repr(value)) < 50 else f"{repr(value)[:40]}... ({len(repr(value)):,} characters)"


def nasty(rng):
    return MARK + rng.choice(list(RAW)) if rng.random() < 0.35 else rng.choice(VALUES)


def swap_type(value):
    """The same value in another type."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list):
        return {str(i): item for i, item in enumerate(value)}
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, str):
        return [value]
    return str(value) if isinstance(value, int) else int(value) if abs(value) < 1e9 else str(value)


def change_tree(rng, tree):
    """Change one place of nested dicts and lists; returns in words what was done."""
    node, key = spot(rng, tree)
    action = rng.choice(("replace", "replace", "replace", "swap", "negate", "delete", "rename", "wrap", "repeat"))
    old = node[key]
    if action == "delete":
        del node[key]
        return f"{key!r} deleted"
    if action == "rename" and isinstance(node, dict):
        name = rng.choice(sorted(STRANGE_NAMES))
        node[name] = node.pop(key)
        return f"{key!r} renamed to {name!r}"
    if action == "swap":
        node[key] = swap_type(old)
    elif action == "negate" and type(old) in (int, float):
        node[key] = -old
    elif action == "wrap":
        node[key] = [old]
    elif action == "repeat" and isinstance(old, list):
        node[key] = old * 3
    else:
        node[key] = nasty(rng)
    return f"{short(old)} of {key!r} became {short(node[key])}"


def json_value(rng, path):
    tree = read_json(path)
    said = change_tree(rng, tree)
    path.write_text(to_text(tree))
    return said


def json_whole(rng, path):
    value = nasty(rng)
    path.write_text(to_text(value))
    return f"all of it became {short(value)}"


def json_twice(rng, path):
    text = path.read_text(encoding="utf-8")
    path.write_text(text + rng.choice((text, "]", "\0", "{")), encoding="utf-8")
    return "more after its end"


def json_swapped(rng, path):
    path.write_text(json.dumps(swap_type(read_json(path))))
    return "list for dict, or dict for list"


def read_lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def write_lines(path, lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def line_value(rng, path):
    lines = read_lines(path)
    n = rng.choice((0, len(lines) - 1, rng.randrange(len(lines))))
    tree = json.loads(lines[n])
    said = change_tree(rng, tree)
    lines[n] = to_text(tree)
    write_lines(path, lines)
    return f"line {n + 1}: {said}"


def line_whole(rng, path):
    lines, value = read_lines(path), nasty(rng)
    n = rng.randrange(len(lines))
    lines[n] = to_text(value)
    write_lines(path, lines)
    return f"line {n + 1} became {short(value)}"


def line_order(rng, path):
    lines = read_lines(path)
    action = rng.choice(("drop", "double", "shuffle", "blank", "join"))
    n = rng.choice((0, len(lines) - 1, rng.randrange(len(lines))))
    if action == "drop":
        del lines[n]
    elif action == "double":
        lines.insert(n, lines[n])
    elif action == "shuffle":
        rng.shuffle(lines)
    elif action == "blank":
        lines.insert(n, "")
    else:
        lines[n:n + 2] = ["".join(lines[n:n + 2])]
    write_lines(path, lines)
    return f"lines: {action} at {n + 1}"


# -----------------------------------------------------------------------------
# .npy

SHAPES = ("({n},)", "(-1,)", "({n}, 1)", "(1, {n})", "()", "(0,)", "(1000000000000,)", "(9223372036854775808,)",
          "(2, 4611686018427387904)", "(4294967296, 4294967296)", "(-{n},)", "{n}", "[{n}]", "(True,)", "({n}.0,)",
          "('{n}',)", "(None,)", "({n}, 0)")
DESCRIPTIONS = ("'|O'", "'<f8'", "'>u2'", "'<i2'", "'<u8'", "'|V0'", "'|S0'", "'<U100000000'", "'nonsense'",
                "[('a', '<u2')]", "None", "('<u2', (3,))", "'|u1'", "'<M8[ns]'", "{'names': [], 'formats': []}",
                "'<c16'")


def npy_parts(path):
    data = path.read_bytes()
    end = 10 + struct.unpack("<H", data[8:10])[0]
    return data[:8], data[10:end].decode("latin-1"), data[end:]


def write_npy(path, header, body, magic=b"\x93NUMPY\x01\x00"):
    header = header.encode("latin-1")
    length = struct.pack("<H", len(header)) if magic[6] == 1 else struct.pack("<I", len(header))
    path.write_bytes(magic + length + header + body)


def npy_shape(rng, path):
    _, _, body = npy_parts(path)
    n, shape, descr = len(body) // 2, rng.choice(SHAPES), "'<u2'"
    if rng.random() < 0.5:
        shape, descr = "({n},)", rng.choice(DESCRIPTIONS)
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape.format(n=n)}, }}".ljust(117) + "\n"
    write_npy(path, header, body)
    return f"header {header.strip()}"


def npy_header(rng, path):
    magic, header, body = npy_parts(path)
    name, header = rng.choice((
        ("60,000 brackets", "(" * 60_000), ("60,000 minus signs", "-" * 60_000 + "1"), ("nothing", ""),
        ("an open string", "{'descr': '<u2"), ("no dict", "[1, 2]\n"), ("an expression", "__import__('os')\n"),
        ("no shape", "{'descr': '<u2', 'fortran_order': False}\n"), ("strange keys", "{'a': 1, 1: 2}\n"),
        ("fortran", header.replace("False", "True")), ("another order", header.replace("False", "'no'")),
        ("a huge number", header.replace("'shape': (", "'shape': (" + "9" * 5000)), ("NULs", "\0" * 118),
        ("65,000 blanks", header.strip() + " " * 65_000 + "\n"), ("odd characters", "\xff\xfe" * 59),
        ("broken tokens", "{'descr': \\\n 1e\n'''}")))
    write_npy(path, header, body)
    return f"header: {name}"


def npy_version(rng, path):
    _, header, body = npy_parts(path)
    version = rng.choice((b"\x02\x00", b"\x03\x00", b"\x09\x09", b"\x00\x00", b"\x01\x07"))
    write_npy(path, header, body, b"\x93NUMPY" + version)
    return f"version {tuple(version)}"


def npy_length(rng, path):
    data = bytearray(path.read_bytes())
    data[8:10] = struct.pack("<H", rng.choice((0, 1, 117, 119, 65535)))
    path.write_bytes(data)
    return f"header length {struct.unpack('<H', data[8:10])[0]}"


def npy_ids(rng, path):
    ids = np.load(path)
    n = rng.randrange(len(ids))
    action = rng.choice(("reverse", "swap", "last", "far", "zero", "shorter", "longer", "signed", "wide"))
    if action == "reverse":
        ids = ids[::-1].copy()
    elif action == "swap":
        ids[[0, -1]] = ids[[-1, 0]]
    elif action in ("last", "far", "zero"):
        ids[n] = {"last": ids.max(), "far": 65535, "zero": 0}[action]
    elif action in ("shorter", "longer"):
        ids = ids[:n] if action == "shorter" else np.concatenate([ids, ids[:n]])
    else:
        ids = ids.astype(np.int64 if action == "signed" else np.uint32)
    with open(path, "wb") as f:                            # by its path, NumPy would choose the name's end
        np.save(f, ids)
    return f"ids: {action} at {n}"


# -----------------------------------------------------------------------------
# Checkpoints by content. What can't be pickled within the recursion limit is put in place of a marker of the pickle.

PICKLES = {
    "100,000 lists": b"]" * DEEP + b"a" * (DEEP - 1),
    "100,000 dicts": b"}K\x01" * (DEEP - 1) + b"}" + b"s" * (DEEP - 1),
}


def tensors(rng, old):
    """(name, tensor) made of a tensor, or of none."""
    import torch
    t = old if isinstance(old, torch.Tensor) else torch.ones(4)
    real = t.float() if not t.is_floating_point() else t
    made = {
        "sparse": lambda: real.to_sparse(),
        "sparse rows": lambda: real.reshape(1, -1).to_sparse_csr(),
        "complex": lambda: torch.complex(real, real),
        "quantised": lambda: torch.quantize_per_tensor(real, 0.1, 0, torch.qint8),
        "int8": lambda: t.to(torch.int8),
        "bool": lambda: t.bool(),
        "float64": lambda: t.double(),
        "float8": lambda: real.to(torch.float8_e4m3fn),
        "bfloat16": lambda: t.bfloat16(),
        "transposed": lambda: t.reshape(t.shape + (1,)).transpose(0, -1),
        "one dimension more": lambda: t[None].contiguous(),
        "flat": lambda: t.flatten().contiguous(),
        "no elements": lambda: t.new_zeros(0),
        "one element": lambda: t.new_zeros(()),
        "one row less": lambda: t[:-1].clone() if t.dim() and len(t) else t.new_zeros(0),
        "a huge view of one element": lambda: t.new_zeros(1).expand(1 << 20, 1 << 20),
        "strides of 0": lambda: t.new_ones(1).expand(t.numel()).view(t.shape) if t.numel() else t,
        "NaN": lambda: torch.full_like(real, float("nan")),
        "infinite": lambda: torch.full_like(real, float("inf")),
        "1e36": lambda: torch.full_like(real, 1e36),
        "negative": lambda: -real,
        "zeros": lambda: torch.zeros_like(t),
        "meta": lambda: t.to("meta"),
        "a parameter": lambda: torch.nn.Parameter(real),
    }
    name = rng.choice(list(made))
    return name, made[name]()


def cyclic():
    made = []
    made.append(made)
    return made


def odd_value(rng, old):
    """(name, value) to take the place of a value in a checkpoint."""
    if rng.random() < 0.45:
        return tensors(rng, old)
    if rng.random() < 0.25:
        name = rng.choice(list(PICKLES))
        return name, MARK + name
    values = [*VALUES, float("nan"), float("inf"), -float("inf"), 10**400, 2 + 1j, b"bytes", (), (1, 2), {1, 2},
              {1: 2, None: 3}, {2.5: [1]}, collections.OrderedDict(a=1), collections.Counter("aab"), cyclic()]
    value = rng.choice(values)
    return short(value), value


def write_checkpoint(path, content):
    import torch
    torch.save(content, path)
    if not any(f"{MARK}{name}".encode() in path.read_bytes() for name in PICKLES):
        return
    with zipfile.ZipFile(path) as f:
        entries = {name: f.read(name) for name in f.namelist()}
    with zipfile.ZipFile(path, "w") as f:
        for entry, data in entries.items():
            for name, raw in PICKLES.items() if entry.endswith("data.pkl") else ():
                text = f"{MARK}{name}".encode()
                data = data.replace(b"X" + struct.pack("<I", len(text)) + text, raw)
            f.writestr(entry, data)


def checkpoint_value(rng, path):
    import torch
    content = torch.load(path, weights_only=True)
    node, key = spot(rng, content)
    action = rng.choice(("replace", "replace", "replace", "replace", "delete", "more", "wrap"))
    if action == "delete":
        del node[key]
        said = f"{key!r} deleted"
    elif action == "more" and isinstance(node, dict):
        name, node["more"] = odd_value(rng, node[key])
        said = f"'more' beside {key!r}: {name}"
    elif action == "wrap":
        node[key] = {"a": node[key]}
        said = f"{key!r} inside a dict"
    else:
        said, node[key] = odd_value(rng, node[key])
        said = f"{key!r} became {said}"
    write_checkpoint(path, content)
    return said


def checkpoint_part(part):
    """Mutator of a value right below one part of a checkpoint, of which random places rarely hit each."""
    def change(rng, path):
        import torch
        content = torch.load(path, weights_only=True)
        node = content if part is None else content[part]
        key = rng.choice(list(node))
        said, node[key] = odd_value(rng, node[key])
        write_checkpoint(path, content)
        return f"{part or 'top'}: {key!r} became {said}"
    return change


def optimizer_state(rng, path):
    """A value of one parameter's state: its step, its moments."""
    import torch
    content = torch.load(path, weights_only=True)
    states = content["optimizer"]["state"]
    state = states[rng.choice(list(states))]
    key = rng.choice(list(state))
    said, state[key] = odd_value(rng, state[key])
    write_checkpoint(path, content)
    return f"optimizer state: {key!r} became {said}"


def archive(rng, path):
    """A zip entry of a checkpoint dropped, doubled, or compressed; its pickle cut or changed."""
    with zipfile.ZipFile(path) as f:
        entries = {name: f.read(name) for name in f.namelist()}
    name = rng.choice(list(entries))
    action = rng.choice(("drop", "cut", "zero", "long", "pickle", "compress"))
    pickled = next(entry for entry in entries if entry.endswith("data.pkl"))
    if action == "drop":
        del entries[name]
    elif action == "cut":
        entries[name] = entries[name][:len(entries[name]) // 2]
    elif action == "zero":
        entries[name] = bytes(len(entries[name]))
    elif action == "long":
        entries[name] += bytes(100)
    elif action == "pickle":
        name, data = pickled, bytearray(entries[pickled])
        for _ in range(rng.choice((1, 4))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        entries[name] = bytes(data)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if action == "compress" else zipfile.ZIP_STORED) as f:
        for entry, data in entries.items():
            f.writestr(entry, data)
    return f"zip entry {name}: {action}"


# -----------------------------------------------------------------------------
# Pretrained Llamas

def gguf_number(rng, path):
    """One of the numbers at the beginning of a .gguf: version, counts, or any four bytes of its settings."""
    data = bytearray(path.read_bytes())
    place = rng.choice((4, 8, 16, rng.randrange(24, min(len(data), 3000))))
    number = rng.choice((0, 1, 2**31, 2**32 - 1))
    data[place:place + 4] = struct.pack("<I", number)
    path.write_bytes(data)
    return f"{number} at byte {place}"


def safetensors_header(rng, path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    said = change_tree(rng, header)
    text = to_text(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return f"header: {said}"


def safetensors_length(rng, path):
    data = path.read_bytes()
    length = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    path.write_bytes(struct.pack("<Q", length) + data[8:])
    return f"header length {length}"


BYTES = [empty, truncate, truncate, flip_bits, flip_bits, flip_bits, zeros, garbage, noise]
PLACES = [folder, missing, dangling, endless]
TEXT = [empty, truncate, flip_bits, recode, byte_order_mark, not_utf8, odd_text, *PLACES]
JSON = [*TEXT, sparse, json_whole, json_twice, json_swapped, *[json_value] * 12]
FORMATS = {
    "bytes": [*BYTES, *PLACES],
    "text": [*TEXT, truncate, flip_bits, odd_text, odd_text, zeros],
    "json": JSON,
    "jsonl": [*TEXT, sparse, line_whole, line_whole, line_order, line_order, line_order, *[line_value] * 8],
    "npy": [*BYTES, *PLACES, *[npy_shape] * 4, *[npy_header] * 4, npy_version, npy_length, *[npy_ids] * 4],
    "checkpoint": [*[checkpoint_value] * 4, *[checkpoint_part(None)] * 3, *[checkpoint_part("config")] * 4,
                   *[checkpoint_part("model")] * 4, checkpoint_part("tokenizer"), *[archive] * 3],
    "gguf": [*BYTES, *PLACES, *[gguf_number] * 6],
    "safetensors": [*BYTES, *PLACES, *[safetensors_header] * 6, safetensors_length],
}
FORMATS["last checkpoint"] = [*FORMATS["checkpoint"], *[optimizer_state] * 3, checkpoint_part("optimizer"),
                              checkpoint_part("rng"), checkpoint_part("data")]
