"""Rotation of what the layers of a network pass on (QuaRot, arXiv 2404.00456): another basis without outliers, the same outputs.

The weights of the norms go into the layers that read them; then whatever writes into the stream gets the rotation on its output side, and
whatever reads it on its input side. This needs norms without mean and bias (`RMSNorm`). Unlike the authors' code no mean is taken away
from the embeddings, which would change such a network.

Letters in shape comments: D width of the stream.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from argen.models.controlar import ControlAR
from argen.models.flexar import FlexAR
from argen.models.llamagen import LlamaGen

PRIMES = (11, 19)  # 12 and 20, by Paley; with powers of two they make the other sizes


@dataclass
class Stream:
    """What touches the stream of a network.

    Attributes:
        norms: each with the linear layers that read what it gives.
        readers: linear layers that read the stream without a norm.
        writers: linear layers whose outputs are added to it.
        tables: tensors [..., D] that are.
    """

    norms: list[tuple[nn.Module, list[nn.Linear]]] = field(default_factory=list)
    readers: list[nn.Linear] = field(default_factory=list)
    writers: list[nn.Linear] = field(default_factory=list)
    tables: list[Tensor] = field(default_factory=list)


def hadamard(size: int) -> Tensor | None:
    """A matrix [size, size] of 1 and -1 with orthogonal rows, float64; None for sizes that are no power of two, and not 12 or 20 times one."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for prime in PRIMES:
        if size % (prime + 1) == 0:
            matrix = _paley(prime)
            break
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix if len(matrix) == size else None


def _paley(prime: int) -> Tensor:
    """The Hadamard matrix of `prime` + 1, a prime that leaves 3 when it is divided by 4."""
    squares = {number * number % prime for number in range(1, prime)}
    signs = torch.tensor([0.0, *(1.0 if number in squares else -1.0 for number in range(1, prime))])
    places = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, -1
    matrix[1:, 1:] = signs[(places[:, None] - places) % prime].double()
    return matrix + torch.eye(prime + 1, dtype=torch.float64)


def random_rotation(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """An orthogonal matrix [D, D] in float64, and the signs [D] int8 that it is made of: these times a Hadamard matrix. Where there is none of
    that size it is any orthogonal matrix, and the signs are None."""
    base = hadamard(size)
    if base is None:
        q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
        return q * r.diagonal().sign(), None
    signs = 2 * torch.randint(2, (size,), generator=generator) - 1
    return signs.double()[:, None] * base / size**0.5, signs.to(torch.int8)


def stream_of(network: nn.Module) -> Stream | None:
    """What touches the stream; None where it cannot be rotated, as under a LayerNorm."""
    if isinstance(network, LlamaGen):
        return _llamagen(network)
    if isinstance(network, LlamaForCausalLM):
        return _llama(network)
    if isinstance(network, FlexAR) and network.config.norm == "rms":
        return _flexar(network)
    return None


def _llamagen(network: LlamaGen) -> Stream:
    stream, condition = Stream(tables=[network.tok_embeddings.weight]), network.cls_embedding
    if network.config.classes is None:
        stream.writers.append(condition.cap_proj.fc2)
    else:
        stream.tables.append(condition.embedding_table.weight)
    if isinstance(network, ControlAR):
        stream.writers += [layer.fc2 for layer in network.condition_layers]
    for layer in network.layers:
        feed = layer.feed_forward
        stream.norms += [(layer.attention_norm, [layer.attention.wqkv]), (layer.ffn_norm, [feed.w1, feed.w3])]
        stream.writers += [layer.attention.wo, feed.w2]
    stream.norms.append((network.norm, [network.output]))
    return stream


def _llama(network: LlamaForCausalLM) -> Stream:
    stream = Stream(tables=[network.model.embed_tokens.weight])
    for layer in network.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        stream.norms.append((layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        stream.norms.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
        stream.writers += [attention.o_proj, mlp.down_proj]
    stream.norms.append((network.model.norm, [network.lm_head]))
    return stream


def _flexar(network: FlexAR) -> Stream:
    parts = network.models["ar_image_model"]
    before, trunk, head = parts["preprocessor"], parts["trunk"], parts["head"].linear
    stream = Stream(tables=[before.embedding.weight, before.sos_token_embed, before.positional_embedding])
    if hasattr(before, "cls_embedding"):
        stream.tables.append(before.cls_embedding.weight)
    for block in trunk["blocks"]:
        attention, mlp, last = block["self_attn"] if "self_attn" in block else block["attn"], block["mlp"], "norm_2"
        stream.norms.append((block["norm_1"], [attention.qkv]))
        if "cross_attn" in block:  # the text that it reads is not in the stream
            stream.norms.append((block["norm_2"], [block["cross_attn"].Wq]))
            stream.writers.append(block["cross_attn"].proj)
            last = "norm_3"
        stream.norms.append((block[last], [mlp.fc1, *([mlp.fc3] if hasattr(mlp, "fc3") else [])]))
        stream.writers += [attention.proj, mlp.fc2]
    if "post_trunk_norm" in trunk:
        stream.norms.append((trunk["post_trunk_norm"], [head]))
    else:
        stream.readers.append(head)
    return stream


@torch.no_grad()
def untie(network: nn.Module) -> None:
    """Give the head of a language model weights of its own."""
    if isinstance(network, LlamaForCausalLM) and network.config.tie_word_embeddings:
        network.lm_head.weight = nn.Parameter(network.lm_head.weight.clone())
        network.config.tie_word_embeddings = False


@torch.no_grad()
def fold_norms(network: nn.Module) -> None:
    """Move the weights of the norms into the layers that read what they give."""
    untie(network)
    for norm, readers in _checked(network).norms:
        for layer in readers:
            layer.weight.copy_(layer.weight.double() * norm.weight.double())
        norm.weight.fill_(1)


@torch.no_grad()
def rotate(network: nn.Module, rotation: Tensor) -> None:
    """Rotate the stream of a network by an orthogonal matrix [D, D], in place; its logits stay as they are.

    Raises:
        ValueError: this network cannot be rotated.
    """
    fold_norms(network)
    stream, rotation = _checked(network), rotation.double()
    for layer in [*(layer for _, readers in stream.norms for layer in readers), *stream.readers]:
        layer.weight.copy_(layer.weight.double() @ rotation.to(layer.weight.device))
    for layer in stream.writers:
        for part in (layer.weight, layer.bias):
            if part is not None:
                part.copy_(rotation.T.to(part.device) @ part.double())
    for table in stream.tables:
        table.copy_(table.double() @ rotation.to(table.device))


def _checked(network: nn.Module) -> Stream:
    stream = stream_of(network)
    if stream is None:
        raise ValueError(f"a {type(network).__name__} with such norms cannot be rotated: expected RMSNorm")
    return stream


def width_of(network: nn.Module) -> int:
    """D."""
    return _checked(network).tables[0].shape[-1]
