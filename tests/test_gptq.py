"""GPTQ, RSQ's token weights and rotation against the official code's numbers."""

import json

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from argen.models.gptq import Levels, gptq, hessian, importance, inverse_factor, token_weights
from argen.models.rotation import hadamard, random_rotation, rotate
from tokenizers_img.checkpoint import load_strict

RUNS = json.loads((GOLDEN / "quantization/gptq_linear/config.json").read_text())["runs"]


@pytest.fixture
def linear(golden):
    return golden("quantization/gptq_linear")


def rounded_as(run: dict, io: dict[str, Tensor]):
    """What ours makes of a run of the golden case: integers and scales, or both None, and the weights."""
    levels = Levels(run["bits"], run["symmetric"], run["clip"])
    if run.get("rtn"):
        scale, zero = levels.find(io["weight"])
        integers = levels.round(io["weight"], scale, zero)
        return integers, scale, levels.values(integers, scale, zero)
    matrix = io["hessian_scaled" if run["scaled"] else "hessian"]
    group = max(0, run["group_size"])
    rounded = gptq(io["weight"], matrix, levels, group, run["act_order"])
    return rounded.integers, rounded.scales, rounded.dequantized()


def relative_error(weight: Tensor, io: dict[str, Tensor], weights: Tensor) -> float:
    outputs = io["inputs"] @ io["weight"].T
    error = (io["inputs"] @ weight.T - outputs).square().mean(dim=2)
    return ((weights * error).mean() / outputs.square().mean()).item()


def test_hessian_and_importance_are_official(linear):
    io = linear.io
    columns = io["attention"].sum(dim=(1, 2))
    torch.testing.assert_close(importance(columns), io["importance"], rtol=1e-4, atol=1e-6)
    scale = 2 / len(io["inputs"])
    torch.testing.assert_close(scale * hessian(io["inputs"]), io["hessian"], rtol=1e-4, atol=1e-4)
    weighted = scale * hessian(io["inputs"], token_weights(columns))
    torch.testing.assert_close(weighted, io["hessian_scaled"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_rounding_is_official(linear, name):
    run, io = linear.config["runs"][name], linear.io
    integers, scales, weight = rounded_as(run, io)
    official = io[f"{name}/dequantized"]
    if f"{name}/integers" in io:
        torch.testing.assert_close(scales, io[f"{name}/scale"], rtol=1e-6, atol=0)
        different = integers != io[f"{name}/integers"]
        assert different.float().mean() < 0.005
        assert (integers - io[f"{name}/integers"]).abs().max() <= 1
    assert ((weight - official).abs() > 1e-5).float().mean() < 0.005
    equal, r = torch.ones_like(io["importance"]), io["importance"]
    for key, weights in (("relative_error", equal), ("relative_error_weighted", r / r.mean(dim=1, keepdim=True))):
        assert relative_error(weight, io, weights) == pytest.approx(run[key], rel=0.02)


def test_the_methods_rank_as_published(linear):
    io, errors = linear.io, {}
    for name in ("w3_rtn_clip", "w3_gptq", "w3_rsq"):
        weight = rounded_as(linear.config["runs"][name], io)[2]
        errors[name] = relative_error(weight, io, token_weights(io["attention"].sum(dim=(1, 2))))
    assert errors["w3_rsq"] < 0.9 * errors["w3_gptq"] < 0.9 * errors["w3_rtn_clip"]


@pytest.mark.parametrize("bits", [3, 8])
def test_blocks_of_columns_change_nothing(linear, bits):
    """Bit by bit what the method is defined as, one column after the other."""
    io, levels = linear.io, Levels(bits, clip=True)
    weight, factor = io["weight"].clone(), inverse_factor(io["hessian"])
    scale, zero = levels.find(weight)
    for column in range(weight.shape[1]):
        before = weight[:, column : column + 1].clone()
        rounded = levels.values(levels.round(before, scale, zero), scale, zero)
        weight[:, column:] -= (before - rounded) / factor[column, column] * factor[column, column:]
        weight[:, column : column + 1] = rounded
    assert torch.equal(gptq(io["weight"], io["hessian"], levels).dequantized(), weight)


def test_columns_that_are_always_zero_do_not_matter():
    torch.manual_seed(0)
    weight, x = torch.randn(8, 16), torch.randn(100, 16)
    x[:, 3] = 0
    x[:, 5] = x[:, 4]  # no inverse without damping
    rounded = gptq(weight, hessian(x), Levels(4, clip=True), group=8)
    assert (rounded.integers[:, 3] == 0).all()
    assert rounded.scales.shape == (8, 2)
    other = weight.clone()
    other[:, 3] = 0
    assert (x @ (rounded.dequantized() - weight).T).norm() < 0.2 * (x @ weight.T).norm()
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight, hessian(x * torch.nan), Levels(4))


# --- rotation


@pytest.mark.parametrize("size", [1, 2, 64, 12, 24, 20, 768, 1280])
def test_hadamard_matrices_are_orthogonal(size):
    matrix = hadamard(size)
    assert set(matrix.unique().tolist()) <= {1.0, -1.0}
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


def test_other_sizes_get_any_rotation():
    assert hadamard(3200) is None
    for size in (36, 48):
        matrix, signs = random_rotation(size, torch.Generator().manual_seed(0))
        assert (signs is None) == (size == 36)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))


@torch.no_grad()
def test_the_rotation_of_a_llama_is_official(golden):
    case = golden("quantization/rotation_llama")
    io, official = case.io, load_file(case.folder / "rotated.safetensors")
    sizes = {key: value for key, value in case.config.items() if key not in ("architectures", "dtype", "model_type")}
    model = load_strict(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), case.weights, source="golden")
    plain = load_strict(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), case.weights, source="golden")
    torch.testing.assert_close(model(io["ids"]).logits, io["logits"], rtol=1e-4, atol=1e-4)
    rotate(plain, io["rotation"])
    torch.testing.assert_close(plain(io["ids"]).logits, io["logits"], rtol=1e-4, atol=1e-4)  # without its quirk
    embeddings = model.model.embed_tokens.weight
    embeddings -= embeddings.mean(dim=1, keepdim=True)
    rotate(model, io["rotation"])
    torch.testing.assert_close(model(io["ids"]).logits, io["logits_after_fusing"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model(io["ids"]).logits, io["logits_after_rotation"], rtol=1e-3, atol=1e-3)
    for name, weight in model.state_dict().items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # whose inputs it rotates, too
            weight, other = weight @ weight.T, official[name] @ official[name].T
        elif name.endswith("v_proj.weight"):  # and their heads' outputs
            weight, other = ((part.T @ part) for part in (weight, official[name]))
        else:
            other = official[name]
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)
