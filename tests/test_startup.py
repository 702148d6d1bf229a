"""What starting up must not import, each in a process of its own: the modules there are said at the end. How long it takes is measured
by benchmarks/startup.py."""

import gc
import json
import subprocess
import sys
import weakref

import pytest

from argen.cli.main import main
from argen.garbage import uncollected

LIBRARIES = {"torch", "diffusers", "transformers", "numpy", "PIL", "scipy", "pandas", "gradio", "datasets"}
CHILD = """
import contextlib, io, json, sys

with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    exec(sys.argv[1])
print(json.dumps(sorted(sys.modules)))
"""
COMMAND = "from argen.cli.main import main; main({})"
LOAD = "import argen; argen.load({!r})"


def imported(code: str) -> set[str]:
    """The modules that a process has imported after some code, which must say nothing on stderr."""
    done = subprocess.run([sys.executable, "-c", CHILD, code], check=True, capture_output=True, text=True)
    assert not done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "code",
    ["import argen", COMMAND.format(["--help"]), COMMAND.format(["models"]), COMMAND.format(["models", "--help"])],
)
def test_what_lists_and_helps_loads_no_library(code):
    assert not imported(code) & LIBRARIES


def test_the_help_of_a_generation_loads_no_networks():
    modules = imported(COMMAND.format(["generate", "--help"]))
    assert not modules & {"diffusers", "transformers", "scipy", "pandas", "gradio", "datasets"}


def test_a_generation_loads_only_its_own_networks(tmp_path):
    out = tmp_path / "pizza.png"
    code = COMMAND.format(["generate", "a pizza", "-o", str(out), "--json", "--device", "cpu"])
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True
    )
    assert out.is_file(), done.stderr
    modules = set(done.stdout.splitlines()[-1].split())
    assert "argen.pipelines.parti" in modules
    assert not modules & {"gradio", "pandas", "datasets", "fastapi", "uvicorn", "sklearn", "matplotlib", "argen.train"}
    others = {"llamagen", "flexar", "xar", "controlar", "seed_llama", "dalle_mini"}
    assert not modules & {f"argen.pipelines.{name}" for name in others}
    assert not modules & {
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "diffusers.pipelines.pixart_alpha",
        "transformers.models.t5.modeling_t5",
        "transformers.models.llama.modeling_llama",
        "transformers.models.blip_2.modeling_blip_2",
    }


@pytest.mark.parametrize(
    "model", ["argen/emoji-vitvqgan", "argen/emoji-judge", "argen/emoji-counter", "argen/emoji-drafter"]
)
def test_a_network_loads_no_pipelines_and_no_text_encoder(model):
    modules = imported(LOAD.format(model))
    assert not modules & {"diffusers.pipelines", "diffusers.models.autoencoders", "diffusers.schedulers"}
    assert not modules & {"transformers.modeling_utils", "scipy"}


def test_the_vae_loads_no_diffusion_pipeline():
    modules = imported(LOAD.format("argen/emoji-vae"))
    assert not modules & {
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "tokenizers_img.seed.tokenizer",
    }


def test_the_collector_is_as_it_was(capsys):
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="broken"), uncollected():
        raise ValueError("broken")
    with pytest.raises(SystemExit):  # of argparse, while it is off
        main(["generate", "--nonsense"])
    assert gc.isenabled()


def test_what_was_made_meanwhile_can_be_collected():
    class Ring:
        def __init__(self):
            self.me = self

    with uncollected():
        gone = weakref.ref(Ring())
        assert gone() is not None
    gc.collect()
    assert gone() is None
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        with uncollected():
            pass
        assert gc.get_freeze_count()  # of a program that keeps some out of all searches
    finally:
        gc.unfreeze()
