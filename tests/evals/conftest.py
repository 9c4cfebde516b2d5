"""Small trained checkpoints that the tests of evals/ measure."""

import shutil

import pytest
from trained import MODES, TRAIN

from helpers import assert_done, call, make_text


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with text.txt and a trained run of each mode, which no test changes."""
    folder = tmp_path_factory.mktemp("runs")
    make_text(folder, count=5000)
    for mode, flags in MODES.items():
        assert_done(call(f"{TRAIN} {flags} --out-dir {mode}", folder))
    return folder


@pytest.fixture
def folder(runs, tmp_path):
    """The same, to change."""
    shutil.copytree(runs, tmp_path / "work")
    return tmp_path / "work"
