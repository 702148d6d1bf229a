"""What is asked of a sampler: tokens to go on from, changes by a callback, settings, axes; an image does not depend on its batch."""

import math

import pytest
import torch

import argen
from argen.cli.main import main
from argen.jobs.tables import Axis, expand_axes, read_table
from argen.registry import samplers
from argen.request import Request, setting_of

PROMPTS = ["a cat", "a red apple", "a pizza", "a dog", "a car", "a house"]


@pytest.fixture(scope="module")
def parti():
    return quiet("argen/emoji-parti")


@pytest.fixture(scope="module")
def llamagen():
    return quiet("argen/emoji-llamagen")


@pytest.fixture(scope="module")
def xar():
    return quiet("argen/emoji-xar")


def quiet(name):
    pipe = argen.load(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [None, 0.0])
@pytest.mark.parametrize(
    "sampler",
    [
        "speculative",
        "speculative:tree=drawn",
        "lantern:tree=drawn",
        "recycling",
        "recycling:tree=drawn",
        "recycling:tree=dynamic",
    ],
)
def test_an_image_does_not_depend_on_its_batch(llamagen, sampler, temperature):
    settings = {"sampler": sampler, "temperature": temperature, "output_type": "latent"}
    batch = llamagen(PROMPTS, generator=[seeded(i) for i in range(6)], **settings).tokens
    for index in (1, 4):
        alone = llamagen(PROMPTS[index], generator=[seeded(index)], **settings).tokens
        assert torch.equal(batch[index], alone[0])


@pytest.mark.parametrize("sampler", ["euler", "sde", "heun"])
def test_latents_resume_bit_equally(xar, sampler):
    request = Request("a red apple", model="argen/emoji-xar", sampler=sampler, steps=4, seed=7)
    states = [(job.resume_state.clone(), job.tokens.clone()) for job in xar.run(request)]
    whole = states[-1][1]
    resumable = [state for state, _ in states if 0 < state.isfinite().float().mean() < 1]
    assert len(resumable) > 2
    for state in resumable[::3]:
        *_, job = xar.run(request, tokens=state)
        assert torch.equal(job.tokens, whole)


def test_samplers_say_how_they_resume(parti, capsys):
    exact = [name for name in samplers if getattr(samplers[name], "resumes", "exactly") == "exactly"]
    assert {"sequential", "jacobi", "zipar", "auto", "sde"} <= set(exact)
    assert not {"sjd", "gsd", "speculative", "lantern", "recycling"} & set(exact)
    for name in ("sequential", "jacobi"):
        request = Request("a cat", sampler=name, seed=3)
        states = [(job.resume_state.clone(), job.tokens.clone()) for job in parti.run(request)]
        *_, job = parti.run(request, tokens=states[len(states) // 2][0])
        assert torch.equal(job.tokens, states[-1][1])
    assert main(["samplers"]) == 0
    assert capsys.readouterr().out.count("resumes in distribution") == 5


def grid(value: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.full((1, 64), value, dtype=dtype)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (grid(4096), "token 4096 does not exist: expected ids below 4096"),
        (grid(-5), "token -5 does not exist"),
        (grid(1, torch.bool), "of the type bool"),
        (grid(1, torch.uint8), "of the type uint8"),
        (grid(-1, torch.float32), "of the type float32"),
        (grid(-1)[:, :5], "tokens are .1, 5.: expected .1, 64."),
        ([[1]], "tokens are a list"),
    ],
)
def test_tokens_that_are_none_are_refused(parti, tokens, message):
    with pytest.raises(ValueError, match=message):
        parti("a cat", tokens=tokens, generator=seeded())
    if isinstance(tokens, torch.Tensor):
        with pytest.raises(ValueError, match=message):
            list(parti.stream(["a cat"], [seeded()], tokens=tokens))


def test_tokens_of_the_last_id_and_of_int32_are_taken(parti):
    tokens = grid(-1, torch.int32)
    tokens[0, 3] = 4095
    assert parti("a cat", tokens=tokens, generator=seeded(), output_type="latent").tokens[0, 3] == 4095


@pytest.mark.parametrize(("value", "message"), [(math.inf, "infinite"), (1, "of the type torch.int64")])
def test_latents_that_are_none_are_refused(xar, value, message):
    latents = torch.full((1, 16, 8, 8), value)
    with pytest.raises(ValueError, match=message):
        xar("a cat", tokens=latents, generator=seeded())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (5, "callback_on_step_end returned 5"),
        ("x", "callback_on_step_end returned 'x'"),
        ([1], "expected None, or a dict"),
        ({"tokens": None}, "of the type NoneType"),
        ({"tokens": grid(9999)}, "token 9999"),
        ({"tokens": grid(-1)[:, :3]}, "expected .1, 64."),
    ],
)
def test_what_a_callback_returns_is_checked(parti, returned, message):
    with pytest.raises(ValueError, match=message):
        parti("a cat", generator=seeded(), callback_on_step_end=lambda *_: returned)


def test_a_callback_may_change_tokens_in_place(parti, xar):
    expected = parti("a cat", generator=seeded(), output_type="latent").tokens

    def change(pipe, step, decided, values):
        values["tokens"][0, 0] = 5
        return values

    changed = parti(
        "a cat", generator=seeded(), output_type="latent", sampler="sequential", callback_on_step_end=change
    ).tokens
    assert changed[0, 0] == 5
    assert expected[0, 0] != 5
    calls = []
    plain = xar("a cat", generator=seeded(), output_type="latent").tokens
    followed = xar(
        "a cat",
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=lambda *values: (calls.append(1), values[3])[1],
    ).tokens
    assert torch.equal(plain, followed)
    assert len(calls) < 100  # NaN in both is no change


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("speculative:rule=k-seq,nodes=4", "rule is k-seq, for candidates that are drawn independently"),
        ("speculative:tree=dynamic,rule=k-seq", "rule is k-seq, for candidates that are drawn independently"),
        ("speculative:tree=static,rule=k-seq", "rule is k-seq, for candidates that are drawn independently"),
        ("speculative:tree=static,nodes=3", "nodes is 3, which the tree static does not have"),
        ("lantern:tree=static,width=3", "width is 3, which the tree static does not have"),
        ("speculative:nodes=256,depth=32,width=64", "depth is 32 and width 64: expected at most 512 nodes"),
        ("lantern:k=5,k=6", "k is given twice"),
        ("lantern:k=1_0", "k is '1_0': expected a whole number"),
        ("speculative:drafter=x", "has no setting 'drafter=x'.* of tree, rule, reject_in, nodes, depth, width$"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(typed, message):
    with pytest.raises(ValueError, match=message):
        Request("a", sampler=typed)


@pytest.mark.parametrize(
    "typed", ["speculative:rule=k-seq", "speculative:nodes=3", "speculative:depth=8", "lantern:width=2"]
)
def test_a_tree_that_is_left_out_is_that_of_the_other_settings(llamagen, typed):
    assert llamagen("a cat", sampler=typed, generator=seeded()).forward_passes < 64


def test_a_narrow_tree_grows_what_a_wide_one_keeps(llamagen):
    drawn = [
        llamagen("a cat", sampler=f"speculative:tree=dynamic,nodes=2,{sizes}", generator=seeded(), output_type="latent")
        for sizes in ("depth=1,width=2", "depth=32,width=64")
    ]
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    assert drawn[0].forward_passes == drawn[1].forward_passes


def test_axes_of_one_sampler_only():
    base = Request("a")
    old = expand_axes(base, [Axis.parse("lantern_k=1,2")])
    assert [request.sampler_text for request in old] == ["lantern:k=1", "lantern:k=2"]
    assert base.with_setting("lantern_lambda", 2.0).sampler_text == "lantern:lambda=2.0"
    with pytest.raises(ValueError, match="axes of two samplers: lantern.k and jacobi.window"):
        expand_axes(base, [Axis.parse("lantern.k=1,2"), Axis.parse("jacobi.window=2")])
    with pytest.raises(ValueError, match="axes of two samplers: lantern.k and sampler"):
        expand_axes(base, [Axis.parse("lantern.k=1"), Axis.parse("sampler=jacobi|zipar")])
    assert len(expand_axes(base, [Axis.parse("lantern.k=1,2"), Axis.parse("lantern.delta=0.1,0.2")])) == 4


def test_an_axis_names_the_sampler_that_is_unknown():
    with pytest.raises(ValueError, match="unknown sampler 'x': expected one of auto"):
        setting_of("x.k")
    with pytest.raises(ValueError, match="unknown setting 'x': sequential has none"):
        setting_of("sequential.x")


def test_nan_is_a_number_that_is_refused_and_a_cell_that_is_empty(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "a taxi", "temperature": NaN}\n')
    with pytest.raises(ValueError, match="line 1 of t.jsonl: temperature is nan"):
        read_table(tmp_path / "t.jsonl")
    (tmp_path / "t.csv").write_text("prompt,temperature\na taxi,nan\n")
    assert read_table(tmp_path / "t.csv")[0].temperature is None


def test_a_sampler_without_its_drafter_is_refused_before_anything_is_written(tmp_path, capsys):
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("prompt,model,sampler\na cat,argen/emoji-parti,speculative\n")
    assert main(["batch", str(table), "-o", str(out)]) == 2
    assert "row 1: the sampler speculative needs a generator with a drafter" in capsys.readouterr().err
    assert not out.exists()


def test_another_backend_that_is_advised_can_be_used(capsys, tmp_path):
    command = ["generate", "a cat", "--device", "cpu", "-o", str(tmp_path / "a.png")]
    assert main([*command, "--attention", "sdpa-flash"]) == 2
    advised = capsys.readouterr().err.rpartition("choose one of ")[2].strip().split(", ")
    assert "native" in advised
    for name in advised if not torch.cuda.is_available() else ():
        assert main([*command, "--attention", name]) == 0


def test_a_generator_is_no_diffusion_pipeline(capsys, tmp_path):
    assert main(["bind", "a red apple", "--model", "argen/emoji-parti", "-o", str(tmp_path / "a.png")]) == 2
    assert "argen/emoji-parti is a generator, expected a diffusion pipeline" in capsys.readouterr().err
