import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from autotune import Device, describe_device, installed_versions
from autotune import device as device_module


def test_a_cpu_is_its_model_instructions_and_threads():
    device = describe_device("cpu")
    assert (device.kind, device.units) == ("cpu", torch.get_num_threads())
    assert device.name
    assert device.capability
    assert describe_device(torch.device("cpu")) == device


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_every_system_has_a_cpu_model(platform, monkeypatch):
    monkeypatch.setattr(device_module.sys, "platform", platform)
    monkeypatch.setattr(device_module.Path, "read_text", lambda *_, **__: "flags : x\nmodel name\t: Fake 3000\n")
    monkeypatch.setattr(device_module.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="Fake 3000\n"))
    monkeypatch.setattr(device_module.platform, "processor", lambda: "Fake 3000")
    assert describe_device("cpu").name == "Fake 3000"


def fake_gpu(monkeypatch, hip):
    properties = SimpleNamespace(name="Fake GPU", major=9, minor=0, multi_processor_count=132, gcnArchName="gfx942")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.version, "hip", hip)


def test_a_cuda_device(monkeypatch):
    fake_gpu(monkeypatch, hip=None)
    assert describe_device("cuda:0") == Device("cuda", "Fake GPU", "9.0", 132)


def test_a_rocm_device(monkeypatch):
    fake_gpu(monkeypatch, hip="6.4")
    assert describe_device("cuda") == Device("rocm", "Fake GPU", "gfx942", 132)


def test_a_gpu_that_is_not_there_is_a_value_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: expected one of this machine"):
        describe_device("cuda")


def test_versions_without_triton(monkeypatch):
    assert installed_versions().torch == str(torch.__version__)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert installed_versions().triton is None


def test_import_loads_no_torch_no_rich_and_no_neighbour():
    code = "import sys, autotune; print({'torch', 'triton', 'rich', 'typer', 'swat_flex', 'perf'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
