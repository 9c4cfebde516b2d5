"""README and docs say what is true: their commands are ones that the scripts take, the make targets and files that they
name exist, make runs the experiments as written, and the tables and results.json are what the committed runs say."""

import argparse
import hashlib
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import run_paper_manifest as runner
import train_dba
from train_dba import main, make_config, parse_args, stream_bytes

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
TARGETS = ("bottleneck96", "decoupled", "standard", "gqa", "small128", "long1024", "long2048", "fineweb_standard",
           "fineweb_decoupled")


def commands_of(text):
    """Commands of the fenced blocks of a page, each on one line without its comment."""
    blocks = [block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M) if kind != "python"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if not re.match("#|export ", line)]         # of a script for Slurm
    return [" ".join(re.sub(r"\s#.*", "", line).split()) for line in lines]


COMMANDS = [(page, command) for page, text in TEXT.items() for command in commands_of(text)]
LAUNCHER = r"(?:srun )?torchrun(?: --\S+ \S+)*(?= train_dba)"
PYTHON = [(page, re.sub(LAUNCHER, "python3", c)) for page, c in COMMANDS if re.match(f"python3|{LAUNCHER}", c)]
MAKE = sorted({command for _, command in COMMANDS if command.startswith("make ")}
              | {command for text in TEXT.values() for command in re.findall(r"`(make [^`\n]+)`", text)})
PAPER = [command for page, command in PYTHON if page == "docs/experiments.md"
         and re.search(r"train_dba.py .*--out-dir runs/(wikitext2|fineweb100m)/", command)]
SAMPLING = sorted({command for _, command in PYTHON if "--mode sample" in command})


# -----------------------------------------------------------------------------
# What pages name

class Parsed(Exception):
    """Raised in place of the work that would follow the reading of a command line."""


@pytest.fixture
def only_parse(monkeypatch):
    """Calls a script's main function on a command line, which must get past the parser; returns what it read."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *args, **kwargs):
        raise Parsed(parse(parser, *args, **kwargs))

    def run(command):
        script, *argv = shlex.split(command)[1:]
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(script.removesuffix(".py")).main(argv)
        monkeypatch.undo()
        return vars(parsed.value.args[0])
    return run


def test_every_kind_of_command_is_shown():
    scripts = {shlex.split(command)[1] for _, command in PYTHON}
    assert scripts >= {"train_dba.py", "prepare_fineweb.py", "eval_dba.py", "run_paper_manifest.py", "vis_heatmap.py"}
    assert not {c for _, c in COMMANDS if c} - {c for _, c in COMMANDS if re.match(f"python3|{LAUNCHER}|make", c)}
    evaluations = {shlex.split(command)[2] for _, command in PYTHON if "eval_dba.py" in command}
    assert evaluations == {"ppl", "latency", "memory", "sweep", "probes", "rank", "policy", "tasks"}


@pytest.mark.parametrize("page, command", PYTHON)
def test_command_is_one_that_its_script_takes(page, command, only_parse):
    read = only_parse(command)
    if "train_dba.py" in command:
        make_config(**read)


def test_checkpoints_are_those_of_the_demo(only_parse):
    """A clone has no others than those in pretrained/, but for the Llama that `make llama` fetches, and what commands
    above on the page have made."""
    made = []
    for page, command in PYTHON:
        ckpts = re.findall(r"--(?:ckpt|compare) (\S+)", command)
        known = r"(runs/demo|pretrained)/(standard|decoupled)\b|data/SmolLM2"
        assert all(re.match(known, ckpt) or (page, ckpt) in made for ckpt in ckpts), (page, command)
        made += [(page, folder) for folder in re.findall(r"--out-dir (\S+)", command)]


@pytest.mark.parametrize("command", MAKE)
def test_make_target_exists(command):
    subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, check=True, capture_output=True)


def headings(path):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXT)
def test_links_resolve(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if not link.startswith("http"):
            path, _, heading = link.partition("#")
            assert (folder / path).exists(), f"{page}: {link}"
            assert not heading or heading in headings(folder / path), f"{page}: {link}"
    for owner, name in re.findall(r"`([A-Z]\w+)\.(\w+)`", TEXT[page]):
        assert hasattr(getattr(train_dba, owner), name), f"{page}: {owner}.{name}"
    for name in re.findall(r"pip install -r (\S+) -c (\S+?)`", TEXT[page]):
        assert all((ROOT / file).is_file() for file in name)


def test_readme_is_an_index():
    readme = TEXT["README.md"]
    assert len(readme.splitlines()) <= 200
    block = readme.split("<!-- results: written by make report -->")[1].split("<!-- end of results -->")[0]
    assert readme.count("<!--") == 2 and sum(line.startswith("|") for line in block.splitlines()) <= 2 + 8
    for path in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{path.name})" in readme, f"no link to {path.name}"


def test_bytes_of_the_cache_page():
    widths = {"standard": (512, 512), "decoupled 32/64": (32, 64, 96)}
    for mode, streams in widths.items():
        elements, *costs = re.search(rf"\| {mode} \| (.*) \|", TEXT["docs/cache.md"])[1].replace(",", "").split(" | ")
        assert int(elements) == sum(streams)
        for policy, cost in zip(("fp16", "q8_0", "q4_0", "hetero"), costs, strict=True):
            if cost != "-":
                formats = ("q4_0", "q8_0", "q4_0") if policy == "hetero" else [policy] * len(streams)
                assert cost == f"{sum(map(stream_bytes, formats, streams))} B"


# -----------------------------------------------------------------------------
# Commands run

@pytest.fixture
def tiny_data(tmp_path, monkeypatch):
    """A working folder with the token files that the pages name, of some thousand word tokens each."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    words = [f"w{i}" for i in range(48)] + ["<eos>", "<unk>"]
    for name in ("wikitext2", "fineweb_100m"):
        (data / f"{name}.vocab.json").write_text(json.dumps(words))
        for part, n in (("", 30_000), (".val", 2100)):
            path = data / f"{name}{part}.npy"
            np.save(path, np.random.default_rng(n).integers(0, 50, n).astype(np.uint16))
            info = dict(dataset=name, revision=None, tokenizer="word", vocab_size=50, eot=48, tokens=n, documents=1,
                        sha256=hashlib.sha256(path.read_bytes()).hexdigest(), text_bytes=5 * n,
                        val=None if part else f"{name}.val.npy", vocab=f"{name}.vocab.json")
            (data / f"{name}{part}.json").write_text(json.dumps(info))


def test_experiments_page_has_every_experiment():
    assert len(PAPER) == len({parse_args(shlex.split(c)[2:])["out_dir"] for c in PAPER}) == len(TARGETS)


def test_make_runs_the_experiments_as_written():
    """The manifest's row of each target resolves to the settings of the command on the page, in the same folder."""
    manifest = runner.read_manifest(ROOT / "paper_manifest.json")
    printed = subprocess.run(["make", "-n", *TARGETS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    calls = re.findall(r"run_paper_manifest\.py .*--group (\w+) --only (\S+) --seeds (\d+)", printed)
    assert len(calls) == len(TARGETS)
    made = {}
    for group, only, seed in calls:
        run, = runner.list_runs(manifest, [group], "data", "runs", [only], [int(seed)])
        made[run.cfg.out_dir] = run.cfg
    written = [make_config(**parse_args(shlex.split(command)[2:])) for command in PAPER]
    assert {cfg.out_dir: cfg for cfg in written} == made


@pytest.mark.parametrize("command", PAPER, ids=lambda c: re.search(r"runs/(\S+)", c)[1])
def test_training_command(command, tiny_data, capsys):
    argv = [*shlex.split(command)[2:], "--steps", "2", "--batch-size", "1"]
    given = parse_args(argv)
    assert main(argv) == 0
    run = Path(given["out_dir"])
    resolved = json.loads((run / "resolved_config.json").read_text())
    assert resolved == {**resolved, **given}
    log = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert [line["type"] for line in log] == ["meta", "train", "train", "eval", "done"]
    assert log[0]["config"] == resolved and log[-2]["val_tokens"] == (2999 if "val_frac" in given else 2099)
    page = TEXT["docs/run_folders.md"]
    named = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert named >= {"command.txt", "resolved_config.json", "env.json", "train.jsonl", "last.pt", "best.pt"}
    for name in named | {key for line in log for key in line} | set(log[0]["data"]):
        assert f"`{name}`" in page, f"docs/run_folders.md doesn't tell of {name}"


@pytest.mark.parametrize("command", SAMPLING)
def test_sampling_command(command, tiny_data, capsys):
    ckpt = Path(parse_args(shlex.split(command)[2:])["ckpt"])
    tiny = ("--size tiny --d-model 16 --d-ff 16 --layers 1 --n-head 2 --steps 2 --attn-mode decoupled --sem-dim 4 "
            "--geo-dim 8 --dtype float32")
    run = ckpt.parent if ckpt.suffix else ckpt
    assert main(f"--data data/wikitext2.npy --out-dir {run} {tiny}".split()) == 0
    before = {path: path.read_bytes() for path in run.iterdir()}
    capsys.readouterr()
    assert main(shlex.split(command)[2:]) == 0
    assert len(capsys.readouterr().out.split()) > 50
    assert before == {path: path.read_bytes() for path in run.iterdir()}


def test_python_of_the_readme(tiny_data, capsys):
    """The block does what it says with a run of the name that it has."""
    block, = re.findall(r"^```python\n(.*?)^```", TEXT["README.md"], re.MULTILINE | re.DOTALL)
    run = re.search(r'read_model\("(.*?)"\)', block)[1]
    flags = f"--tokenizer byte --out-dir {run} --size tiny --steps 2".split()
    assert main(["--data", str(ROOT / "README.md"), *flags]) == 0
    capsys.readouterr()
    exec(compile(block, "README.md", "exec"), {})
    nats, text = capsys.readouterr().out.split(" ", 1)
    assert 4 < float(nats) < 7 and text.startswith("b")


# -----------------------------------------------------------------------------
# The Makefile

def script(path, text):
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


EXPORTED = re.search(r"^TEXTS = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


def make(*args):
    """Result of make in the project's folder, without what a make that runs the tests has put in the environment."""
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith(("MAKE", "MFLAGS")) and name not in EXPORTED}
    return subprocess.run(["make", *args], cwd=ROOT, capture_output=True, text=True, env=clean)


def test_commands_that_make_runs_parse(only_parse):
    """Those of demo, evaluations and llama, and the three that the demo ends with."""
    printed = make("-n", "demo", "checkpoints", "evaluations", "llama", "heatmap", "memory", "report", "dry_run").stdout
    lines = printed.replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^echo '\s*(.*)'$", r"\1", line) for line in lines]
    matches = [re.search(r"\S+/python (\w+\.py .*?)(?: \|\| |$)", line) for line in lines]
    made = [f"python3 {match[1]}" for match in matches if match and not match[1].startswith("tests")]
    for command in made:
        if "benchmarks/" not in command:
            only_parse(command)
    assert len(made) > 30 and any('--prompt "The list "' in command for command in made)


def test_free_text_reaches_the_command_as_written(tmp_path):
    script(tmp_path / "venv/bin/python", 'for word in "$@"; do printf "%s\\n" "$word"; done')
    (tmp_path / "venv/.ready").touch()
    text = """it's $5 or "$(HOME)" `x` # 7 % \\ & more"""
    result = make("-s", "heatmap", f"VENV={tmp_path}/venv", f"PROMPT={text}", "ANCHOR=$5 or", "CKPT=my runs/a b")
    assert result.stdout.splitlines()[1:] == ["--ckpt", "my runs/a b", "--prompt", text, "--anchor", "$5 or"]
    default = make("-s", "heatmap", f"VENV={tmp_path}/venv", "RUNS=elsewhere").stdout.splitlines()
    assert default[1:4] == ["--ckpt", "elsewhere/demo/decoupled", "--prompt"] and default[6] in default[4]


@pytest.mark.parametrize("name", ["RUNS", "DATA", "VENV", "PYTHON"])
@pytest.mark.parametrize("value", ["my runs", "a;b", "a'b", "a$b", "a(b"])
def test_a_path_that_make_cannot_quote_is_refused_at_once(name, value):
    result = make("-n", "demo", f"{name}={value}")
    assert result.returncode != 0 and not result.stdout
    assert f'{name}="{value}" must be one path' in result.stderr and len(result.stderr.splitlines()) == 1


def fake_python(folder, version="(3, 12)"):
    """A Python whose `-m venv --clear VENV` makes an environment whose Python notes its arguments in calls.txt."""
    log = folder / "calls.txt"
    inner = f'case "$*" in *--version*) exit 0;; esac; echo "$@" >> {log}'
    script(folder / "python", f"""
if [ "$1" = -c ]; then exec {sys.executable} -c "import sys; sys.version_info = {version}; exec(sys.argv[1])" "$2"; fi
for venv in "$@"; do :; done
echo "$@" >> {log}
mkdir -p $venv/bin; touch $venv/pyvenv.cfg; rm -f $venv/.unfinished
printf '#!/bin/sh\\n%s\\n' '{inner}' > $venv/bin/python; chmod +x $venv/bin/python""")
    return [f"PYTHON={folder}/python", f"VENV={folder}/venv"], log


def test_environment_is_made_once_and_again_when_it_was_left_half_made(tmp_path):
    given, log = fake_python(tmp_path)
    assert make("env", *given).returncode == 0
    calls = log.read_text().splitlines()
    assert calls[0].startswith("-m venv") and [line.split()[-1] for line in calls[1:]] == ["torch==2.13.0",
                                                                                         "requirements.txt"]
    assert all("-c constraints.txt" in line and " -q" not in line for line in calls[1:])
    assert make("env", *given).returncode == 0 and log.read_text().splitlines() == calls
    (tmp_path / "venv/.ready").rename(tmp_path / "venv/.unfinished")             # as after a kill
    result = make("env", *given)
    assert result.returncode == 0 and "half made" in result.stdout
    assert log.read_text().splitlines() == calls * 2


def test_a_folder_of_something_else_is_not_cleared(tmp_path):
    given, log = fake_python(tmp_path)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/thesis.txt").touch()
    result = make("env", *given)
    assert result.returncode != 0 and "something else" in result.stdout + result.stderr
    assert (tmp_path / "venv/thesis.txt").exists() and not log.exists()


@pytest.mark.parametrize("python, words", [("old", "older than 3.11"), ("absent", "make env PYTHON=")])
def test_a_python_that_does_not_do_is_named(tmp_path, python, words):
    given, log = fake_python(tmp_path, "(3, 9)")
    if python == "absent":
        (tmp_path / "python").unlink()
    result = make("env", *given)
    said = [line for line in (result.stdout + result.stderr).splitlines() if not line.startswith("make")]
    assert result.returncode != 0 and len(said) == 1 and words in said[0] and not log.exists()


def test_extras_are_those_of_the_requirements():
    project = (ROOT / "pyproject.toml").read_text()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    for name in ("requirements.txt", "requirements-eval.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith("#"):
                assert f'"{line}"' in project or f"'{line}'" in project, f"pyproject.toml lacks {line}"
                package = re.match(r"[\w-]+", line)[0].lower()
                assert package in pins | {"torch", "triton"}, f"constraints.txt lacks {package}"


# -----------------------------------------------------------------------------
# Numbers

@pytest.fixture
def committed(tmp_path):
    """Runs, figures and README as they are committed, without what a user has trained since."""
    archive = subprocess.run(["git", "archive", "HEAD", "runs", "assets", "README.md"], cwd=ROOT, check=True,
                             capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=tmp_path, input=archive, check=True)
    return tmp_path


def test_readme_and_results_json_are_what_the_runs_say(committed):
    readme = (committed / "README.md").read_text()
    command = [sys.executable, ROOT / "plot_results.py", "--out", "drawn"]
    subprocess.run(command, cwd=committed, check=True, capture_output=True)
    assert (committed / "drawn/results.json").read_bytes() == (committed / "assets/results.json").read_bytes()
    assert (committed / "README.md").read_text() == readme
    assert (committed / "drawn/fig_convergence.png").stat().st_size > 10_000


def test_committed_runs_name_no_machine(committed):
    for path in (committed / "runs").rglob("*.json*"):
        assert not re.search(r'"(/|\.\./)', path.read_text()), path
