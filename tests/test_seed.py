"""SEED's tokenizer against the official code's numbers."""

import numpy as np
import pytest
import torch
from conftest import published_keys, shapes
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from transformers import Blip2VisionModel

from argen.train.seed import Contrastive, quantised
from tokenizers_img.checkpoint import load_strict
from tokenizers_img.pixels import CLIP_MEAN, CLIP_STD
from tokenizers_img.seed import checkpoint
from tokenizers_img.seed.network import Seed, qformer
from tokenizers_img.seed.tokenizer import SeedTokenizer, UnCLIP

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def small(case) -> tuple[Seed, Blip2VisionModel]:
    config, state = case.config, case.weights
    vision, q = config["vision"], config["qformer"]
    network = Seed(
        features=q["encoder_width"],
        dim=q["hidden_size"],
        layers=q["num_hidden_layers"],
        heads=q["num_attention_heads"],
        hidden=q["intermediate_size"],
        tokens=config["num_query_token"],
        n_embed=config["n_embed"],
        embed_dim=config["codebook_embed_dim"],
        depth=config["decode_depth"],
        block_heads=config["block_num_heads"],
        **checkpoint.sizes_of(state) | {"embedding": config.get("image_features_dim") or config["text_features_dim"]},
    )
    sizes = {"dim": vision["embed_dim"], "depth": vision["depth"], "heads": vision["num_heads"]}
    encoder = checkpoint.vision_network(vision["img_size"], **sizes, mlp_ratio=vision["mlp_ratio"])
    seen = {key: value for key, value in state.items() if key.startswith(("visual_encoder.", "ln_vision."))}
    load_strict(encoder, checkpoint.vision_state(seen, vision["depth"]), source="golden")
    return load_strict(network, checkpoint.seed_state(state, network), source="golden"), encoder


@pytest.mark.parametrize("name", ["seed2_mlp", "seed2_reverse", "seed1_text"])
@torch.no_grad()
def test_an_image_becomes_official_tokens_and_an_official_embedding(golden, name):
    case = golden(f"seed/{name}")
    (network, encoder), io = small(case), case.io
    seen = encoder(io["pixel_values"], output_hidden_states=True)
    torch.testing.assert_close(seen.hidden_states[-1], io["vit_features"], **CLOSE)
    features = seen.last_hidden_state
    torch.testing.assert_close(features, io["image_embeds"], **CLOSE)
    query_outputs = network.queries(features)
    torch.testing.assert_close(query_outputs, io["query_output"], **CLOSE)
    torch.testing.assert_close(network.encode_task_layer(query_outputs), io["pre_quant"], **CLOSE)
    ids = network.ids(features)
    assert torch.equal(ids, io["ids"])
    codes = network.quantize.embedding(ids)
    torch.testing.assert_close(codes, io["quantized"], **CLOSE)
    torch.testing.assert_close(network.decode_task_layer(codes), io["decode_task_output"], **CLOSE)
    torch.testing.assert_close(network.decode(ids), io["generation_embedding"], **CLOSE)
    torch.testing.assert_close(network.decode(io["free_ids"]), io["free_generation_embedding"], **CLOSE)
    if "reconstructed_query_output" in io:
        torch.testing.assert_close(network.reconstruct(codes), io["reconstructed_query_output"], **CLOSE)


@torch.no_grad()
def test_tokens_are_causal(golden):
    """A change of a query changes nothing of those before it."""
    network, encoder = small(golden("seed/seed2_mlp"))
    features = torch.randn(1, 10, 40, generator=torch.Generator().manual_seed(0))
    before = network.queries(features)
    network.query_tokens[:, 20] += torch.randn(48, generator=torch.Generator().manual_seed(1))
    after = network.queries(features)
    torch.testing.assert_close(after[:, :20], before[:, :20])
    assert (after[:, 20:] - before[:, 20:]).abs().amax(dim=-1).min() > 1e-3


def test_every_published_key_has_its_place():
    published = published_keys("seed")
    with torch.device("meta"):
        network, encoder = Seed(), checkpoint.vision_network()
        keys = {key: torch.empty(shape) for key, shape in published["seed2_quantizer"].items()}
        vision = {key: torch.empty(shape) for key, shape in published["eva_vit_g"].items()}
    assert checkpoint.sizes_of(keys) == {"head": "mlp", "reconstruct": True}
    norm = {key: value for key, value in keys.items() if key.startswith("ln_vision.")}
    assert shapes(network) == {key: list(value.shape) for key, value in checkpoint.seed_state(keys, network).items()}
    assert {key for key in keys if not key.startswith("ln_vision.")} - {"Qformer.bert.embeddings.position_ids"} == {
        key for key in keys if checkpoint.seed_state({key: keys[key]}, network)
    }
    vision_state = {key: value for key, value in vision.items() if not key.startswith(("norm.", "head."))}
    assert shapes(encoder) == {
        key: list(value.shape) for key, value in checkpoint.vision_state(vision_state | norm, 39).items()
    }


def test_released_files_are_loaded(golden, tmp_path, monkeypatch):
    """Both ways in which they lie about: the encoder in a file of its own, with a block more, or in the same file."""
    case = golden("seed/seed2_mlp")
    network, encoder = small(case)
    sizes = {key: value for key, value in network.config.items() if not key.startswith("_")}
    monkeypatch.setattr(checkpoint, "sizes_of", lambda state: sizes)
    monkeypatch.setattr(checkpoint, "vision_network", lambda: seed_vision)
    state = case.weights | {
        "Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.ones(2),
        "temp": torch.ones(1),
    }
    vision = {key.removeprefix("visual_encoder."): value for key, value in state.items() if "visual" in key}
    block = {key.replace("blocks.2.", "blocks.3."): value for key, value in vision.items() if "blocks.2." in key}
    torch.save(state, tmp_path / "all.pt")
    torch.save({key: value for key, value in state.items() if "visual" not in key}, tmp_path / "seed_quantizer.pt")
    torch.save(vision | block | {"head.weight": torch.ones(1)}, tmp_path / "eva_vit_g.pth")
    for files in (("all.pt",), ("seed_quantizer.pt", "eva_vit_g.pth")):
        seed_vision = type(encoder)(encoder.config)
        read, seen = checkpoint.from_original(*(tmp_path / file for file in files))
        for ours, theirs in ((read, network), (seen, encoder)):
            assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    part = {key: value for key, value in state.items() if key != "image_down.2.weight"}
    torch.save(part, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="does not fit Seed: missing image_down.2.weight"):
        checkpoint.from_original(tmp_path / "part.pt")


def test_bad_tokens_are_refused(golden):
    network, _ = small(golden("seed/seed2_mlp"))
    with pytest.raises(ValueError, match="got 31 tokens for an image: expected 32"):
        network.decode(torch.zeros(1, 31, dtype=torch.long))
    with pytest.raises(ValueError, match="token 128 does not exist: expected 0 to 127"):
        network.decode(torch.full((1, 32), 128))
    with pytest.raises(ValueError, match="no head of SEED"):
        checkpoint.head_of({})


def decoder(case) -> UnCLIP:
    """The pipeline of the case."""
    config, parts = case.config, {}
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "image_normalizer": StableUnCLIPImageNormalizer}
    for name, kind in kinds.items():
        state = {
            key.removeprefix(f"{name}."): value for key, value in case.weights.items() if key.startswith(f"{name}.")
        }
        parts[name] = load_strict(kind.from_config(config[name]), state, source="golden")
    components = {"feature_extractor": None, "image_encoder": None, "tokenizer": None, "text_encoder": None}
    components |= {"scheduler": PNDMScheduler.from_config(config["scheduler"])}
    components["image_noising_scheduler"] = DDPMScheduler.from_config(config["image_noising_scheduler"])
    pipe = UnCLIP(**components, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("name", "guidance", "level"),
    [("latents_g10", 10, 0), ("latents_g5_negative", 5, 0), ("latents_g1_level60", 1, 60)],
)
@torch.no_grad()
def test_an_embedding_becomes_the_official_image(golden, monkeypatch, name, guidance, level):
    case = golden("seed/unclip_decode")
    io, pipe = case.io, decoder(case)
    draws, plain = iter([io["noise"], io["negative_noise"]]), pipe.noise_image_embeddings
    recorded = lambda embeds, level, generator=None: plain(embeds, int(level), next(draws))  # noqa: E731
    monkeypatch.setattr(pipe, "noise_image_embeddings", recorded)
    image_embeds = io["image_embeds"]
    if "negative" in name:
        image_embeds = torch.stack([image_embeds, io["negative_image_embeds"].expand_as(image_embeds)], dim=1)
    empty = io["empty_prompt_embeds"]
    kwargs = {"image_embeds": image_embeds, "prompt_embeds": empty, "negative_prompt_embeds": empty}
    kwargs |= {"num_inference_steps": case.config["num_inference_steps"], "guidance_scale": guidance}
    latents = pipe(**kwargs, latents=io["latents"], noise_level=level, output_type="latent").images
    torch.testing.assert_close(latents, io[name], atol=2e-4 * (io[name].max() - io[name].min()).item(), rtol=0)
    if name == "latents_g10":
        images = pipe.image_processor.postprocess(pipe.vae.decode(latents / pipe.vae.config.scaling_factor)[0], "np")
        torch.testing.assert_close(torch.from_numpy(images), io["images_g10"], atol=1e-3, rtol=0)


@torch.no_grad()
def test_images_are_prepared_as_by_the_authors(golden):
    case = golden("seed/seed2_mlp")
    tokenizer, io = SeedTokenizer(*small(case)), case.io
    image = Image.fromarray(io["image_uint8"].numpy())
    for name, filter in (("pixels_bicubic", Image.Resampling.BICUBIC), ("pixels_bilinear", Image.Resampling.BILINEAR)):
        prepared = tokenizer.prepare(image, filter)
        expected = torch.from_numpy(np.array(image.resize((prepared.shape[-1],) * 2, filter))).permute(2, 0, 1) / 255
        assert torch.equal(prepared, expected)
        mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        levels = 255 * (io[name] * std + mean - prepared).abs()
        assert levels.max() <= 2.01  # Pillow's releases differ in whether rows or columns go first
    assert tokenizer.encode(tokenizer.prepare(image)[None]).shape == (1, 32)
    with pytest.raises(ValueError, match="without a decoder"):
        tokenizer.decode(io["ids"])


def close_gradients(parameters: dict[str, torch.Tensor], io) -> None:
    for name in (key for key in io if key.startswith("grad.")):
        grad = parameters[checkpoint._renamed(name.removeprefix("grad."), checkpoint.QFORMER_NAMES)].grad
        torch.testing.assert_close(grad, io[name], atol=1e-4 * io[name].abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("name", ["seed2_mlp", "seed2_reverse"])
def test_the_second_stage_has_the_official_losses(golden, name):
    case = golden(f"seed/{name}")
    (network, encoder), io = small(case), case.io
    with torch.no_grad():
        query_outputs = network.queries(encoder(io["pixel_values"]).last_hidden_state)
    losses = quantised(network, query_outputs, io["clip_image_embeds"])[0]
    for ours, theirs in {"embed": "embed_x5", "reconstruct": "recon_s_x2", "distil": "distil_image_x0.5"}.items():
        torch.testing.assert_close(losses[ours], io[f"loss_{theirs}"], atol=1e-5, rtol=1e-4)
    total = sum(losses.values())
    torch.testing.assert_close(total, io["loss_total"], atol=1e-5, rtol=1e-4)
    total.backward()
    close_gradients(dict(network.named_parameters()), io)


def test_the_first_stage_has_the_official_loss(golden):
    case = golden("seed/stage1_contrastive")
    config, state, io = case.config, case.weights, case.io
    q, vision = config["qformer"], config["vision"]
    dim = q["hidden_size"]
    shared = qformer(
        dim, q["num_hidden_layers"], q["num_attention_heads"], q["intermediate_size"], q["encoder_width"], text=True
    )
    queries = torch.nn.Parameter(torch.empty(1, config["num_query_token"], dim))
    network = Contrastive(shared, queries, q["vocab_size"], q["max_position_embeddings"], config["embed_dim"]).eval()
    tables = {"Qformer.embeddings.word_embeddings.": "word_embeddings."}
    tables |= {"Qformer.embeddings.position_embeddings.": "position_embeddings."}
    renamed = {}
    for key, value in state.items():
        key = checkpoint._renamed(key, checkpoint.QFORMER_NAMES)
        for theirs, ours in tables.items():
            key = key.replace(theirs, ours)
        if not key.startswith(("visual_encoder.", "ln_vision.", "Qformer.cls.")) and not key.endswith("position_ids"):
            renamed[key] = value
    network = load_strict(network, renamed, source="golden")
    encoder = checkpoint.vision_network(vision["img_size"], vision["embed_dim"], vision["depth"], vision["num_heads"])
    seen = {key: value for key, value in state.items() if key.startswith(("visual_encoder.", "ln_vision."))}
    load_strict(encoder, checkpoint.vision_state(seen, vision["depth"]), source="golden")
    features = encoder(io["pixel_values"]).last_hidden_state
    torch.testing.assert_close(network.image(features), io["query_features"], **CLOSE)
    torch.testing.assert_close(network.text(io["input_ids"], io["attention_mask"]), io["text_feature"], **CLOSE)
    loss = network(features, io["input_ids"], io["attention_mask"])
    torch.testing.assert_close(loss, io["loss_itc"], atol=1e-5, rtol=1e-4)
    loss.backward()
    parameters = dict(network.named_parameters()) | {"ln_vision.weight": encoder.post_layernorm.weight}
    parameters["Qformer.embeddings.word_embeddings.weight"] = network.word_embeddings.weight
    close_gradients(parameters, io)
