"""Fixtures that several test files share. With -n auto there is one process per core, so each uses one thread."""
import os

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import NARROW, random_checkpoint

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"         # for processes that tests start


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; python -m pytest -m gpu runs these alone")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """{"sd15" or "sd21": path of a narrow random checkpoint with the real names}. Tests must not change the files."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {name: folder / f"{name}.safetensors" for name in NARROW}
    for name, path in paths.items():
        save_file(random_checkpoint(name), path, metadata={"format": "pt"})
    return paths
