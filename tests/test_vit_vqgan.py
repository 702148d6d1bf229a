"""ViT-VQGAN against the official code's numbers and the published key lists."""

import pytest
import torch
from conftest import published_keys, shapes

from tokenizers_img.checkpoint import load_strict
from tokenizers_img.vit_vqgan import SIZES, ViTVQGAN


@pytest.fixture
def case(golden):
    return golden("vit_vqgan/tiny")


def tiny(case) -> ViTVQGAN:
    config = case.config
    return ViTVQGAN(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        encoder_size=config["encoder"],
        decoder_size=config["decoder"],
        **config["quantizer"],
    )


@torch.no_grad()
def test_gives_the_official_numbers(case):
    model, io = load_strict(tiny(case), case.weights, source="golden"), case.io
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(model.pre_quant(model.encoder(io["pixels"])), io["pre_quant"], **close)
    decoded, loss, ids = model(io["pixels"])
    assert torch.equal(ids, io["ids"])
    assert torch.equal(model.encode(io["pixels"]), io["ids"])
    torch.testing.assert_close(model.quantizer.decode(ids), io["quant"], **close)
    torch.testing.assert_close(loss, io["vq_loss"], **close)
    torch.testing.assert_close(decoded, io["decoded"], **close)
    torch.testing.assert_close(model.decode(io["ids"]), io["decoded"], **close)


@torch.no_grad()
def test_a_wrong_weight_is_noticed(case):
    weights = case.weights
    weights["decoder.transformer.layers.1.1.fn.net.0.bias"] += 0.1
    model = load_strict(tiny(case), weights, source="golden")
    assert (model.decode(case.io["ids"]) - case.io["decoded"]).abs().max() > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_published_keys(size):
    with torch.device("meta"):
        model = ViTVQGAN(image_size=256, patch_size=8, encoder_size=SIZES[size], decoder_size=SIZES[size])
    assert shapes(model) == published_keys("vit_vqgan")[f"vitvqgan-imagenet-{size}"]


def test_from_original_unwraps_a_lightning_file_and_leaves_the_losses_out(tmp_path):
    with torch.device("meta"):
        keys = shapes(ViTVQGAN(image_size=256, patch_size=8, encoder_size=SIZES["small"], decoder_size=SIZES["small"]))
    state = {key: torch.zeros(shape) for key, shape in keys.items()}
    torch.save({"state_dict": {**state, "loss.discriminator.weight": torch.zeros(3)}, "epoch": 1}, tmp_path / "a.ckpt")
    assert ViTVQGAN.from_original(tmp_path / "a.ckpt", size="small").grid == 32

    state.pop("pre_quant.bias")
    state["pre_quant.scale"] = torch.zeros(1)
    torch.save({"state_dict": state}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="missing pre_quant.bias; unexpected pre_quant.scale"):
        ViTVQGAN.from_original(tmp_path / "b.ckpt", size="small")


def test_checkpoints_are_never_unpickled_freely(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "broken-in"), "w"))

    torch.save({"state_dict": {"a": torch.zeros(1)}, "payload": Payload()}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="could not be read as a checkpoint"):
        ViTVQGAN.from_original(tmp_path / "bad.ckpt")
    assert not (tmp_path / "broken-in").exists()


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 50, 48), (3, 35, 32), (1, 32, 32)])
def test_images_of_another_size_are_refused(shape):
    model = ViTVQGAN(
        32, 8, *[{"dim": 32, "depth": 1, "heads": 1, "dim_head": 32, "mlp_dim": 32}] * 2, embed_dim=8, n_embed=16
    )
    for call in (model.encode, model):
        with pytest.raises(
            ValueError, match=rf"images are \[{shape[0]}, {shape[1]}, {shape[2]}\]: expected \[3, 32, 32\]"
        ):
            call(torch.zeros(2, *shape))
