"""The doctor: every part is a line, a missing one says what for and how to mend it, nothing makes it fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3_kernels import doctor
from dsv3_kernels.jit import cache, toolchain

ROOT = Path(__file__).parents[1]
PARTS = [check.name for check in doctor.CHECKS]

# Runs the doctor in a process in which the modules named in $BLOCKED cannot be imported.
BLOCKING = """
import os, runpy, sys
for name in os.environ["BLOCKED"].split():
    sys.modules[name] = None
sys.argv = ["doctor", *sys.argv[1:]]
runpy.run_module("dsv3_kernels.doctor", run_name="__main__")
"""


def run(tmp_path, *options, blocked="", **environment):
    paths = {"PYTHONPATH": str(ROOT), cache.ENVIRONMENT: str(tmp_path / "cache"), "BLOCKED": blocked}
    return subprocess.run(
        [sys.executable, "-c", BLOCKING, *options],
        env={**os.environ, **paths, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def findings(tmp_path, code=0, **options):
    done = run(tmp_path, "--json", **options)
    assert done.returncode == code, done.stderr
    report = json.loads(done.stdout)
    by_name = {finding["name"]: finding for finding in report["findings"]}
    assert list(by_name) == PARTS
    for finding in by_name.values():
        assert finding["status"] in ("ok", "missing", "broken")
        assert finding["found"]
        assert bool(finding["mend"]) == (finding["status"] != "ok"), finding
    return by_name, report["summary"]


def test_this_machine(tmp_path):
    found, summary = findings(tmp_path)
    for part in (
        "Python",
        "torch",
        "runtime",
        "emulator",
        "NVRTC",
        "nvJitLink",
        "compile",
        "cache",
        "nvdisasm",
    ):
        assert found[part]["status"] == "ok", found[part]
    assert "uncached" in found["compile"]["found"]
    assert summary[0] == "reference (CPU): yes"
    assert summary[1] == "emulator (CPU): yes"


def test_the_table_has_a_line_for_each_part_and_each_mend(tmp_path):
    done = run(tmp_path, COLUMNS="240")
    assert done.returncode == 0
    for part in PARTS:
        assert f" {part} " in done.stdout
    found, summary = findings(tmp_path)
    for finding in found.values():
        assert finding["status"] == "ok" or f"mend: {finding['mend']}" in done.stdout
    assert done.stdout.splitlines()[-len(summary) :] == summary


def test_a_bare_laptop_without_any_wheel_but_torch(tmp_path):
    found, summary = findings(
        tmp_path, blocked="dsv3_kernels._runtime dsv3_kernels._emulator cuda.bindings nvidia", PATH=""
    )
    for part in (
        "runtime",
        "emulator",
        "driver",
        "GPU",
        "NVRTC",
        "nvJitLink",
        "compile",
        "nvdisasm",
        "NVSHMEM",
    ):
        assert found[part]["status"] == "missing", found[part]
    assert "_runtime is not built" in found["runtime"]["found"]
    assert found["runtime"]["mend"].startswith("pip install -e .")
    assert found["NVRTC"]["mend"].startswith("pip install 'cuda-python")
    assert found["C++ compiler"]["status"] == "missing"
    assert summary[0] == "reference (CPU): yes"
    assert summary[1] == "emulator (CPU): no, for want of emulator, NVRTC, compile"


def test_without_torch_the_exit_code_says_so(tmp_path):
    found, summary = findings(tmp_path, code=1, blocked="torch")
    assert found["torch"]["status"] == "missing"
    assert found["torch"]["mend"] == "pip install 'torch>=2.9'"
    assert found["compile"]["status"] == "ok"
    assert summary[0] == "reference (CPU): no, for want of torch"


def test_a_cache_that_others_can_write_is_broken(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    found, _ = findings(tmp_path)
    assert found["cache"]["status"] == "broken"
    assert found["cache"]["mend"] == f"chmod 700 {tmp_path / 'cache'}"


@pytest.mark.parametrize(("capability", "status"), [("90", "ok"), ("80", "missing")])
def test_gpus(tmp_path, fake_driver, capability, status):
    found, summary = findings(tmp_path, LD_LIBRARY_PATH=str(fake_driver), FAKE_CUDA_CAPABILITY=capability)
    assert found["driver"]["found"] == "CUDA 13.0"
    assert found["GPU"]["status"] == status
    assert (
        f"1: Fake H100 (compute capability {capability[0]}.{capability[1]}, 132 SMs)" in found["GPU"]["found"]
    )
    assert summary[2] == ("one GPU: yes" if status == "ok" else "one GPU: no, for want of GPU")


def test_a_driver_that_fails_is_broken_and_quoted(tmp_path, fake_driver):
    found, _ = findings(tmp_path, LD_LIBRARY_PATH=str(fake_driver), FAKE_CUDA_FAIL="cuInit")
    assert found["driver"]["status"] == "broken"
    assert "cuInit: CUDA_ERROR_INVALID_VALUE" in found["driver"]["found"]


def test_nics(tmp_path, monkeypatch):
    check = next(check for check in doctor.CHECKS if check.name == "NIC")
    monkeypatch.setattr(doctor, "_INFINIBAND", tmp_path)
    assert check.run().status == "missing"
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    for name, text in (("link_layer", "InfiniBand"), ("rate", "400 Gb/sec (4X NDR)"), ("state", "1: DOWN")):
        (port / name).write_text(text + "\n")
    down = check.run()
    assert (down.status, down.found) == (
        "missing",
        "mlx5_0:1 InfiniBand 400 Gb/sec (4X NDR) 1: DOWN: no port is active",
    )
    (port / "state").write_text("4: ACTIVE\n")
    assert check.run().status == "ok"


def test_how_a_nic_reaches_the_gpu(tmp_path, monkeypatch):
    peer, keys = (next(c for c in doctor.CHECKS if c.name == name) for name in ("peer memory", "driver keys"))
    module, version, parameters = (tmp_path / name for name in ("nvidia_peermem", "version", "params"))
    monkeypatch.setattr(doctor, "_PEER_MODULES", (module,))
    monkeypatch.setattr(doctor, "_DRIVER_VERSION", version)
    monkeypatch.setattr(doctor, "_DRIVER_PARAMETERS", parameters)
    for check in (peer, keys):
        assert (check.run().status, check.run().found) == ("missing", "no NVIDIA kernel driver is loaded")
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07\n")
    monkeypatch.setattr(doctor.platform, "release", lambda: "5.4.0-100-generic")
    assert "neither nvidia_peermem nor dma-buf" in peer.run().found
    assert peer.run().mend == "modprobe nvidia_peermem"
    monkeypatch.setattr(doctor.platform, "release", lambda: "6.8.0-45-generic")
    assert peer.run().found == "dma-buf (Linux 6.8.0-45-generic, open kernel modules)"
    module.mkdir()
    assert peer.run().found == "kernel module nvidia_peermem"
    parameters.write_text('EnableStreamMemOPs: 0\nRegistryDwords: ""\n')
    assert "not set: NVreg_EnableStreamMemOPs=1, NVreg_RegistryDwords" in keys.run().found
    assert "options nvidia NVreg_EnableStreamMemOPs=1 NVreg_Reg" in keys.run().mend
    parameters.write_text('EnableStreamMemOPs: 1\nRegistryDwords: "PeerMappingOverride=1;"\n')
    assert keys.run().status == "ok"


def test_a_check_that_fails_in_an_unforeseen_way_is_a_line_too(monkeypatch):
    def trouble():
        raise ZeroDivisionError("unforeseen\n trouble " + "x" * 1000)

    finding = doctor.Check("part", "something", trouble, "do this").run()
    assert (finding.status, finding.mend) == ("broken", "do this")
    assert finding.found.startswith("ZeroDivisionError: unforeseen trouble xxx")
    assert len(finding.found) < 250 and "\n" not in finding.found


def test_clearing_names_the_folder(tmp_path, monkeypatch):
    path = tmp_path / "with a space"
    monkeypatch.setenv(cache.ENVIRONMENT, str(path))
    check = next(check for check in doctor.CHECKS if check.name == "cache")
    assert check.run().found == f"{path}: empty (made on first use)"
    cache.get_or_build(cache.key_of("a"), lambda: cache.Entry({}, b"x"))
    assert check.run().found.endswith(f"1 entries, 0.0 MiB, mode 0700; to clear it: rm -r '{path}'")


def test_every_mend_is_a_command_for_this_package():
    assert set(toolchain.MEND) == {
        *("cuda-python", "nvrtc", "nvjitlink", "nvdisasm", "nvshmem", "cudart", "cccl")
    }
    for mend in toolchain.MEND.values():
        assert mend.startswith("pip install ")


def test_without_rich_the_report_is_plain_lines(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    doctor.main([])
    out = capsys.readouterr().out
    assert "pip install rich" in out
    for finding in doctor.examine():
        assert f"{finding.name}: {finding.found.split()[0] if finding.found else ''}" in out


@pytest.mark.parametrize(
    "gpus, apart, status, found, mend",
    [
        (0, (), "missing", "no GPU is visible", "several"),
        (1, (), "missing", "1 GPU is visible", "several"),
        (4, (), "ok", "all 6 pairs of 4 GPUs", ""),
        (4, ((1, 2), (1, 3)), "missing", "cannot map each other's memory: 1-2, 1-3", "iommu=pt"),
    ],
)
def test_peer_access_names_the_pairs_that_lack_it(monkeypatch, gpus, apart, status, found, mend):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) not in apart)
    (check,) = (check for check in doctor.CHECKS if check.name == "peer access")
    finding = check.run()
    assert finding.status == status and found in finding.found and mend in finding.mend, finding


def test_a_cpu_build_of_torch_has_no_peer_access(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    (check,) = (check for check in doctor.CHECKS if check.name == "peer access")
    assert "CPU build" in check.run().found
