"""Published files are rebuilt here from timm's weights, bad files by hand."""

import argparse
import bz2
import datetime
import decimal
import enum
import gzip
import io
import lzma
import os
import pathlib
import pickle
import random
import sys
import tarfile
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from omegaconf import OmegaConf
from torch import nn

from ghostnet.errors import UserError
from ghostnet.models.ghostnet import GhostNet
from ghostnet.models.weights import fit, load_weights, read_file, read_weights


def create(name, **kwargs):
    """Build timm's model with BatchNorm statistics as after some training."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            module.num_batches_tracked.fill_(9)
    return model


@pytest.fixture(scope="module")
def theirs():
    return create("ghostnet_050")


@pytest.fixture(scope="module")
def published(theirs):
    return theirs.state_dict()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


def reference_file(weights, **changes):
    """Build what the reference's training script writes as checkpoint-N.pth.tar."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "arch": "ghostnet",
        "state_dict": weights,
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.4, model="ghostnet", npu=None, mean=(0.1, 0.2), resume=""),
        "amp": {"loss_scaler0": {"loss_scale": 128.0, "unskipped": 7}},
        "version": 2,
        "metric": 73.1,
        **changes,
    }


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    torch.testing.assert_close(actual, dict(expected), rtol=0, atol=0)


def complaint(call, *arguments):
    """Message of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


class Malicious:
    """Pickles as a call of os.system."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def tar_of(content):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"), io.BytesIO(content))
    return stream.getvalue()


# Files that are read


def test_a_model_of_another_class_takes_its_own_weights_and_no_others():
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert fit(model, other.state_dict(), "own.pt") == []
    assert torch.equal(model.weight, other.weight)
    with pytest.raises(UserError, match=r"own\.pt does not fit Linear: 1 missing \(bias\); 1 unexpected \(extra\)"):
        fit(model, {"weight": other.weight, "extra": other.bias}, "own.pt")


def test_an_official_state_dict_gives_the_logits_of_timm(theirs, published, path):
    torch.save(published, path)
    model = GhostNet(width=0.5).eval()
    assert load_weights(model, str(path)) == []
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)
    assert_same(model.state_dict(), published)


def test_a_file_of_torch_before_1_6_is_read(published, path):
    torch.save(published, path, _use_new_zipfile_serialization=False)
    assert_same(read_weights(path), published)


def test_a_file_of_the_reference_is_read_with_its_namespace_and_prefix(published, path):
    torch.save(reference_file(OrderedDict((f"module.{name}", value) for name, value in published.items())), path)
    assert_same(read_weights(path), published)
    assert read_file(path)["args"].model == "ghostnet"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "metric", [np.float64(73.129), np.float32(73.5), np.float16(73.5), np.int64(-73), np.int32(73), np.bool_(True)]
)
def test_a_numpy_metric_is_read_as_a_number(metric, legacy, path):
    torch.save(reference_file({}, metric=metric), path, _use_new_zipfile_serialization=not legacy)
    found = read_file(path)["metric"]
    assert found == metric
    assert type(found) is type(metric.item())


def test_a_numpy_metric_of_numpy_1_is_read(path):
    torch.save({"metric": np.float64(73.129)}, path)
    rewrite_pickle(path, lambda data: data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert read_file(path) == {"metric": 73.129}


def test_averaged_weights_of_the_reference_come_first(published, path):
    torch.save(reference_file({"a": torch.zeros(1)}, state_dict_ema=published), path)
    assert_same(read_weights(path), published)


@pytest.mark.parametrize("averaged", [True, False])
def test_our_checkpoint_gives_its_averaged_weights_where_it_has_them(averaged, published, path):
    raw = {name: torch.zeros_like(value) for name, value in published.items()}
    torch.save({"format": "ghostnet-torch", "model": raw, "ema": published if averaged else None, "step": 3}, path)
    assert_same(read_weights(path), published if averaged else raw)


def prefixed(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda w: prefixed(w, "_orig_mod."),
        lambda w: prefixed(w, "module._orig_mod."),
        lambda w: prefixed(w, "module.module."),
        lambda w: {
            name.replace("blocks.", "blocks.module.").replace("conv_stem", "conv_stem._orig_mod"): w[name] for name in w
        },
        lambda w: {"n_averaged": torch.tensor(9), **prefixed(w, "module.")},
        lambda w: {"state_dict": prefixed(w, "net."), "pytorch-lightning_version": "2.4.0"},
        lambda w: {"state_dict": prefixed(w, "model.backbone._orig_mod.")},
        lambda w: {"state_dict": {"criterion.weight": torch.ones(1000), **prefixed(w, "model.")}},
        lambda w: {name: value for name, value in w.items() if "num_batches" not in name},
        lambda w: defaultdict(list, w),
        *(lambda w, key=key: {key: w, "epoch": 3} for key in ("params", "model_state_dict", "net", "model_ema")),
        lambda w: {"params_ema": w, "params": {"a": torch.zeros(1)}},
        lambda w: {"ema": {"module": w}},
    ],
)
def test_weights_as_others_wrap_and_name_them_are_loaded(change, published, path):
    torch.save(change(published), path)
    model = GhostNet(width=0.5)
    load_weights(model, path)
    loaded = model.state_dict()
    assert loaded.keys() == published.keys()
    assert all(torch.equal(loaded[name], published[name]) for name in published if "num_batches" not in name)


def test_a_model_whose_own_names_look_like_wrappers_takes_its_own_weights():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    model = Mine()
    for names in ("module.", "net.module.", ""):
        weights = {names + name: torch.full_like(value, 7) for name, value in model.module.state_dict().items()}
        assert fit(model, weights, "x.pt") == []
        assert (model.module.weight == 7).all()


def test_of_several_weights_it_is_said_which_were_taken(published, path):
    zeros = {name: torch.zeros_like(value) for name, value in published.items()}
    torch.save({"model": zeros, "model_ema": {"n_averaged": torch.tensor(3), **prefixed(published, "module.")}}, path)
    model = GhostNet(width=0.5)
    assert load_weights(model, path) == [f"{path}: weights of model_ema, which are averaged; not taken: model"]
    assert_same(model.state_dict(), published)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_and_change_nothing(number, published, path):
    bad = published | {"bn1.weight": published["bn1.weight"].clone().fill_(number)}
    torch.save(bad, path)
    model = GhostNet(width=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert f"{path}: bn1.weight holds NaN or infinite numbers" in complaint(load_weights, model, path)
    assert_same(model.state_dict(), before)


BESIDE = {
    "pathlib": {"out": pathlib.PurePosixPath("/a"), "here": pathlib.Path("b"), "there": pathlib.PureWindowsPath("c:/")},
    "datetime": [datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), datetime.date(2024, 1, 2), datetime.timedelta(3)],
    "omegaconf": OmegaConf.create({"a": [1, 2.5, {"b": "x"}], "c": None, "d": True, "e": "${c}"}),
    "structured omegaconf": OmegaConf.create({"a": {"b": [1]}}, flags={"readonly": True}),
    "argparse": argparse.Namespace(path=pathlib.Path("a"), when=datetime.date(2024, 1, 2)),
    "collections": [defaultdict(list, a=[1]), Counter("aab"), deque([1, 2]), OrderedDict(a=1)],
    "default of a dict": defaultdict(dict, {1: {2: 3}}),
    "numpy": {
        "matrix": np.eye(3),
        "names": np.array(["a", "b"]),
        "scalar": np.float32(1),
        "order": np.zeros((2, 3), order="F"),
    },
    "plain": [
        {1, 2},
        frozenset([3]),
        slice(1, 2),
        decimal.Decimal("1.5"),
        types.SimpleNamespace(a=1),
        1 + 2j,
        range(3),
    ],
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", BESIDE)
def test_harmless_things_beside_the_weights_are_passed_over(name, legacy, published, path):
    torch.save(
        {"state_dict": published, "hyper_parameters": BESIDE[name]}, path, _use_new_zipfile_serialization=not legacy
    )
    assert_same(read_weights(path), published)


def test_safetensors_under_the_name_of_a_pth_are_read(published, tmp_path):
    path = tmp_path / "foo.pth"
    safetensors.torch.save_file(published, path)
    read = read_weights(path)
    assert_same({name: read[name] for name in published}, published)
    assert read.keys() == published.keys()


def test_a_torch_file_under_the_name_of_safetensors_is_read(published, tmp_path):
    path = tmp_path / "foo.safetensors"
    torch.save(published, path)
    assert_same(read_weights(path), published)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(dtype, published, path):
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in published.items()}
    torch.save(cast, path)
    assert_same(read_weights(path), {k: v.float() if v.is_floating_point() else v for k, v in cast.items()})


def test_a_file_saved_on_an_npu_is_read_without_one(published, path, monkeypatch):
    """torch_npu pickles a tensor as a call of its own function: what torch writes, then the card's layout."""
    names = ["torch_npu", "torch_npu.utils", "torch_npu.utils.storage", "torch_npu.npu", "torch_npu.npu._format"]
    modules = {name: types.ModuleType(name) for name in names}
    layouts = enum.IntEnum("Format", {"ND": 2}, module="torch_npu.npu._format")
    modules["torch_npu.npu._format"].Format = layouts

    def _rebuild_npu_tensor():
        raise AssertionError("pickled by name only")

    _rebuild_npu_tensor.__module__ = "torch_npu.utils.storage"
    _rebuild_npu_tensor.__qualname__ = "_rebuild_npu_tensor"
    modules["torch_npu.utils.storage"]._rebuild_npu_tensor = _rebuild_npu_tensor
    reduce = torch.Tensor.__reduce_ex__
    tensors = {"stem": published["conv_stem.weight"], "transposed": torch.arange(6.0).view(2, 3).t()}
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(
            torch.Tensor,
            "__reduce_ex__",
            lambda tensor, protocol: (_rebuild_npu_tensor, (*reduce(tensor, protocol)[1], layouts.ND)),
        )
        patch.setattr(torch.serialization, "location_tag", lambda storage: "npu:0")
        torch.save(tensors, path)
    assert_same(read_weights(path), tensors)


def rewrite_pickle(path, change):
    """Change the pickle inside a file of torch.save."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


# Files that are refused


@pytest.mark.parametrize("write", [torch.save, pickle.dump], ids=["torch", "bare"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_that_would_run_a_command_is_refused_and_runs_nothing(write, protocol, path, tmp_path):
    target = tmp_path / "was_run"
    content = reference_file({"a": torch.zeros(1)}, args=Malicious(target))
    with path.open("wb") as file:
        write(content, file, pickle_protocol=protocol) if write is torch.save else write(content, file, protocol)
    message = complaint(read_weights, path)
    assert str(path) in message
    assert "weights_only" not in message
    assert not target.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_the_refusal_names_what_would_have_run(legacy, path, tmp_path):
    target = tmp_path / "was_run"
    torch.save({"state_dict": {}, "args": Malicious(target)}, path, _use_new_zipfile_serialization=not legacy)
    message = complaint(read_file, path)
    assert f"{path} was refused, and nothing in it was run: it asks for {os.system.__module__}.system" in message
    assert "save model.state_dict() instead" in message
    assert not target.exists()


def test_a_call_hidden_behind_an_allowed_name_is_refused(path, tmp_path):
    target = tmp_path / "was_run"
    torch.save({"args": argparse.Namespace(nested=[Malicious(target)])}, path)
    assert "was refused" in complaint(read_file, path)
    assert not target.exists()


def test_reading_leaves_nothing_allowed_behind(path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"args": argparse.Namespace()}, path)
    read_file(path)
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_whole_pickled_model_is_refused_with_the_way_out(theirs, path):
    torch.save(theirs, path)
    assert "save model.state_dict() instead" in complaint(read_weights, path)


def test_a_missing_file_is_named(path):
    assert complaint(read_file, path) == f"{path} does not exist: give the path of a checkpoint"


def test_a_folder_is_named(tmp_path):
    assert complaint(read_file, tmp_path) == f"{tmp_path} is a folder: give the path of a checkpoint inside it"


def test_an_empty_file_is_named(path):
    path.touch()
    assert complaint(read_file, path) == f"{path} is empty: download or copy it again"


@pytest.mark.parametrize(
    "content",
    [
        b"a",
        b"<html>404: Not Found</html>\n",
        b'{"a": 1}',
        random.Random(0).randbytes(2000),
        pickle.dumps({"a": [1, 2]}),
    ],
    ids=["one byte", "page", "json", "noise", "bare pickle"],
)
def test_another_kind_of_file_is_no_checkpoint(content, path):
    path.write_bytes(content)
    message = complaint(read_file, path)
    assert str(path) in message
    assert "no checkpoint" in message


def test_a_zip_of_something_else_is_no_checkpoint(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "hello")
    message = complaint(read_file, path)
    assert message == f"{path} is no checkpoint but a zip archive: unpack it (it holds letter.txt)"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html>\n<html>404</html>", "an HTML page: download the file itself"),
        (b"\n<html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n", "a pointer of Git LFS: git lfs pull"),
        (gzip.compress(b"weights"), "a gzip archive: unpack it"),
        (lzma.compress(b"weights"), "an xz archive: unpack it"),
        (bz2.compress(b"weights"), "a bzip2 archive: unpack it"),
        (tar_of(b"weights"), "a tar archive: unpack it"),
    ],
    ids=["page", "page after a blank line", "LFS", "gzip", "xz", "bzip2", "tar"],
)
def test_what_is_mistaken_for_a_checkpoint_is_called_what_it_is(content, words, path):
    path.write_bytes(content)
    assert complaint(read_weights, path).startswith(f"{path} is no checkpoint but {words}")


def test_a_torchscript_program_is_called_so(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("linear/data.pkl", "linear/code/__torch__.py"):
            archive.writestr(name, "")
    assert "is no checkpoint but a TorchScript program" in complaint(read_weights, path)


def test_a_file_cut_anywhere_is_called_truncated(published, path, tmp_path):
    weights = {name: published[name] for name in list(published)[:12]}
    torch.save(weights, tmp_path / "zip")
    torch.save(weights, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(weights, tmp_path / "safetensors")
    for kind in ("zip", "legacy", "safetensors"):
        whole = (tmp_path / kind).read_bytes()
        for share in (0.02, 0.3, 0.6, 0.9, 0.999):
            path.write_bytes(whole[: int(len(whole) * share)])
            message = complaint(read_file, path)
            assert message.startswith(f"{path} is truncated, damaged or no checkpoint: download"), (kind, share)
            assert "\n" not in message
            assert "weights_only" not in message


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "loss": 1.0}, "found the keys epoch, loss"),
        ({}, "found nothing"),
        ({"state_dict": {}}, "found nothing"),
        ([torch.zeros(1)], "found a list"),
        (torch.zeros(3), "found a Tensor"),
        ({"state_dict": {"a": 1}}, "found the keys a"),
    ],
)
def test_a_file_without_a_state_dict_is_refused_with_what_it_holds(content, found, path):
    torch.save(content, path)
    message = complaint(read_weights, path)
    assert message.startswith(f"{path} holds no weights: expected a state dict")
    assert found in message


# Weights that do or do not fit


def test_a_classifier_of_other_classes_is_left_as_initialised_and_said_so(published, path):
    torch.save(published, path)
    model = GhostNet(10, width=0.5)
    initial = {name: value.clone() for name, value in model.classifier.state_dict().items()}
    assert load_weights(model, path) == [f"{path}: classifier of 1000 classes replaced by a new one of 10"]
    assert_same(model.classifier.state_dict(), initial)
    backbone = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier.")}
    assert_same(backbone, {name: published[name] for name in backbone})


@pytest.mark.parametrize(("name", "width"), [("ghostnet_050", 0.5), ("ghostnet_100", 1.0), ("ghostnet_130", 1.3)])
def test_another_width_is_named_with_the_model_to_ask_for(name, width, path):
    torch.save(timm.create_model(name, num_classes=3).state_dict(), path)
    message = complaint(load_weights, GhostNet(3, width=0.7), path)
    assert message.startswith(f"{path} does not fit GhostNet of width 0.7: ")
    assert message.endswith(f"It looks like width {width:g}: use model={name}")


@pytest.mark.parametrize("width", [0.1, 0.35, 0.75, 0.375, 2.0])
def test_an_odd_width_is_recognised(width, path):
    torch.save(GhostNet(3, width).state_dict(), path)
    assert f"It looks like width {width:g}: use model.width={width:g}" in complaint(load_weights, GhostNet(3), path)


def test_differences_are_counted_and_the_first_five_of_each_sort_are_named(published, path):
    names = list(published)
    weights = {name: value for name, value in published.items() if name not in names[10:17]}
    weights |= {"strange": torch.zeros(1), "conv_stem.weight": torch.zeros(8, 1, 3, 3)}
    torch.save(weights, path)
    message = complaint(load_weights, GhostNet(width=0.5), path)
    assert f"7 missing ({', '.join(names[10:15])}, …)" in message
    assert "1 unexpected (strange)" in message
    assert "1 of another shape (conv_stem.weight (8, 1, 3, 3) for (8, 3, 3, 3))" in message


def test_a_file_without_a_classifier_is_refused(published, path):
    torch.save({name: value for name, value in published.items() if not name.startswith("classifier.")}, path)
    assert "2 missing (classifier.weight, classifier.bias)" in complaint(load_weights, GhostNet(width=0.5), path)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_another_network_is_no_ghostnet(name, path):
    torch.save(timm.create_model(name).state_dict(), path)
    message = complaint(load_weights, GhostNet(), path)
    assert message.endswith("It is no GhostNet: give a checkpoint of GhostNet (arXiv 1911.11907)")
    assert len(message) < 2000


def test_ghostnet_v2_is_told_apart(path):
    torch.save(timm.create_model("ghostnetv2_100").state_dict(), path)
    message = complaint(load_weights, GhostNet(), path)
    assert "unexpected" in message
    assert "It looks like GhostNetV2 or V3" in message


def test_a_file_that_does_not_fit_changes_nothing(published, path):
    model = GhostNet(width=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({name: value for name, value in published.items() if name != "classifier.bias"}, path)
    complaint(load_weights, model, path)
    assert_same(model.state_dict(), before)
