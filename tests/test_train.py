"""The training loop and the recipes, for a few steps on the shipped sample."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from argen.cli.main import main
from argen.data import emoji, scenes
from argen.files import WEIGHTS
from argen.models.files import load_network
from argen.models.llamagen import LlamaGen
from argen.models.parti import Parti
from argen.registry import recipes
from argen.train import (
    controlar,
    counter,
    drafter,
    flexar,
    flextok,
    kl_vae,
    llamagen,
    sd,
    seed,
    seed_encoder,
    seed_lm,
    unclip,
    xar,
)
from argen.train.clip import CLIPTask, positives
from argen.train.judge import JudgeTask
from argen.train.loop import Recipe, Schedule, optimizers_of, train
from argen.train.parti import PartiTask, ThirdPartiTask
from argen.train.vit_vqgan import DecoderTask, ViTVQGANTask, refit_codes
from tokenizers_img.conv_encoder import ConvEncoder
from tokenizers_img.flextok.network import FlexTok
from tokenizers_img.seed.network import Seed
from tokenizers_img.vit_vqgan import ViTVQGAN

SAMPLE = Path(emoji.__file__).parent / "sample"
SCHEDULE = Schedule(steps=4, batch_size=4, learning_rate=1e-3, warmup=2, muon=True)


@pytest.fixture(scope="module", autouse=True)
def small():
    """A smaller FlexTok than the one that ships: what is tested is the training, not the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(flextok.SIZES, "encoder_depth", 2)  # one layer is aligned, one is behind it
        patch.setitem(flextok.SIZES, "decoder_depth", 2)
        patch.setitem(flextok.SIZES, "encoder_dim", 64)
        patch.setitem(flextok.SIZES, "decoder_dim", 64)
        patch.setattr(flextok, "STEPS", 2)
        yield


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "scenes"
    scenes.build(SAMPLE, out, num=20)
    return out


@pytest.fixture(scope="module")
def small_llamagen(tmp_path_factory):
    """A folder with an untrained generator of the shipped size."""
    folder = tmp_path_factory.mktemp("llamagen")
    torch.manual_seed(0)
    LlamaGen(4096, 8, caption_dim=192, **llamagen.SIZES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_vae(tmp_path_factory):
    """A folder with an untrained autoencoder of the shipped size."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    kl_vae.network(kl_vae.CHANNELS, 16, kl_vae.GROUPS, kl_vae.SIDE, layers_per_block=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_flextok(tmp_path_factory):
    """A folder with an untrained one of the shipped size."""
    folder = tmp_path_factory.mktemp("flextok")
    torch.manual_seed(0)
    FlexTok(**flextok.SIZES, grid=8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_seed(tmp_path_factory):
    """A folder with an untrained one of the shipped size, and its encoder."""
    folder = tmp_path_factory.mktemp("seed")
    torch.manual_seed(0)
    Seed(**seed.SIZES).save_pretrained(folder)
    ConvEncoder(names=5).save_pretrained(folder / "vision")
    return folder


@pytest.fixture(params=[name for name, recipe in recipes.items() if isinstance(recipe, Recipe)])
def task(request, composed, small_llamagen, small_vae, small_flextok, small_seed, monkeypatch):
    """Makes the task of a recipe anew."""
    monkeypatch.setattr(controlar, "SHAPED", 4)
    clip, tokenizer = WEIGHTS / "emoji-clip", WEIGHTS / "emoji-vitvqgan"
    return {  # the decoder's sharpens from the second step on
        "emoji-clip": lambda: CLIPTask(SAMPLE, composed),
        "emoji-vitvqgan": lambda: ViTVQGANTask(SAMPLE, SCHEDULE.steps),
        "emoji-vitvqgan-decoder": lambda: DecoderTask(SAMPLE, tokenizer, WEIGHTS / "emoji-judge", total=1),
        "emoji-vae": lambda: kl_vae.KLVAETask(SAMPLE, SCHEDULE.steps),
        "emoji-vae-decoder": lambda: kl_vae.KLDecoderTask(SAMPLE, small_vae, WEIGHTS / "emoji-judge", total=1),
        "emoji-parti": lambda: PartiTask(SAMPLE, composed, tokenizer, clip),
        "emoji-parti-second": lambda: PartiTask(SAMPLE, composed, tokenizer, clip, WEIGHTS / "emoji-parti"),
        "emoji-parti-third": lambda: ThirdPartiTask(SAMPLE, composed, tokenizer, clip, WEIGHTS / "emoji-parti"),
        "emoji-llamagen": lambda: llamagen.LlamaGenTask(SAMPLE, composed, tokenizer, clip),
        "emoji-llamagen-second": lambda: llamagen.LlamaGenTask(SAMPLE, composed, tokenizer, clip, small_llamagen),
        "emoji-control": lambda: controlar.ControlTask(SAMPLE, composed, tokenizer, clip, small_llamagen),
        "emoji-drafter": lambda: drafter.DraftTask(SAMPLE, composed, tokenizer, clip, small_llamagen),
        "emoji-xar": lambda: xar.XARTask(SAMPLE, composed, small_vae, clip),
        "emoji-flextok": lambda: flextok.FlexTokTask(SAMPLE, composed, small_vae, clip),
        "emoji-flextok-ar": lambda: flexar.FlexARTask(SAMPLE, composed, small_vae, small_flextok, clip),
        "emoji-seed-encoder": lambda: seed_encoder.EncoderTask(SAMPLE),
        "emoji-seed-contrastive": lambda: seed.SeedContrastiveTask(SAMPLE, composed, small_seed / "vision", clip),
        "emoji-seed": lambda: seed.SeedTask(SAMPLE, composed, small_seed, clip, SCHEDULE.steps),
        "emoji-seed-decoder": lambda: unclip.UnCLIPTask(SAMPLE, composed, small_seed, small_vae, clip),
        "emoji-seed-lm": lambda: seed_lm.SeedLMTask(SAMPLE, composed, small_seed, clip),
        "emoji-seed-lm-second": lambda: seed_lm.SeedLMTask(
            SAMPLE, composed, small_seed, clip, WEIGHTS / "emoji-seed-lm"
        ),
        "emoji-sd": lambda: sd.StableDiffusionTask(SAMPLE, composed, small_vae, clip),
        "emoji-sd-second": lambda: sd.StableDiffusionTask(
            SAMPLE, composed, WEIGHTS / "emoji-vae", clip, WEIGHTS / "emoji-sd"
        ),
        "emoji-sd-third": lambda: sd.ThirdStableDiffusionTask(
            SAMPLE, composed, WEIGHTS / "emoji-vae", clip, WEIGHTS / "emoji-sd"
        ),
        "emoji-counter": lambda: counter.CounterTask(SAMPLE, composed),
        "emoji-judge": lambda: JudgeTask(SAMPLE, composed, tokenizer),
    }[request.param]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def test_a_stopped_run_goes_on_as_if_it_had_not_been(task, tmp_path):
    for steps, out in ((None, "straight"), (2, "stopped"), (None, "stopped")):
        torch.manual_seed(0)
        scores = train(task(), SCHEDULE, tmp_path / out, steps=steps)
    assert scores
    assert all(value == value for value in scores.values())
    straight, stopped = (weights(tmp_path / out / "final") for out in ("straight", "stopped"))
    assert straight.keys() == stopped.keys()
    for key, value in straight.items():
        assert torch.equal(value, stopped[key]), key
    log = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4]
    assert (tmp_path / "straight" / "sample-000004.png").exists()


def test_the_decoder_recipe_keeps_the_meaning_of_the_ids(tmp_path):
    train(DecoderTask(SAMPLE, WEIGHTS / "emoji-vitvqgan", WEIGHTS / "emoji-judge", total=1), SCHEDULE, tmp_path / "out")
    before = load_network(ViTVQGAN, WEIGHTS / "emoji-vitvqgan").state_dict()
    after = weights(tmp_path / "out" / "final")
    changed = {key.split(".")[0] for key in after if not torch.equal(before[key].bfloat16(), after[key].bfloat16())}
    assert changed == {"decoder", "post_quant"}


def test_muon_trains_the_hidden_matrices_and_nothing_else():
    network = nn.ModuleDict({"embed": nn.Embedding(5, 4), "hidden": nn.Linear(4, 3), "conv": nn.Conv2d(3, 2, 1)})
    adamw, muon = optimizers_of(network, SCHEDULE)
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(muon, torch.optim.Muon)
    (matrices,) = (group["params"] for group in muon.param_groups)
    assert len(matrices) == 1
    assert matrices[0] is network["hidden"].weight
    assert len(adamw.param_groups[0]["params"]) == 4  # the embedding, a bias, the convolution and its bias


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_muon_in_float32_is_torchs_but_for_rounding(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    schedule = Schedule(steps=4, batch_size=4, learning_rate=0.1, weight_decay=0.1, muon=True)
    weights = []
    for precision in ("bf16", "fp32"):
        network = nn.Linear(*shape[::-1], bias=False)
        network.weight.data.copy_(start)
        muon = optimizers_of(nn.Sequential(network, nn.LayerNorm(2)), schedule, precision)[1]
        for number in range(3):
            network.weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            muon.step()
        weights.append(network.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], atol=0.01, rtol=0.01)
    assert (weights[0] - start).abs().mean() > 0.05


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_a_training_takes_the_fast_precision_and_keeps_it(tmp_path, monkeypatch, capsys, dtype, precision):
    monkeypatch.setattr("argen.train.loop.fast_dtype", lambda device: dtype)
    train(ViTVQGANTask(SAMPLE, SCHEDULE.steps), SCHEDULE, tmp_path / "out", steps=1)
    assert f"out: training in {precision} on cpu" in capsys.readouterr().out
    recipe = json.loads((tmp_path / "out/checkpoint/recipe.json").read_text())
    assert recipe["precision"] == precision
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    monkeypatch.setattr("argen.train.loop.fast_dtype", lambda device: other)  # it goes on on another machine
    train(ViTVQGANTask(SAMPLE, SCHEDULE.steps), SCHEDULE, tmp_path / "out", steps=2)
    assert f"out: training in {precision} on cpu" in capsys.readouterr().out


def test_a_folder_of_another_training_is_left_alone(tmp_path):
    train(ViTVQGANTask(SAMPLE, SCHEDULE.steps), SCHEDULE, tmp_path / "out", steps=1)
    with pytest.raises(ValueError, match=r"other settings \(seed was 0 and is 1\)"):
        train(ViTVQGANTask(SAMPLE, SCHEDULE.steps), SCHEDULE, tmp_path / "out", seed=1)


def test_the_use_of_codes_is_kept_with_the_checkpoint(tmp_path):
    """Else the first step after a stop would revive codes that are alive."""
    tasks = [ViTVQGANTask(SAMPLE, SCHEDULE.steps) for _ in range(2)]
    for steps, task in zip((2, 3), tasks, strict=True):
        train(task, SCHEDULE, tmp_path / "out", steps=steps)
    assert tasks[0].usage.count.sum() == 1 * 4 * 64  # the first step revives and counts anew
    assert tasks[1].usage.count.sum() == 2 * 4 * 64


def test_dead_codes_are_revived():
    task = ViTVQGANTask(SAMPLE, total=1000)
    model = task.networks["model"]
    images = task.batch(8, torch.Generator().manual_seed(0))["pixels"]
    codes = model.quantizer.embedding.weight
    before = codes.detach().clone()
    task.usage.count[:] = 5
    task.usage.count[:100] = 0
    task._revive(torch.full((8, 64), 3000), images, step=50)
    assert (codes[:100] != before[:100]).any(dim=1).all()
    assert torch.equal(codes[100:], before[100:])
    torch.testing.assert_close(codes[:100].norm(dim=1), torch.ones(100))


def test_codes_move_to_the_vectors_they_serve():
    task = ViTVQGANTask(SAMPLE, total=1000)
    before = refit_codes(task.networks["model"], task.train, rounds=0)
    after = refit_codes(task.networks["model"], task.train, rounds=5)
    assert after > before + 0.01
    assert refit_codes(task.networks["model"], task.train, rounds=0) == pytest.approx(
        after
    )  # what was measured is in place


def test_a_caption_describes_every_image_it_fits():
    captions = ["a red apple, noto style", "a red apple", "a pizza, flat style", "an apple, flat style"]
    keys = [("red apple", "noto"), ("red apple", "flat"), ("pizza", "flat"), ("red apple", "flat")]
    assert positives(captions, keys).tolist() == [
        [True, False, False, False],
        [True, True, False, True],
        [False, False, True, False],
        [False, True, False, True],
    ]


def test_the_straight_through_gradient_reaches_the_encoder():
    model = ViTVQGAN(
        32, 8, *[{"dim": 32, "depth": 1, "heads": 1, "dim_head": 32, "mlp_dim": 32}] * 2, embed_dim=8, n_embed=16
    )
    decoded, loss, _ = model(torch.rand(2, 3, 32, 32))
    (decoded.square().mean() + loss).backward()
    assert model.encoder.to_patch_embedding[0].weight.grad.abs().sum() > 0
    assert model.quantizer.embedding.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_codes_are_learnt_from_an_encoder_that_names(composed, tmp_path):
    Seed(**seed.SIZES).save_pretrained(tmp_path)
    ConvEncoder().save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="cannot name anything: give what emoji-seed-contrastive has saved"):
        seed.SeedTask(SAMPLE, composed, tmp_path, WEIGHTS / "emoji-clip", SCHEDULE.steps)


def test_parti_does_not_look_ahead():
    model = Parti(text_dim=16, n_embed=32, grid=4, dim=32, decoder_depth=2, heads=2, mlp_dim=32).eval()
    states, mask = torch.randn(1, 5, 16), torch.ones(1, 5, dtype=torch.bool)
    tokens = torch.randint(32, (1, 16))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 32
    before, after = model(states, mask, tokens), model(states, mask, changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().max() > 1e-3
    mask[:, 3:] = False
    masked = model(states, mask, tokens)
    states[:, 3:] = 9.0
    torch.testing.assert_close(model(states, mask, tokens), masked)  # padding is not read


def test_shaped_images_and_their_tokens_are_two_halves(composed, small_llamagen, monkeypatch):
    monkeypatch.setattr(controlar, "SHAPED", 3)
    parts = WEIGHTS / "emoji-vitvqgan", WEIGHTS / "emoji-clip"
    task = controlar.ControlTask(SAMPLE, composed, *parts, small_llamagen)
    for across, (captions, images, tokens) in zip((True, False), task.shaped, strict=True):
        assert images.shape == ((3, 128, 256, 3) if across else (3, 256, 128, 3))
        assert tokens.shape == (3, 32)
        assert all(" and " in caption for caption in captions)
        halves = images.split(128, dim=2 if across else 1)
        assert all((half < 200).any() for half in halves)
    monkeypatch.setattr(controlar, "SHAPED_SHARE", 1.0)
    batch = task.batch(2, torch.Generator().manual_seed(0))
    assert batch["control"].shape[-2:] in [(64, 128), (128, 64)]
    losses = [loss for _, loss in task.losses(batch, 0, {})]
    assert losses[0].isfinite()


def test_a_training_goes_on_with_its_own_x_alone(composed, small_vae, tmp_path):
    def task(x: str):
        return xar.XARTask(SAMPLE, composed, small_vae, WEIGHTS / "emoji-clip", x)

    train(task("subsample-2"), SCHEDULE, tmp_path / "out", steps=1)
    with pytest.raises(ValueError, match=r"other settings \(x was subsample-2 and is cell-4\)"):
        train(task("cell-4"), SCHEDULE, tmp_path / "out")
    for x in ("cell", "cell-x"):
        with pytest.raises(ValueError, match=f"unknown X '{x}': expected a kind and a size"):
            task(x)
    for x, wanted in (("row-4", "unknown kind of X"), ("cell-3", "expected a divisor of 8")):
        with pytest.raises(ValueError, match=wanted):
            task(x)


def test_a_registered_recipe_is_trained(composed, tmp_path, capsys, monkeypatch):
    schedules = {"cpu": SCHEDULE, "gpu": SCHEDULE}
    monkeypatch.setitem(recipes.added, "tiny-counter", Recipe(counter.CounterTask, schedules, ("scenes",)))
    command = ["train", "tiny-counter", "--data", str(SAMPLE), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "the recipe tiny-counter needs scenes too" in capsys.readouterr().err
    assert main([*command, "--scenes", str(composed)]) == 0
    assert (tmp_path / "out/final/config.json").is_file()
    assert main(["train", "emoji-part", *command[2:]]) == 2
    assert "did you mean emoji-parti" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "part", "message"),
    [
        (
            "emoji-drafter",
            ("generator", "emoji-parti"),
            "class Parti: expected a trained emoji-llamagen, of the class LlamaGen",
        ),
        (
            "emoji-xar",
            ("vae", "emoji-flextok"),
            "class FlexTok: expected a trained emoji-vae, of the class AutoencoderKL",
        ),
        ("emoji-parti", ("tokenizer", "emoji-flextok"), "class FlexTok: expected a trained emoji-vitvqgan"),
        ("emoji-parti", ("tokenizer", "emoji-clip"), "class CLIPModel: expected a trained emoji-vitvqgan"),
    ],
)
def test_a_part_of_another_kind_is_refused(recipe, part, message, composed, tmp_path, capsys):
    name, model = part
    command = ["train", recipe, "--data", str(SAMPLE), "--scenes", str(composed), "--out", str(tmp_path / "out")]
    assert main([*command, f"--{name}", str(WEIGHTS / model)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data": "scenes"},
            "--data {scenes} holds no images of this kind: expected a folder made by `argen data emoji`",
        ),
        (
            {"scenes": "data"},
            "--scenes {data} holds no images of this kind: expected a folder made by `argen data scenes`",
        ),
        ({"data": "nothing"}, "--data {nothing} holds no images of this kind"),
        ({"data": "broken"}, "cannot be read"),
        ({"seed": "-1"}, "seed is -1: expected 0 to 2,147,483,647"),
        ({}, "the images are too few for a batch of 128"),
    ],
)
def test_sets_and_numbers_that_do_not_fit_are_refused(options, message, composed, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken/data").mkdir(parents=True)
    (tmp_path / "broken/data/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    folders = {"data": SAMPLE, "scenes": composed, "nothing": tmp_path / "nothing", "broken": tmp_path / "broken"}
    chosen = {"data": "data", "scenes": "scenes"} | options
    texts = {name: str(folders.get(value, value)) for name, value in chosen.items()}
    command = ["train", "emoji-judge", "--out", str(tmp_path / "out")]
    assert main([*command, *(word for name, value in texts.items() for word in (f"--{name}", value))]) == 2
    error = capsys.readouterr().err
    assert message.format(**folders) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
