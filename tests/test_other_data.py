"""A run goes on with other data when --new-settings says so, and only then."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import fails
from tiny_runs import SHORT, TOKENIZER, fit, moving

from walt.atomic import read_json, write_json
from walt.checkpoint import load_description
from walt.data.clips import ClipStore
from walt.data.video import write_mp4
from walt.errors import WaltError
from walt.pretrained import load_tokenizer
from walt.train import denoiser

pytest.importorskip("av", reason="PyAV is not installed")

MORE = ("training.steps=3",)


@pytest.fixture
def data(films, tmp_path):
    """A copy of the films, to change."""
    return shutil.copytree(films, tmp_path / "data")


def content(out, stage: str) -> str:
    kind = "tokenizer" if stage == "tokenizer" else "transformer"
    return load_description(out / stage, kind)[1]["data"]["content"]


def change(data, fps: float = 8) -> None:
    write_mp4(data / "up/0.mp4", moving(7), fps=fps)
    write_mp4(data / "up/2.mp4", moving(8), fps=fps)


def test_a_tokenizer(data, tmp_path):
    out = tmp_path / "run"
    fit("tokenizer", data, out)
    change(data)
    with pytest.raises(WaltError, match=r"give the same data, another --out, or --new-settings to go on with this$"):
        fit("tokenizer", data, out, *MORE)
    assert fit("tokenizer", data, out, *MORE, new_settings=True).step == 3
    store = ClipStore.open(out / "data-16x16")
    assert content(out, "tokenizer") == store.fingerprint
    assert "up/2.mp4" in read_json(out / "tokenizer.files.json")["file"]
    assert fit("tokenizer", data, out, *MORE).step == 3  # what it holds is now the run's data


def test_a_base_model(data, tmp_path, monkeypatch):
    """Latents are made anew, and not before the refusal."""
    out = tmp_path / "run"
    encoded: list[str] = []
    encode = denoiser.encode_latents
    monkeypatch.setattr(
        denoiser,
        "encode_latents",
        lambda store, *a, **k: encoded.append(store.fingerprint) or encode(store, *a, **k),
    )
    fit("tokenizer", data, out)
    text = ("data.text=bytes", "transformer.frame_condition=true")
    fit("base", data, out, *text)
    change(data, fps=16)
    lines = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    lines[0]["caption"] = "other words"
    (data / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        WaltError, match=r"1 file more: up/2.mp4; 1 file changed: up/0.mp4; 1 caption changed.*; give the"
    ):
        fit("base", data, out, *text, *MORE)
    assert len(encoded) == 1
    assert fit("base", data, out, *text, *MORE, new_settings=True).step == 3
    store = ClipStore.open(out / "data-16x16")
    assert encoded[1:] == [store.fingerprint]
    assert content(out, "transformer") == store.fingerprint
    assert load_description(out / "transformer", "transformer")[1]["clip"]["fps"] == 8  # of most films
    assert read_json(out / "transformer.files.json")["caption"]["up/0.mp4"] == "other words"
    assert fit("base", data, out, *text, *MORE).step == 3


def test_at_another_rate(data, tmp_path):
    out = tmp_path / "run"
    fit("tokenizer", data, out)
    fit("base", data, out)
    with pytest.raises(WaltError, match="frames a second here"):
        fit("base", data, out, "data.fps=4", *MORE)
    assert fit("base", data, out, "data.fps=4", *MORE, new_settings=True).step == 3
    assert load_description(out / "transformer", "transformer")[1]["clip"]["fps"] == 4


def test_what_does_not_fit_the_model_is_refused(data, tmp_path):
    out = tmp_path / "run"
    fit("tokenizer", data, out)
    fit("base", data, out)
    before = (out / "transformer/model.safetensors").read_bytes()
    (data / "up").rename(data / "sideways")
    with pytest.raises(WaltError, match=r"belongs to a run with other settings \(classes is "):
        fit("base", data, out, *MORE, new_settings=True)
    (data / "sideways").rename(data / "up")
    with pytest.raises(WaltError, match=r"config.latent_size"):
        fit("base", data, out, "data.frames=9", *MORE, new_settings=True)
    assert (out / "transformer/model.safetensors").read_bytes() == before


def test_a_finished_run_is_left_as_it_is(data, tmp_path):
    """Without more steps nothing is trained on the other data: it is refused before latents are made of it."""
    out = tmp_path / "run"
    fit("tokenizer", data, out)
    files = (out / "tokenizer.files.json").read_bytes()
    settings = (out / "tokenizer.yaml").read_bytes()
    change(data)
    with pytest.raises(WaltError, match=r"run/tokenizer has its 2 steps; give more --steps to go on with other data"):
        fit("tokenizer", data, out, "training.lr=0.5", new_settings=True)
    assert (out / "tokenizer.files.json").read_bytes() == files
    assert (out / "tokenizer.yaml").read_bytes() == settings
    with pytest.raises(WaltError, match=r"1 file more: up/2.mp4; 1 file changed"):
        fit("tokenizer", data, out)


def test_killed_before_the_first_checkpoint_on_other_data(data, tmp_path, monkeypatch):
    """The list of files is newer than the checkpoint."""
    out = tmp_path / "run"
    fit("tokenizer", data, out)
    change(data)
    with monkeypatch.context() as patch:
        patch.setattr("walt.train.trainer.Trainer.run", lambda self, **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit("tokenizer", data, out, *MORE, new_settings=True)
    with pytest.raises(WaltError, match="holds, or by an older walt; give the same data"):
        fit("tokenizer", data, out, *MORE)
    assert fit("tokenizer", data, out, *MORE, new_settings=True).step == 3


def test_of_an_older_walt(data, tmp_path, capsys):
    """Which knew its data by another hash, had no list of files, and prepared folders of version 1."""
    out = tmp_path / "run"
    fit("tokenizer", data, out)
    document = read_json(out / "tokenizer/config.json")
    del document["data"]["fps"]
    document["data"]["content"] = "0" * 64
    write_json(out / "tokenizer/config.json", document)
    (out / "tokenizer.files.json").unlink()
    index = out / "data-16x16/index.json"
    write_json(index, {**read_json(index), "version": 1})
    command = ["train", "tokenizer", "--data", data, "--out", out]
    command += [f"--{text}" for text in (*TOKENIZER, *SHORT, *MORE)]
    line = fails(capsys, *command)
    assert line.endswith(
        "index.json has version 1; this walt reads version 3: delete that folder, or prepare into another one"
    )
    shutil.rmtree(out / "data-16x16")
    with pytest.raises(WaltError, match=r"was trained on other data than .* holds, or by an older walt; give the same"):
        fit("tokenizer", data, out, *MORE)
    assert fit("tokenizer", data, out, *MORE, new_settings=True).step == 3


def test_prepared_in_another_way(data, tmp_path):
    out = tmp_path / "run"
    fit("tokenizer", data, out)
    with pytest.raises(WaltError, match=r"shots off; delete that folder, or prepare into another one"):
        fit("tokenizer", data, out, "data.shots=false", *MORE, new_settings=True)
    shutil.rmtree(out / "data-16x16")
    assert fit("tokenizer", data, out, "data.shots=false", *MORE, new_settings=True).step == 3
    assert bool((load_tokenizer(out / "tokenizer").latent_std != 1).all())
