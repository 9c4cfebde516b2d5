"""What the tests of conversions share."""

import pytest
from teachers import RUN, TEACHERS, layers_of, save_teacher, teacher_of

from helpers import make_text


@pytest.fixture(scope="module", params=TEACHERS)
def taught(request):
    """(teacher, its layers with moments)."""
    model = teacher_of(request.param)
    return model, layers_of(model)


@pytest.fixture
def folder(tmp_path):
    """A folder with a text and a teacher of bytes."""
    make_text(tmp_path)
    save_teacher(tmp_path / "run", **RUN)
    return tmp_path
