import os
import shutil
import subprocess
from pathlib import Path

# Before any test loads torch: OpenMP threads that spin while they wait slow a busy machine down tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run the tests marked long")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        return
    skip = pytest.mark.skip(reason="needs --long")
    for item in items:
        if "long" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def seed():
    """Of torch's own generator, another for each test, printed."""
    import torch

    value = int(torch.randint(1 << 30, ()))
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def trained_tiny():
    """(model, corpus): the tiny preset after 60 steps in BF16, for every test that needs a trained one."""
    from dataclasses import replace

    import torch

    from dsv3_kernels.model import PRESETS
    from dsv3_kernels.train.cli import TRAINABLE
    from dsv3_kernels.train.data.corpus import load_corpus
    from dsv3_kernels.train.trainer import Trainer

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other are slower on a busy machine
    config = replace(TRAINABLE["tiny"], steps=60)
    corpus = load_corpus(None, config.seq_len + 1 + PRESETS["tiny"].num_nextn_predict_layers)
    trainer = Trainer(PRESETS["tiny"], config, "bf16", corpus)
    for _ in range(config.steps):
        trainer.train_step()
    torch.set_num_threads(threads)
    return trainer.model.eval(), corpus


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of small files to train on."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"The {i}th file counts: " + ", ".join(map(str, range(i, i + 80))))
    return folder


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory):
    """The folder of a stand-in for libcuda, which records the calls."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("driver")
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden"]
    command += [str(Path(__file__).with_name("fake_libcuda.cpp")), "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, check=True)
    return folder
