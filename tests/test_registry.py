"""Models are asked for by several threads at once: the page's, the queue's worker's."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import argen
from argen.hub.loading import load, load_diffusion, networks_of
from argen.hub.model_cache import ModelCache, size_of

IDS = ("argen/emoji-parti", "argen/emoji-llamagen", "argen/emoji-vitvqgan")


def test_threads_that_load_at_once_all_get_their_weights():
    with ThreadPoolExecutor(3) as pool:
        models = list(pool.map(lambda name: load(name).to("cpu"), IDS * 2))  # fails where a network has no storage
    networks = [part for one in models for part in getattr(one, "components", {"network": one}).values()]
    weights = [weight for part in networks if isinstance(part, torch.nn.Module) for weight in part.parameters()]
    assert len(weights) > 500
    assert {weight.device.type for weight in weights} == {"cpu"}


def test_a_cache_loads_a_model_once():
    model_cache = ModelCache("cpu")
    with ThreadPoolExecutor(3) as pool:
        models = list(pool.map(model_cache, ["argen/emoji-vitvqgan"] * 3))
    assert len({id(one) for one in models}) == 1
    with pytest.raises(ValueError, match="unknown model 'argen/none'"):
        model_cache("argen/none")


def test_the_least_recently_used_models_are_released():
    size = size_of(load("argen/emoji-vitvqgan"))
    cache = ModelCache("cpu", limit=2 * size)
    for name in ("argen/emoji-judge", "argen/emoji-vitvqgan", "argen/emoji-judge", "argen/emoji-vae"):
        cache(name)
    assert list(cache.loaded) == ["argen/emoji-judge", "argen/emoji-vae"]
    cache = ModelCache("cpu", limit=1)
    assert cache("argen/emoji-judge") is cache("argen/emoji-judge")  # one alone stays, however large


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_part_is_loaded_in_float32_and_cast_in_silence(tmp_path, caplog, dtype):
    for model in ("argen/emoji-llamagen", "argen/emoji-sd"):
        pipe = argen.load(model).to(dtype)
        pipe.save_pretrained(tmp_path / model)
        read = load_diffusion if model == "argen/emoji-sd" else argen.load
        for loaded in (argen.load(model), read(tmp_path / model)):
            for network in networks_of(loaded):
                held = (*network.parameters(), *network.buffers())
                assert {tensor.dtype for tensor in held if tensor.is_floating_point()} == {torch.float32}
    assert not [record for record in caplog.records if "float32" in record.getMessage()]
