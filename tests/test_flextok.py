"""FlexTok against the official code's numbers and the published key lists."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, published_keys, shapes
from safetensors.torch import load_file, save_file

from tokenizers_img.checkpoint import load_strict
from tokenizers_img.flextok import tokenizer
from tokenizers_img.flextok.checkpoint import ALIGNMENT, sizes_of, vae_network, vae_sizes
from tokenizers_img.flextok.network import SIZES, FlexTok
from tokenizers_img.flextok.tokenizer import FlexTokenizer
from tokenizers_img.quantize import FSQ

CLOSE, GUIDED = {"atol": 1e-4, "rtol": 1e-4}, {"atol": 1e-3, "rtol": 1e-3}


def tiny(case) -> FlexTokenizer:
    override = case.config["_vae_base_override"]
    vae = vae_network(**vae_sizes(case.config), channels=override["block_out_channels"], norm_num_groups=2)
    inner = {key.removeprefix("vae.vae."): value for key, value in case.weights.items() if key.startswith("vae.")}
    rest = {key: value for key, value in case.weights.items() if not key.startswith(("vae.", ALIGNMENT))}
    network = load_strict(FlexTok(**sizes_of(case.config)), rest, source="golden")
    return FlexTokenizer(network, load_strict(vae, inner, source="golden"))


@pytest.mark.parametrize("name", "abcd")
def test_fsq(golden, name):
    case = golden("flextok/fsq")
    io = {key.removeprefix(f"{name}."): value for key, value in case.io.items() if key.startswith(f"{name}.")}
    fsq, z = FSQ(tuple(case.config["sets"][name])), io["z"].requires_grad_(True)
    torch.testing.assert_close(fsq.bound(z), io["bounded"], atol=1e-5, rtol=1e-5)
    codes = fsq.quantize(z)
    torch.testing.assert_close(codes, io["quant"], atol=1e-5, rtol=1e-5)
    (codes * io["grad_weight"]).sum().backward()
    torch.testing.assert_close(z.grad, io["grad_z"], atol=1e-5, rtol=1e-5)
    assert torch.equal(fsq.ids(z), io["ids"])
    torch.testing.assert_close(fsq.decode(io["some_ids"]), io["some_codes"], atol=1e-6, rtol=0)
    every = torch.arange(fsq.n_embed)
    codes = fsq.decode(every)
    assert codes.abs().max() <= 1
    half = fsq.table[3]
    assert torch.equal((((codes * half).round() + half).long() * fsq.basis).sum(dim=-1), every)


@torch.no_grad()
def test_tokens_of_pixels(golden):
    case = golden("flextok/pixels")
    tokenizer, io = tiny(case), case.io
    pixels = (io["images"] + 1) / 2
    torch.testing.assert_close(tokenizer.latents(pixels), io["vae_latents_mode"], **CLOSE)
    posterior = tokenizer.vae.encode(io["images"]).latent_dist
    drawn = (posterior.mean + posterior.std * io["posterior_noise"]) * case.config["vae"]["scaling_factor"]
    torch.testing.assert_close(drawn, io["vae_latents"], **CLOSE)
    torch.testing.assert_close(posterior.kl(), io["vae_kl"], **CLOSE)
    for latents, tag in ((io["vae_latents"], ""), (io["vae_latents_mode"], "_mode")):
        z = tokenizer.network.encode(latents)
        torch.testing.assert_close(z, io[f"pre_quant{tag}"], **CLOSE)
        assert torch.equal(tokenizer.network.fsq.ids(z), io[f"token_ids{tag}"])
    assert torch.equal(tokenizer.encode(pixels), io["token_ids_mode"])
    torch.testing.assert_close(tokenizer.network.fsq.quantize(z), tokenizer.network.fsq.decode(io["token_ids_mode"]))


@torch.no_grad()
def test_velocities(golden):
    case = golden("flextok/pixels")
    network, io = tiny(case).network, case.io
    codes, modulations = network.fsq.decode(io["token_ids"]), network.modulations(io["flow_t"])
    for tag, registers in {
        "all": network.read(codes),
        "keep": network.read(codes, torch.tensor([1, 5])),
        "null": network.null(2),
    }.items():
        velocity = network.velocity(io["flow_xt"], registers, modulations)[0]
        torch.testing.assert_close(velocity, io[f"flow_v_{tag}"], **CLOSE)


@torch.no_grad()
def test_decoding(golden):
    case = golden("flextok/pixels")
    tokenizer, io = tiny(case), case.io
    network, ids, noise = tokenizer.network, io["token_ids"], io["init_noise"]

    def latents(keep, scale, normalised, precise=True):
        registers = network.read(network.fsq.decode(ids), torch.tensor(keep))
        return tokenizer.flow(registers, noise, 4, scale, normalised, precise)

    for k in (1, 5, 24):
        torch.testing.assert_close(latents([k, k], 1.0, False), io[f"lat_k{k}_g1"], **CLOSE)
    torch.testing.assert_close(latents([5, 5], 3.0, False), io["lat_k5_cfg3.0"], **GUIDED)
    for precise in (True, False):
        torch.testing.assert_close(latents([5, 5], 7.5, True, precise), io["lat_k5_apg7.5"], **GUIDED)
    torch.testing.assert_close(latents([24, 24], 7.5, True), io["lat_k24_apg7.5"], **GUIDED)
    torch.testing.assert_close(latents([3, 17], 7.5, True), io["lat_kmix_apg7.5"], **GUIDED)
    torch.testing.assert_close(latents([5, 5], lambda time: 1 + 4 * time, True), io["lat_k5_sched"], **GUIDED)
    images = {
        "k24_g1": tokenizer.decode(ids, 4, 1.0, noise=noise),
        "k5_apg7.5": tokenizer.decode(ids[:, :5], 4, noise=noise),
        "kmix_apg7.5": tokenizer.decode([ids[0, :3], ids[1, :17]], 4, noise=noise),
    }
    for tag, pixels in images.items():
        torch.testing.assert_close(2 * pixels - 1, io[f"img_{tag}"], **GUIDED)


def test_training_loss_and_gradients(golden):
    case = golden("flextok/pixels")
    network, io = tiny(case).network.requires_grad_(True), case.io
    latents, noise = io["train_latents"], io["train_noise"]
    velocity, features = network(latents, noise, io["train_sigma"], io["train_keep_k"], io["train_dropped"])
    assert features is None
    torch.testing.assert_close(velocity, io["train_velocity"], **CLOSE)
    loss = F.mse_loss(velocity, noise - latents)
    torch.testing.assert_close(loss, io["train_loss"].squeeze(), **CLOSE)
    loss.backward()
    parameters = dict(network.named_parameters())
    expected = {key.removeprefix("grad."): value for key, value in io.items() if key.startswith("grad.")}
    assert len(expected) == 9
    for key, value in expected.items():
        torch.testing.assert_close(parameters[key].grad, value, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_other_shapes_and_the_options_of_a_configuration(golden):
    case = golden("flextok/mixed_shapes")
    tokenizer, io = tiny(case), case.io
    network, keep = tokenizer.network, [32, 9, 2]
    assert network.config.single_null
    head = {key: value for key, value in case.weights.items() if key.startswith(ALIGNMENT)}
    assert head  # of training: left out when the file is read
    for index in range(3):
        z = network.encode(io[f"vae_latents.{index}"])
        torch.testing.assert_close(z[0], io["pre_quant"][index], **CLOSE)
        ids = network.fsq.ids(z)
        assert torch.equal(ids[0], io["token_ids"][index])
        registers = network.read(network.fsq.decode(ids), torch.tensor(keep[index : index + 1]))
        modulations = network.modulations(io["flow_t"][index : index + 1])
        xt = io[f"flow_xt.{index}"]
        velocity, features = network.velocity(xt, registers, modulations, features_of=1)
        torch.testing.assert_close(velocity, io[f"flow_v.{index}"], **CLOSE)
        torch.testing.assert_close(
            features.view_as(io[f"repa_features.{index}"]), io[f"repa_features.{index}"], **CLOSE
        )
        if index == 1:
            velocity = network.velocity(xt, network.null(1), modulations)[0]
        torch.testing.assert_close(velocity, io[f"flow_v_null1.{index}"], **CLOSE)
        noise = io[f"init_noise.{index}"]
        torch.testing.assert_close(tokenizer.flow(registers, noise, 3, 1.0), io[f"lat_g1.{index}"], **CLOSE)
        torch.testing.assert_close(tokenizer.flow(registers, noise, 3, 5.0), io[f"lat_apg5.0.{index}"], **GUIDED)
    with pytest.raises(ValueError, match="latents are 18 x 8: expected multiples of 2, at most 16 x 16"):
        network.encode(torch.zeros(1, 16, 18, 8))


@torch.no_grad()
def test_fewer_registers_give_the_same_first_tokens(golden):
    network, io = tiny(golden("flextok/pixels")).network, golden("flextok/pixels").io
    whole = network.encode(io["vae_latents"])
    registers = network.encoder.module_dict.enc_register_module
    registers.registers.data = registers.registers[:7]
    torch.testing.assert_close(network.encode(io["vae_latents"]), whole[:, :7], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("flextok_d12_d12_in1k", "d12", "d12"),
        ("flextok_d18_d18_in1k", "d18", "d18"),
        ("flextok_d18_d28_in1k", "d18", "d28"),
        ("flextok_d18_d28_dfn", "d18", "d28"),
    ],
)
def test_every_published_key_has_its_place(name, encoder, decoder):
    sizes = {}
    for side, depth in (("encoder", encoder), ("decoder", decoder)):
        sizes |= {f"{side}_dim": SIZES[depth], f"{side}_depth": int(depth[1:])}
    with torch.device("meta"):
        network, vae = FlexTok(**sizes), vae_network()
    key_shapes = shapes(network) | {f"vae.vae.{key}": shape for key, shape in shapes(vae).items()}
    assert key_shapes == published_keys("flextok")[name]


@pytest.mark.parametrize("channels", [4, 8, 16])
def test_every_published_key_of_the_vaes_has_its_place(channels):
    with torch.device("meta"):
        vae = vae_network(channels)
    assert shapes(vae) == published_keys("flextok")[f"flextok_vae_c{channels}"]


@pytest.fixture
def released(golden, tmp_path, monkeypatch):
    """A file as published, of small sizes."""
    case = golden("flextok/mixed_shapes")
    small = vae_network
    monkeypatch.setattr(
        tokenizer, "vae_network", lambda **kwargs: small(**kwargs, channels=(4, 8, 8, 8), norm_num_groups=2)
    )
    metadata = {key: value if key == "_target_" else repr(value) for key, value in case.config.items()}
    save_file(load_file(GOLDEN / "flextok/mixed_shapes/weights.safetensors"), tmp_path / "model.safetensors", metadata)
    return tmp_path / "model.safetensors", case


@torch.no_grad()
def test_a_released_file_loads_with_its_configuration_beside_or_inside(released):
    path, case = released
    inside = FlexTokenizer.from_original(path)
    path.with_name("config.json").write_text(json.dumps(case.config))
    beside = FlexTokenizer.from_original(path)
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inside.encode(pixels), beside.encode(pixels))
    assert torch.equal(inside.encode(pixels), tiny(case).encode(pixels))


def test_what_a_configuration_does_not_say_as_we_know_it_is_named(released):
    path, case = released
    config = json.loads(json.dumps(case.config))
    beside = path.with_name("config.json")
    config["decoder"]["module_dict"]["dec_to_patches"]["_target_"] = "flextok.model.heads.NewHead"
    beside.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"names dec_to_patches: flextok\.model\.heads\.NewHead, a part that argen"):
        FlexTokenizer.from_original(path)
    config = json.loads(json.dumps(case.config))
    config["encoder"]["module_dict"]["enc_seq_packer"]["mask_mode"] = "full"
    beside.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"sets enc_seq_packer\.mask_mode to 'full': argen knows 'causal_last' only"):
        FlexTokenizer.from_original(path)
    beside.write_text("{}")
    with pytest.raises(ValueError, match=r"lacks encoder\.module_dict: expected that of a FlexTok"):
        FlexTokenizer.from_original(path)


@torch.no_grad()
def test_what_cannot_be_decoded_is_refused(golden):
    tokenizer = tiny(golden("flextok/pixels"))
    for count in (0, 25):
        with pytest.raises(ValueError, match=f"got {count} tokens for an image: expected 1 to 24"):
            tokenizer.decode(torch.zeros(1, count, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="token 64000 does not exist: expected 0 to 63999"):
        tokenizer.decode(torch.tensor([[5, 64000]]), 1)
    with pytest.raises(ValueError, match=r"images are \[60, 64\]: expected multiples of 16"):
        tokenizer.encode(torch.zeros(1, 3, 60, 64))
