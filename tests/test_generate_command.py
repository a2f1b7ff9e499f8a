"""python -m dsv3_kernels.generate, within this process."""

import pytest
import torch
from model_helpers import SMALL, model_of

from dsv3_kernels.generate import main
from dsv3_kernels.model import save_pretrained
from dsv3_kernels.train.cli import main as train

FAST = [
    "--batch-size",
    "1",
    "--seq-len",
    "24",
    "--validation-windows",
    "2",
    "--sample-bytes",
    "0",
    "--steps",
    "1",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run, and the tiny vocabulary of SMALL widened to bytes in the released layout."""
    import dataclasses

    folder = tmp_path_factory.mktemp("models")
    (folder / "text").write_text("to be or not to be " * 400)
    assert (
        train([*FAST, "--steps", "1", "--data", str(folder / "text"), "--out", str(folder / "runs" / "one")])
        == 0
    )
    model = model_of(dataclasses.replace(SMALL, vocab_size=256, max_position_embeddings=64))
    save_pretrained(model.to(torch.bfloat16), folder / "released")
    save_pretrained(model_of(dataclasses.replace(SMALL, num_nextn_predict_layers=0)), folder / "no-tokenizer")
    return folder


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("name", ["runs/one", "released"])
@pytest.mark.parametrize("options", [[], ["--speculative"], ["--precision", "bf16", "--temperature", "0"]])
def test_text(folders, capsys, name, options):
    code, out, err = run(capsys, folders / name, "--prompt", "to ü", "--tokens", 12, *options)
    assert code == 0, err
    assert out.startswith("to ü")
    assert len(out.encode()) > 12
    assert "12 tokens, " in err and "tokens/s" in err
    assert ("drafts accepted" in err) == ("--speculative" in options)
    assert run(capsys, folders / name, "--prompt", "to ü", "--tokens", 12, *options)[1] == out


def test_the_newest_run_is_the_default(folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    code, _, err = run(capsys, "--tokens", 30)
    assert code == 0
    assert "runs/one: 30 tokens" in err
    assert "trained on 24 positions" in err


def test_bad_command_lines(folders, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    one = folders / "runs" / "one"
    for arguments, words in (
        ([], "runs/ holds no run. Mend: python -m dsv3_kernels.train"),
        ([tmp_path / "nothing"], "cannot read"),
        ([one, "--prompt", ""], "the prompt is empty"),
        ([one, "--tokens", 0], "--tokens is 0, expected at least 1"),
        ([one, "--tokens", 5000], "expected at most max_position_embeddings = 2048"),
        ([one, "--temperature", -1], "temperature is -1.0"),
        ([one, "--top-p", 2], "top_p is 2.0"),
        ([folders / "no-tokenizer"], "tokenizer.json is missing, expected for a vocabulary of 40"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 1
        assert words in err
        assert "Traceback" not in err
    with pytest.raises(SystemExit):
        main(["--precision", "fp4"])
