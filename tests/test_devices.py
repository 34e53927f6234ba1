"""Devices that are not there: one line that names the option and what there is, before any file is read or written."""

from __future__ import annotations

import socket

import pytest
import torch
from command_line import fails

from walt.cli import COMMANDS as ALL
from walt.cli import main
from walt.commands import model
from walt.distributed import process_group
from walt.errors import WaltError

# Every command with --device, and what else it must be given.
COMMANDS = {
    "train": ("tokenizer", "--data", "clips", "--out", "run"),
    "sample": ("--from", "run"),
    "extend": ("--from", "run", "--video", "film.mp4"),
    "upscale": ("--from", "run", "--video", "film.mp4"),
    "encode": ("--from", "run", "--video", "film.mp4", "--out", "a.safetensors"),
    "decode": ("--from", "run", "--latents", "a.safetensors", "--out", "a.mp4"),
    "evaluate": ("--from", "run", "--data", "clips"),
}


def test_the_commands_with_devices(capsys):
    def options(name: str) -> str:
        assert main([name, "--help"]) == 0
        return capsys.readouterr().out

    assert {name for name in ALL if "--device" in options(name)} == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_every_command(command, capsys):
    line = fails(capsys, command, *COMMANDS[command], "--device", "cuda")
    assert "--device cuda: " in line
    assert line.endswith("; there is cpu")


NO_PLACE = "expected cpu, cuda, cuda:N, mps or xpu"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:99", ""),
        ("cuda:-1", "Invalid device string: 'cuda:-1'"),
        ("mps", ""),
        ("xpu", ""),
        ("hpu", NO_PLACE),
        ("tpu", NO_PLACE),
        ("meta", NO_PLACE),
        ("mkldnn", NO_PLACE),
        ("opengl:0", NO_PLACE),
        ("privateuseone", NO_PLACE),
        ("0", NO_PLACE),
        ("CPU", NO_PLACE),
        ("", NO_PLACE),
        (" ", NO_PLACE),
    ],
)
def test_every_device(device, message, tmp_path, capsys):
    line = fails(capsys, "sample", "--from", tmp_path, "--device", device)
    assert f"--device {device if device.strip() else repr(device)}: {message}" in line
    assert "; there is cpu" in line
    assert len(line) < 400


def test_an_accelerator_of_another_kind(tmp_path, capsys, monkeypatch):
    """What PyTorch says is there is asked for."""
    monkeypatch.setattr(model, "devices", lambda: ["cpu", "hpu:0"])
    line = fails(capsys, "sample", "--from", tmp_path, "--device", "hpu:0")
    assert NO_PLACE not in line
    assert line.endswith("; there is cpu, hpu:0")


def environment(monkeypatch, **values: object) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port, **values}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_torchrun_without_gpus(monkeypatch):
    environment(monkeypatch, LOCAL_RANK=3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with process_group() as device:
        assert device == torch.device("cpu")


@pytest.mark.parametrize("processes", [1, 2])
def test_the_device_that_is_asked_for(monkeypatch, processes):
    """The CPU although there are GPUs; of several processes each takes its own GPU, or they are refused."""
    environment(monkeypatch, WORLD_SIZE=processes, LOCAL_RANK=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    joined = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: joined.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with process_group(torch.device("cpu")) as device:
        assert device == torch.device("cpu")
    with process_group(torch.device("cuda", 0)) as device:
        assert device == torch.device("cuda", processes - 1)
    assert joined == (["gloo", "nccl"] if processes > 1 else [])
    if processes > 1:
        with pytest.raises(WaltError, match="--device mps: processes of torchrun take cpu or cuda"):
            process_group(torch.device("mps")).__enter__()


def test_more_processes_than_gpus(monkeypatch):
    environment(monkeypatch, LOCAL_RANK=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(WaltError, match=r"--nproc-per-node: process 3 of this machine has no GPU; there are 2"):
        process_group().__enter__()


def test_ranks_without_torchrun(monkeypatch):
    environment(monkeypatch, WORLD_SIZE=2)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(WaltError, match=r"WORLD_SIZE=2: .*MASTER_ADDR.*; start the processes with torchrun"):
        process_group().__enter__()
