"""What counts for the count token: the adapters of published counters, and those that ship."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

from argen.diffusion.count_token import read_token
from argen.diffusion.counters import Detected, components
from argen.models.clip_count import CLIPCount, from_transformers
from argen.models.counter import Counter
from argen.words import parse_count


def test_a_clip_of_transformers_becomes_one_of_openai():
    """The picture's features of CLIP-Count's CLIP, with its prompts out of the way, are those of transformers."""
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    text |= {"vocab_size": 99, "max_position_embeddings": 12, "eos_token_id": 98}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision |= {"patch_size": 16, "image_size": 224}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).eval()
    sizes = {"dim": 64, "vision_dim": 64, "vision_depth": 2, "length": 12, "vocab": 99, "text_heads": 1}
    ours = CLIPCount(**sizes, text_depth=2, heads=1, hidden=64, groups=1, context=0, prompts=0, prompt_depth=1).eval()
    ours.clip.load_state_dict(from_transformers(clip))

    ids = torch.tensor([[1, 5, 7, 98, 0, 0]]).expand(1, -1)
    ids = torch.nn.functional.pad(ids, (0, 6))
    with torch.no_grad():
        expected = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
        torch.testing.assert_close(ours.encode_text(ids)[:, 0], expected, atol=1e-5, rtol=1e-4)
        pixels = torch.rand(1, 3, 224, 224)
        seen = clip.vision_model((pixels - ours.mean) / ours.std).last_hidden_state[:, 1:]
        ours.img_encoder.vpt_norm = torch.nn.Identity()
        torch.testing.assert_close(ours.encode_patches(pixels), seen, atol=1e-4, rtol=1e-3)


@pytest.fixture
def detector():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    names = {0: "apple", 1: "person", 2: "knife"}
    config = YolosConfig(**sizes, image_size=[32, 32], num_detection_tokens=5, id2label=names)
    size = {"shortest_edge": 32, "longest_edge": 32}
    return Detected(YolosForObjectDetection(config), YolosImageProcessorPil(size=size), threshold=0.2)


def test_a_detector_knows_things_by_their_plural(detector):
    labels = [detector.label(things) for things in ("apples", "red apples", "people", "Knives", "pineapples", "pears")]
    assert labels == [0, 0, 1, 2, None, None]
    assert detector(torch.rand(1, 3, 40, 60), "apples") in range(6)
    with pytest.raises(ValueError, match="does not know 'pears': leave it out, or ask for one of apple, knife, person"):
        detector(torch.rand(1, 3, 40, 60), "pears")


def test_detectors_are_saved_and_read(detector, tmp_path):
    detector.model.save_pretrained(tmp_path)
    detector.processor.save_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    again = Detected.from_hub(str(tmp_path), threshold=0.2)
    assert again(pixels, "people") == detector(pixels, "people")


def test_connected_things_are_counted():
    pixels = torch.ones(1, 3, 128, 128)
    assert components(pixels, "squares") == 0
    for left in (10, 50, 90):
        pixels[:, :, 20:40, left : left + 20] = 0.3
    assert components(pixels, "squares") == 3


def test_a_counter_has_gradients():
    counter, pixels = Counter(), torch.rand(2, 3, 224, 224, requires_grad=True)
    density = counter(pixels)
    assert density.shape == (2, 28, 28)
    density.sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_prompts_say_how_many():
    assert parse_count("five apples") == (5, "apples")
    assert parse_count("12 red apples") == (12, "red apples")
    assert parse_count("Twenty-five cats") == (25, "cats")
    for prompt in ("apples", "five", "some apples"):
        with pytest.raises(ValueError, match="does not say how many of what"):
            parse_count(prompt)
    for prompt in ("zero apples", "26 apples"):
        with pytest.raises(ValueError, match="expected a whole number from 1 to 25"):
            parse_count(prompt)


def test_the_tokens_of_the_authors_are_read(tmp_path):
    torch.save(torch.arange(4.0), tmp_path / "token_embeds.pt")
    vector, notes = read_token(tmp_path / "token_embeds.pt")
    assert vector.tolist() == [0, 1, 2, 3]
    assert notes == {}
    (tmp_path / "bad.safetensors").write_text("x")
    with pytest.raises(ValueError, match="holds no token"):
        read_token(tmp_path / "bad.safetensors")
