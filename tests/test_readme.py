"""The README's commands run as written, the Makefile runs the same, and its table is what the committed runs say."""

import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import eval_dba
import plot_results
from train_dba import main, parse_args

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [" ".join(line.split("#")[0].split()) for line in LINES]
TRAINING = [c for c in COMMANDS if c.startswith("python3 train_dba.py") and "--mode sample" not in c]


@pytest.fixture
def tiny_data(tmp_path, monkeypatch):
    """A working folder with the token files that the README names, of a few thousand word tokens each."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    words = [f"w{i}" for i in range(48)] + ["<eos>", "<unk>"]
    for name in ("wikitext2", "fineweb_100m"):
        (data / f"{name}.vocab.json").write_text(json.dumps(words))
        for part, n in (("", 5000), (".val", 2100)):
            path = data / f"{name}{part}.npy"
            np.save(path, np.random.default_rng(n).integers(0, 50, n).astype(np.uint16))
            info = dict(dataset=name, revision=None, tokenizer="word", vocab_size=50, eot=48, tokens=n, documents=1,
                        sha256=hashlib.sha256(path.read_bytes()).hexdigest(), text_bytes=5 * n,
                        val=None if part else f"{name}.val.npy", vocab=f"{name}.vocab.json")
            (data / f"{name}{part}.json").write_text(json.dumps(info))


def test_readme_has_every_experiment():
    assert len(TRAINING) == 9
    assert len({parse_args(shlex.split(c)[2:])["out_dir"] for c in TRAINING}) == 9


@pytest.mark.parametrize("command", TRAINING, ids=lambda c: re.search(r"runs/(\w+)", c)[1])
def test_training_command(command, tiny_data, capsys):
    argv = shlex.split(command)[2:]
    given = parse_args(argv)
    if "steps" in given:
        argv[argv.index("--steps") + 1] = "2"
    else:
        argv += ["--steps", "2"]
    assert main(argv) == 0
    run = Path(given["out_dir"])
    resolved = json.loads((run / "resolved_config.json").read_text())
    assert resolved == {**resolved, **given, "steps": 2}
    assert {p.name for p in run.iterdir()} == {"command.txt", "resolved_config.json", "env.json", "train.jsonl",
                                               "last.pt", "best.pt"}
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert [line["type"] for line in lines] == ["meta", "train", "train", "eval", "done"]
    assert lines[0]["config"] == resolved and lines[-2]["val_tokens"] == 2099


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--mode sample" in c])
def test_sampling_command(command, tiny_data, capsys):
    ckpt = Path(parse_args(shlex.split(command)[2:])["ckpt"])
    tiny = ("--size tiny --d-model 16 --d-ff 16 --layers 1 --n-head 2 --steps 2 --attn-mode decoupled --sem-dim 4 "
            "--geo-dim 8 --dtype float32")
    assert main(f"--data data/wikitext2.npy --out-dir {ckpt.parent} {tiny}".split()) == 0
    before = {path: path.read_bytes() for path in ckpt.parent.iterdir()}
    capsys.readouterr()
    assert main(shlex.split(command)[2:]) == 0
    assert len(capsys.readouterr().out.split()) > 50
    assert before == {path: path.read_bytes() for path in ckpt.parent.iterdir()}


def test_makefile_runs_the_same_commands():
    named = re.findall(r"`make (\w+)`", README[:README.index("## Sample")])
    targets = [t for t in dict.fromkeys(named) if t not in ("help", "fineweb")]
    assert len(targets) == 9
    printed = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = printed.stdout.replace("\\\n", " ").splitlines()
    made = [parse_args(shlex.split(line)[2:]) for line in lines if "train_dba.py" in line]
    given = [parse_args(shlex.split(c)[2:]) for c in TRAINING]
    assert {m["out_dir"]: m for m in made} == {g["out_dir"]: g for g in given}


def test_evaluation_commands_parse():
    """Those of the README, and those that make runs."""
    made = subprocess.run(["make", "-n", "evaluations", "llama"], cwd=ROOT, capture_output=True, text=True, check=True)
    text = "\n".join([*COMMANDS, made.stdout.replace("\\\n", " ")])
    argvs = [shlex.split(flags) for flags in re.findall(r"eval_dba\.py ([^&|;\n]+)", text)]
    assert len({argv[0] for argv in argvs}) == 8
    for argv in argvs:
        eval_dba.make_parser().parse_args(argv)


def test_every_make_target_named_exists():
    for target in set(re.findall(r"(?:^|`)make ([a-z0-9_]+)", README, re.M)):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def committed(tmp_path):
    """Runs, figures and README as they are committed, without what a user has trained since."""
    archive = subprocess.run(["git", "archive", "HEAD", "runs", "assets", "README.md"], cwd=ROOT, check=True,
                             capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=tmp_path, input=archive, check=True)
    return tmp_path


def test_tables_and_results_json_are_what_the_runs_say(committed):
    command = [sys.executable, ROOT / "plot_results.py", "--out", "drawn", "--readme", ""]
    subprocess.run(command, cwd=committed, check=True, capture_output=True)
    results = (committed / "drawn/results.json").read_bytes()
    assert results == (committed / "assets/results.json").read_bytes()
    readme = (committed / "README.md").read_text()
    assert plot_results.write_sections(readme, json.loads(results)) == readme
    assert (committed / "drawn/fig_convergence.png").stat().st_size > 10_000


def test_committed_runs_name_no_machine(committed):
    for path in (committed / "runs").rglob("*.json*"):
        assert not re.search(r'"(/|\.\./)', path.read_text()), path
