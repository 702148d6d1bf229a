"""KL-16 against the official code's numbers and the published key lists."""

import pytest
import torch
from conftest import published_keys, shapes

import argen
from argen.data.tables import pixels, read_split
from argen.eval.reconstruction import evaluate, reconstruct
from argen.files import WEIGHTS
from tokenizers_img import kl_vae
from tokenizers_img.checkpoint import load_strict, to_diffusers
from tokenizers_img.kl_vae import KLVAE

SAMPLE = WEIGHTS.parent / "data" / "sample"


@torch.no_grad()
def test_the_official_numbers(golden):
    case = golden("kl16_vae/scaled")
    config, io = case.config, case.io
    channels = tuple(config["ch"] * multiplier for multiplier in config["ch_mult"])
    vae = kl_vae.network(channels, config["z_channels"], config["norm_num_groups"])
    tokenizer = KLVAE(load_strict(vae, to_diffusers(case.weights, len(channels)), source="golden"))
    close = {"atol": 1e-4, "rtol": 1e-4}
    pixels = (io["pixels"] + 1) / 2
    posterior = tokenizer.posterior(pixels)
    torch.testing.assert_close(posterior.parameters, io["moments"], **close)
    torch.testing.assert_close(posterior.mean, io["mean"], **close)
    torch.testing.assert_close(posterior.logvar, io["logvar"], **close)
    torch.testing.assert_close(posterior.std, io["std"], **close)
    torch.testing.assert_close(posterior.kl(), io["kl"], **close)
    torch.testing.assert_close(posterior.mean + posterior.std * io["posterior_noise"], io["posterior_sample"], **close)
    latents = tokenizer.encode(pixels)
    torch.testing.assert_close(latents, io["scaled_mean"], **close)
    torch.testing.assert_close(2 * tokenizer.decode(latents) - 1, io["decoded"], **close)
    with pytest.raises(ValueError, match="expected multiples of 16"):
        tokenizer.encode(pixels[:, :, :-1])


def test_every_published_key_has_its_place():
    with torch.device("meta"):
        vae = kl_vae.network()
        published = {key: torch.empty(shape) for key, shape in published_keys("kl16_vae")["kl16"].items()}
    assert shapes(vae) == {key: list(value.shape) for key, value in to_diffusers(published, 5).items()}
    assert shapes(vae) == published_keys("kl16_vae")["kl16-diffusers"]
    assert sum(value.numel() for value in vae.parameters()) == 66_456_019


def test_a_released_file_loads(tmp_path, monkeypatch, golden):
    case = golden("kl16_vae/scaled")
    small = kl_vae.network((8, 8, 16, 16, 32), 16, 2)
    monkeypatch.setattr(kl_vae, "network", lambda: small)
    torch.save({"model": case.weights | {"loss.logvar": torch.zeros(())}}, tmp_path / "kl16.ckpt")
    loaded = KLVAE.from_original(tmp_path / "kl16.ckpt")
    assert loaded.stride == 16
    assert not loaded.vae.training
    torch.save(
        {"model": {key: value for key, value in case.weights.items() if "quant_conv" not in key}}, tmp_path / "x.ckpt"
    )
    with pytest.raises(ValueError, match=r"x\.ckpt does not fit AutoencoderKL: missing quant_conv\.weight"):
        KLVAE.from_original(tmp_path / "x.ckpt")


def test_the_shipped_autoencoder_keeps_images():
    vae, images = argen.load("argen/emoji-vae"), torch.from_numpy(pixels(read_split(SAMPLE, "test")))
    assert evaluate(vae, images)["psnr"] >= 25
    _, latents = reconstruct(vae, images)
    assert latents.shape[1:] == (16, 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=0.15)  # as the generators on them expect
