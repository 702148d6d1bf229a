"""What Python users give to argen and to its pipelines by habit or by mistake: one line that says what to use."""

import subprocess
import sys

import pytest
import torch
from conftest import tiny_pipeline

import argen
from argen.cli.main import main
from argen.jobs.access import ModelAccess

SHIPPED = (
    "argen/emoji-parti",
    "argen/emoji-xar",
    "argen/emoji-flextok-ar",
    "argen/emoji-seed-lm",
    "argen/emoji-llamagen",
)


@pytest.fixture(scope="module", params=SHIPPED)
def any_pipe(request):
    return argen.load(request.param)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "prompt is None: expected a text, or a list"),
        ({"prompt": []}, r"prompt is \[\]: expected a text, or a list"),
        ({"prompt": ["a", 3]}, "prompt is .*: expected a text, or a list"),
        ({"guidance_scale": "7.5"}, "guidance_scale is '7.5': expected a number, 0 to 100"),
        ({"guidance_scale": -1}, "guidance_scale is -1: expected 0 to 100"),
        ({"temperature": [1]}, r"temperature is \[1\]: expected a number"),
        ({"top_k": 1.5}, "top_k is 1.5: expected a whole number"),
        ({"top_p": "1"}, "top_p is '1': expected a number"),
        ({"generator": 3}, "generator is 3: expected torch.Generator"),
        ({"generator": [3]}, "generator is 3: expected torch.Generator"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt is 1.5: expected a whole number"),
        ({"num_images_per_prompt": "2"}, "num_images_per_prompt is '2': expected a whole number"),
        ({"num_candidates": True}, "num_candidates is True: expected a whole number"),
        ({"num_tokens": "5"}, "num_tokens is 5"),
        ({"tokens": [[1]]}, "tokens are a list: expected a tensor"),
        ({"size": 128}, "size is 128: expected .width, height."),
        ({"callback_on_step_end": 1}, "callback_on_step_end is 1: expected a function"),
        ({"output_type": 3}, "unknown output_type 3"),
        ({"sampler": 3}, "sampler is 3: expected a name"),
        ({"control_image": "apple.png"}, "control_image is 'apple.png': expected an image"),
        ({"seed": 1}, "seed is not an argument of .*generator=torch.Generator"),
        ({"steps": 4}, "steps is not an argument of .*sampler='sde:steps=40'"),
        ({"num_images": 2}, "num_images is not an argument of .*num_images_per_prompt"),
        ({"callback": print}, "callback is not an argument of .*callback_on_step_end"),
        ({"num_beams": 2}, "num_beams is not an argument of .*search"),
        ({"prompt_embeds": 1}, "prompt_embeds is not an argument of .*give prompt"),
        ({"guidance_rescale": 0.7}, "guidance_rescale is not an argument of .*leave it out"),
        ({"guidance_scal": 3}, "guidance_scal is not an argument of .*did you mean guidance_scale"),
    ],
)
def test_a_call_refuses_in_one_line(any_pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        any_pipe(**{"prompt": "a pizza"} | arguments)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_and_torch_are_numbers(pipe):
    import numpy as np

    pipe("a pizza", guidance_scale=np.float32(2), temperature=torch.tensor(1.0), top_k=np.int64(5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"torch_dtype": torch.bfloat16},
            "torch_dtype is not an argument of argen.load: give dtype, e.g. dtype='bf16'",
        ),
        ({"variant": "fp16"}, "variant is not an argument of argen.load: .*leave it out"),
        ({"use_safetensors": True}, "use_safetensors is not an argument of argen.load"),
        ({"device_map": "auto"}, "device_map is not an argument of argen.load: give device"),
        ({"tokeniser": "x"}, "tokeniser is not an argument of argen.load: .*did you mean tokenizer"),
    ],
)
def test_load_refuses_the_arguments_of_others(arguments, message):
    with pytest.raises(ValueError, match=message):
        argen.load("argen/emoji-parti", **arguments)


def test_an_unknown_kind_of_models_is_refused():
    with pytest.raises(ValueError, match="unknown kind 'generators': expected one of .*did you mean generator"):
        argen.list_models("generators")


def test_from_pretrained_of_an_id_names_load(any_pipe):
    with pytest.raises(ValueError, match=r"use argen.load\('argen/emoji-parti'\)"):
        type(any_pipe).from_pretrained("argen/emoji-parti")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_gpu_that_is_not_here_is_one_line(any_pipe):
    for call in (lambda: any_pipe.to("cuda"), lambda: any_pipe.to(device="cuda")):
        with pytest.raises(ValueError, match="device 'cuda' cannot be used here"):
            call()
    with pytest.raises(ValueError, match="device 'cuda' cannot be used here"):
        argen.load("argen/emoji-vitvqgan", device="cuda")
    for method in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        with pytest.raises(ValueError, match=f"{method} spares the memory of a GPU, and there is none here"):
            getattr(any_pipe, method)()
    assert any_pipe.to("cpu", torch.float32).device.type == "cpu"


def test_only_public_names_are_listed():
    assert [name for name in dir(argen) if not name.startswith("__")] == ["Request", "list_models", "load", "register"]
    assert argen.Request("a pizza").prompt == "a pizza"


def test_a_diffusion_pipeline_says_what_draws_with_it(golden, tmp_path, capsys):
    folder = tmp_path / "clean"
    tiny_pipeline(golden("tome/sdxl_attribute_binding")).save_pretrained(folder)
    for model in (str(folder), "argen/emoji-sd"):
        assert main(["generate", "a pizza", "--model", model, "-o", str(tmp_path / "a.png")]) == 2
        error = capsys.readouterr().err
        assert "is a diffusion pipeline, expected a generator" in error
        assert f"argen bind PROMPT --model {model}" in error
    with pytest.raises(ValueError, match="is a diffusion pipeline, expected a generator"):
        ModelAccess(argen.load, [tmp_path])(str(folder))
    assert type(argen.load(folder)).__name__ == "StableDiffusionXLPipeline"


@pytest.mark.slow
def test_an_annotated_pipeline_has_types(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "typed.py").write_text(
        "import argen\nfrom argen.pipelines.base import TokenPipeline\n"
        "typed: TokenPipeline = argen.load('argen/emoji-parti')\n"
        "typed.to('cpu').set_progress_bar_config(disable=True)\n"
        "typed('a taxi', num_images_per_prompt=2).images[0].save('taxi.png')\n"
        "typed('a taxi', output_type='pt').images.mean()\n"
        "typed.edit('a taxi', typed('a taxi').images[0]).images[0].save('taxi.png')\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "typed.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
