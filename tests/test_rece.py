"""RECE and UCE against the official code's numbers."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import published_keys, shapes, tiny_pipeline
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from argen.diffusion.rece import RECORD, ConceptErasure, Edit, derive, last_words, matrices_of
from argen.files import delete_unfinished_folders

KINDS = {
    "regzero": "zero",
    "standardreg": "target",
    "surrogatereg_1st": "surrogate-1st",
    "surrogatereg_2nd": "surrogate-2nd",
    "surrogatereg_both": "surrogate-both",
}


def originals(case) -> dict[str, torch.Tensor]:
    """The matrices of a case, in the authors' order."""
    unet = UNet2DConditionModel(**case.config["components"]["unet"])
    unet.load_state_dict({key[5:]: value for key, value in case.weights.items() if key.startswith("unet.")})
    return {name: weight.detach() for name, weight in matrices_of(unet).items()}


@torch.no_grad()
def read(case, name: str) -> torch.Tensor:
    """States of texts in float64."""
    encoder = CLIPTextModel(CLIPTextConfig(**case.config["components"]["text_encoder"])).double().eval()
    prefix = "text_encoder.text_model."
    state = {key.removeprefix(prefix): value.double() for key, value in case.weights.items() if key.startswith(prefix)}
    encoder.load_state_dict(state, strict=False)
    return encoder(case.io[f"{name}_ids"])[0]


def lengths(io, index: int) -> tuple[int, int]:
    """Tokens of a concept and of its target; a blank has a start and an end."""
    new = io.get("new_attention_mask")
    return int(io["concept_attention_mask"][index].sum()), 2 if new is None else int(new[index].sum())


def near(weights, io, prefix, **close):
    wanted = {key.removeprefix(prefix): value for key, value in io.items() if key.startswith(prefix) and "attn2" in key}
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name].to(value.dtype), value, **close)


@pytest.mark.parametrize(
    ("prefix", "close"), [("", {"atol": 2e-3, "rtol": 0}), ("fp64.", {"atol": 1e-9, "rtol": 1e-9})]
)
def test_an_object_is_erased_in_three_epochs(golden, prefix, close):
    case = golden("rece/sd14_single")
    io, config = case.io, case.config
    precise, names = prefix == "fp64.", ("concept", "new", "retain")
    states = {name: read(case, name) if precise else io[f"{name}_embeds"] for name in names}
    first = {key: config["uce"][key] for key in ("lamb", "erase_scale", "preserve_scale", "technique")}
    later = {key: config["rece"][key] for key in first}
    start = originals(case)
    edited = Edit(**first)(
        start, [last_words(states["concept"][0], states["new"][0], lengths(io, 0))], states["retain"]
    )
    near(edited, io, f"{prefix}uce.", **close)
    for epoch in range(config["rece"]["epochs"]):
        derived = derive(edited, start, states["concept"][0], config["rece"]["regular_scale"])
        bounds = close if precise else {"atol": 5e-3, "rtol": 0}
        wanted = io[f"{prefix}epoch{epoch}.adv_embeds"][0]
        torch.testing.assert_close(derived.to(wanted.dtype), wanted, **bounds)
        edited = Edit(**later)(edited, [(derived, states["new"][0])], states["new"])  # " " is what is retained, too
        near(edited, io, f"{prefix}epoch{epoch}.", **close)


def test_two_concepts_techniques_and_regularisers(golden):
    case = golden("rece/variants_two_concepts")
    io, config = case.io, case.config
    start, close = originals(case), {"atol": 1e-3, "rtol": 0}
    concepts, targets, retained = (io[f"{name}_embeds"] for name in ("concept", "new", "retain"))
    pairs = [last_words(concepts[index], targets[index], lengths(io, index)) for index in range(2)]
    scales = {key: config["uce"][key] for key in ("lamb", "erase_scale", "preserve_scale")}
    replaced = Edit(**scales)(start, pairs, retained)
    near(replaced, io, "uce_replace.", **close)
    near(Edit(**scales, technique="tensor")(start, pairs, retained), io, "uce_tensor.", **close)
    derived = []
    for official, ours in KINDS.items():
        for index in range(2):
            arguments = config["regular_scale"], ours, io["old_target_embeds"][index]
            states, wanted = derive(replaced, start, concepts[index], *arguments), io[f"adv.{official}.{index}"]
            torch.testing.assert_close(states.float(), wanted, atol=1e-3 * wanted.abs().max().item(), rtol=0)
            derived += [states] if ours == "zero" else []
    later = {key: config["rece"][key] for key in (*scales, "technique")}
    kept = [retained[config["retain"].index(text)] for text in config["rece"]["retain"]]
    near(Edit(**later)(replaced, list(zip(derived, targets, strict=True)), kept), io, "rece_tensor.", **close)


def test_an_unknown_technique_is_refused():
    with pytest.raises(ValueError, match="unknown technique 'add': expected replace or tensor"):
        Edit(technique="add")


def test_a_pipeline_forgets_and_is_restored(golden, tmp_path):
    case = golden("rece/sd14_single")
    pipe, io, config = tiny_pipeline(case), case.io, case.config
    kwargs = {"num_inference_steps": config["steps"], "guidance_scale": 7.5, "output_type": "latent"}

    def drawn(one=pipe):
        return one(config["prompt"], latents=io["latents_init"], **kwargs).images

    close = {"atol": 3e-2, "rtol": 0}
    torch.testing.assert_close(drawn(), io["latents_original"], **close)
    erasure = ConceptErasure(pipe)
    (only,) = erasure.erase(config["concepts"], epochs=0)
    assert only.stage == "UCE"
    assert only.change > 0
    torch.testing.assert_close(drawn(), io["latents_uce"], **close)
    stages = erasure.erase(config["concepts"], epochs=3, scale=config["rece"]["regular_scale"])
    torch.testing.assert_close(drawn(), io["latents_rece"], **close)
    assert [stage.stage for stage in stages] == ["UCE", "RECE 1", "RECE 2", "RECE 3"]
    assert all(len(stage.derived) == 1 for stage in stages[1:])
    erasure.save(tmp_path / "clean")
    assert [path.name for path in tmp_path.iterdir()] == ["clean"]
    assert json.loads((tmp_path / "clean" / RECORD).read_text())["concepts"] == ["church"]
    with pytest.raises(ValueError, match="clean is there already"):
        erasure.save(tmp_path / "clean")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "clean", safety_checker=None)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn(again), drawn())
    erasure.restore()
    for name, weight in matrices_of(pipe.unet).items():
        assert torch.equal(weight, case.weights[f"unet.{name}"])
    stages = erasure.stages(["church", "a red house"], "nudity")
    next(stages)
    stages.close()  # cancelled: nothing has changed
    torch.testing.assert_close(drawn(), io["latents_original"], **close)


def test_released_unets_have_the_keys_of_diffusers():
    """Those of RECE are Stable Diffusion 1.4's, whose configuration is the default but for the text's width and the sample."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    published = published_keys("rece")
    for name in ("nudity", "unsafe", "church", "parachute"):
        assert shapes(unet) == published[name]
    assert {key for key in published["nudity"] if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))} == set(
        matrices_of(unet)
    )


def test_an_edited_unet_is_loaded(golden, tmp_path):
    pipe = tiny_pipeline(golden("rece/sd14_single"))
    erasure = ConceptErasure(pipe)
    erasure.erase(["church"])
    state = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    edited = {name: state[name] for name in erasure.originals}
    erasure.restore()
    for wrapped in (state, {"state_dict": state}):
        torch.save(wrapped, tmp_path / "church_ep1.pt")
        erasure.restore()
        erasure.load(tmp_path / "church_ep1.pt")
        assert all(torch.equal(weight, edited[name]) for name, weight in matrices_of(pipe.unet).items())
    assert erasure.record["loaded"] == "church_ep1.pt"
    torch.save(state | {"conv_in.bias": state["conv_in.bias"] + 1}, tmp_path / "other.pt")
    torch.save({name: state[name] for name in list(state)[1:]}, tmp_path / "part.pt")
    erasure.restore()
    for file, wanted in (("other.pt", "differs from this pipeline in conv_in.bias, too"), ("part.pt", "does not fit")):
        with pytest.raises(ValueError, match=wanted):
            erasure.load(tmp_path / file)
    assert all(torch.equal(weight, erasure.originals[name]) for name, weight in matrices_of(pipe.unet).items())


def test_sdxl_forgets_too(golden):
    pipe = tiny_pipeline(golden("tome/sdxl_attribute_binding"))
    before = {name: weight.clone() for name, weight in matrices_of(pipe.unet).items()}
    erasure = ConceptErasure(pipe)
    erasure.erase(["teapot"], targets=["dog"], retained=["a blue bird"])
    after = matrices_of(pipe.unet)
    assert all((after[name] - weight).abs().max() > 1e-4 for name, weight in before.items())
    states = erasure.read(["teapot", "dog", "a blue bird"])
    first, other = (erasure.length(text) - 2 for text in ("teapot", "dog"))
    name = next(iter(before))
    source, wanted, kept = (states[0, first], states[1, other], states[2, 3])
    apart = [
        (after[name].double() @ source - before[name].double() @ wanted).norm(),
        (before[name].double() @ source - before[name].double() @ wanted).norm(),
    ]
    assert apart[0] < 0.7 * apart[1]
    moved = (after[name].double() @ kept - before[name].double() @ kept).norm()
    assert moved < 0.5 * (before[name].double() @ kept).norm()


def test_what_cannot_be_erased_is_refused(golden):
    with pytest.raises(ValueError, match="nothing can be erased from str: expected a StableDiffusionPipeline"):
        ConceptErasure("pipe")
    erasure = ConceptErasure(tiny_pipeline(golden("rece/sd14_single")))
    for arguments, wanted in (
        (([],), "no concept to erase"),
        (([" "],), "no concept to erase"),
        ((["church"], "style"), "unknown preset 'style': expected one of object, object-hard, art, nudity, unsafe"),
        ((["church"], "object", ["a", "b"]), "2 targets for 1 concepts"),
        ((["church"], "object", None, (), -1), "epochs is -1"),
    ):
        with pytest.raises(ValueError, match=wanted):
            erasure.erase(*arguments)
    assert erasure.record is None


def test_a_save_that_was_killed_leaves_nothing_beside_the_next(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    dead, alive = (tmp_path / f".argen-{id}-abcdefgh" for id in (gone.pid, os.getpid()))
    other = tmp_path / f".out.{gone.pid}.abcdefgh"
    for folder in (dead, alive, other):
        folder.mkdir()
    delete_unfinished_folders(tmp_path)
    assert [folder.exists() for folder in (dead, alive, other)] == [False, True, True]
