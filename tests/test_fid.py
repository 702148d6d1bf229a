"""The FID network, resizes, metrics and picture files against the reference tools' numbers."""

import zlib

import numpy as np
import pytest
import torch
from conftest import published_keys, shapes

from argen.eval import images as eval_images
from argen.eval import metrics
from argen.eval.inception import FIDInception
from tokenizers_img.checkpoint import load_strict

UNUSED = "num_batches_tracked"


def filled(name: str, shape: list[int], salt: int = 0) -> torch.Tensor:
    """The values that the golden case prescribes for a tensor, instead of a file of 95 MB."""
    with np.errstate(over="ignore"):
        z = np.uint64(zlib.crc32(f"{salt}:{name}".encode())) << np.uint64(32)
        z = z + np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    v = 2 * ((z >> np.uint64(40)).astype(np.float64) / 2**24) - 1
    if len(shape) == 4:
        v = v * np.sqrt(6 / np.prod(shape[1:]))
    elif name == "fc.weight":
        v = v * np.sqrt(3 / 2048)
    elif name == "fc.bias":
        v = 0.5 * v
    elif name.endswith((".bn.weight", ".running_var")):
        v = 1 + 0.25 * v
    else:
        v = 0.2 * v
    return torch.from_numpy(v.astype(np.float32).reshape(shape))


@pytest.fixture(scope="module")
def network():
    """The network with the golden case's weights."""
    keys = published_keys("fid_eval")["fid_inception_v3"]
    model = FIDInception()
    state = {key: value for key, value in model.state_dict().items() if key.endswith(UNUSED)}
    return load_strict(model, state | {name: filled(name, shape) for name, shape in keys.items()}, "golden")


def test_every_published_key_and_shape_is_there(network):
    ours = {key: shape for key, shape in shapes(network).items() if not key.endswith(UNUSED)}
    assert ours == published_keys("fid_eval")["fid_inception_v3"]


@torch.no_grad()
@pytest.mark.parametrize("group", ["small", "large"])
def test_the_network_gives_the_reference_features(network, golden, group):
    case = golden("fid_eval/inception")
    for name, values in case.config["weight_probe_first_three"].items():
        assert network.state_dict()[name].flatten()[:3].tolist() == pytest.approx(values, abs=1e-9)
    io = {name.removeprefix(f"{group}/"): value for name, value in case.io.items() if name.startswith(group)}
    images = [image.permute(1, 2, 0).numpy() for image in io["images"]]
    close = {"atol": 2e-5, "rtol": 1e-5}
    actual = network(torch.stack([eval_images.prepared(image, "adm", 299) for image in images]))
    for tap in case.config["taps"]:
        torch.testing.assert_close(actual[tap], io[f"tap/{tap}"], **close)
    torch.testing.assert_close(actual["spatial"], io["spatial"], **close)
    for protocol in ("pytorch-fid", "torchmetrics", "clean"):
        key = f"{protocol.replace('-', '_')}/2048"
        actual = network(torch.stack([eval_images.prepared(image, protocol, 299) for image in images]))
        torch.testing.assert_close(actual["2048"], io[key], **close)
        assert not torch.allclose(actual["2048"], io["tap/2048"], atol=1e-3)  # the protocols are told apart


@torch.no_grad()
def test_resizes_are_those_of_the_reference_tools(golden):
    case = golden("fid_eval/preprocess")
    names = {
        "tf1_bilinear": eval_images.tf1_bilinear,
        "torch_bilinear": eval_images.torch_bilinear,
        "torch_bilinear_antialias": eval_images.torch_bilinear_antialias,
        "pil_bicubic_float": eval_images.pil_bicubic_float,
    }
    for index, sizes in enumerate(case.config["resizes"]):
        image = case.io[f"resize{index}/image"]
        for name, resize in names.items():
            expected = case.io[f"resize{index}/{name}"]
            torch.testing.assert_close(resize(image, *sizes["output"]), expected, atol=2e-3, rtol=0)


def test_crops_are_those_of_the_reference_tools(golden):
    case = golden("fid_eval/preprocess")
    image, size = case.io["crop/image"].permute(1, 2, 0).numpy(), case.config["crop_size"]
    for crop, name in (("adm", "adm"), ("square", "square_lanczos")):
        actual = torch.from_numpy(eval_images.cropped(image, f"{crop}-{size}").copy()).permute(2, 0, 1)
        assert (actual.int() - case.io[f"crop/{name}"].int()).abs().max() <= 1
    with pytest.raises(ValueError, match="unknown crop 'middle-256': expected adm-SIZE or square-SIZE"):
        eval_images.cropped(image, "middle-256")


@pytest.fixture
def features(golden):
    case = golden("fid_eval/features")
    return case.io, case.config


def moments_in_parts(rows: torch.Tensor) -> metrics.Moments:
    first, *rest = (metrics.Moments.of(part) for part in rows.split(37))
    return sum(rest, first)


def fid(real: torch.Tensor, fake: torch.Tensor) -> float:
    a, b = moments_in_parts(real), moments_in_parts(fake)
    return metrics.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def test_frechet_distance(features):
    io, config = features
    moments = moments_in_parts(io["real"])
    torch.testing.assert_close(moments.mean, io["real_mu"], atol=0, rtol=1e-12)
    torch.testing.assert_close(moments.covariance, io["real_sigma"], atol=1e-12, rtol=1e-9)
    actual = fid(io["real"], io["fake"])
    for tool in ("torch_fidelity", "pytorch_fid", "adm"):
        assert actual == pytest.approx(io[f"fid_{tool}"].item(), rel=1e-9)
    few = config["few"]
    assert fid(io["real"][:few], io["fake"][:few]) == pytest.approx(io["fid_few_pytorch_fid"].item(), abs=1e-4)
    assert abs(fid(io["real"], io["real"])) < 1e-9


def test_frechet_distance_equals_torchmetrics_on_the_same_features(features):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Module):
        num_features = 24

        def forward(self, rows):
            return rows

    io, _ = features
    theirs = FrechetInceptionDistance(feature=Given(), normalize=True).set_dtype(torch.float64)
    for name, real in (("real", True), ("fake", False)):
        theirs.update(io[name].double(), real=real)
    assert fid(io["real"], io["fake"]) == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_kernel_distance(features):
    io, config = features
    subsets = {"subsets": config["kid_subsets"], "subset_size": config["kid_subset_size"], "seed": config["kid_seed"]}
    mean, deviation = metrics.kernel_distance(io["real"], io["fake"], **subsets)
    assert mean == pytest.approx(io["kid_mean"].item(), rel=1e-9)
    assert deviation == pytest.approx(io["kid_std"].item(), rel=1e-9)
    size = min(len(io["real"]), len(io["fake"]))
    assert metrics.squared_mmd(io["fake"][:size], io["real"][:size]) == pytest.approx(io["kid_all"].item(), rel=1e-9)


def test_inception_score(features):
    io, config = features
    mean, deviation = metrics.inception_score(io["logits"][io["is_permutation"]], config["is_splits"])
    assert mean == pytest.approx(io["is_shuffled_mean"].item(), rel=1e-9)
    assert deviation == pytest.approx(io["is_shuffled_std"].item(), rel=1e-9)
    mean, deviation = metrics.inception_score(io["logits"], config["is_splits"])
    assert mean == pytest.approx(io["is_ordered_mean"].item(), rel=1e-9)
    assert deviation == pytest.approx(io["is_ordered_std"].item(), rel=1e-9)
    assert metrics.inception_score(io["logits"], 1)[0] == pytest.approx(io["is_one_split"].item(), rel=1e-9)


def test_the_inception_score_does_not_know_the_order_of_the_images(features):
    logits = features[0]["logits"]
    by_class = logits[logits.argmax(dim=1).argsort(stable=True)]
    scores = [
        metrics.inception_score(rows[metrics.canonical_order(rows)]) for rows in (logits, by_class, logits.flip(0))
    ]
    assert scores[0] == scores[1] == scores[2]
    assert metrics.inception_score(by_class)[0] < 0.95 * scores[0][0]  # what order does where nobody minds it


def test_precision_and_recall(features):
    io, config = features
    actual = metrics.precision_recall(io["real"], io["fake"], config["neighbours"], rows=64)
    assert actual == pytest.approx(io["pr_torch_fidelity"].tolist(), abs=1 / 260)
    assert actual == pytest.approx(io["pr_adm_float32"].tolist(), abs=1 / 260)


def test_reconstruction_metrics(golden):
    io = golden("fid_eval/preprocess").io
    restored, real = (io[f"recon/{name}"].permute(2, 0, 1)[None] / 255 for name in ("restored", "image"))
    assert metrics.psnr(restored, real).item() == pytest.approx(io["recon/psnr"].item(), abs=1e-4)
    assert metrics.ssim(restored, real).item() == pytest.approx(io["recon/ssim_skimage"].item(), abs=1e-6)
