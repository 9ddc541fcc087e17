"""Fixtures that several files of tests share."""
import pytest
from safetensors.torch import save_file

from tests.checkpoints import NARROW, random_checkpoint


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """{"sd15" or "sd21": path of a narrow random checkpoint with the real names}. To be read only."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {name: folder / f"{name}.safetensors" for name in NARROW}
    for name, path in paths.items():
        save_file(random_checkpoint(name), path, metadata={"format": "pt"})
    return paths
