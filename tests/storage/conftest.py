"""Saved checkpoints."""

import pytest

from tests.helpers.untrusted import make_checkpoints


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """The folders of saved models with a record, by family; not to be written to."""
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))
