"""Three optimizer steps of the official training code, number by number: losses, weights, averaged weights."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_llamagen import sizes

from argen.models.drafter import Drafter
from argen.models.llamagen import LlamaGen
from argen.train.loop import Training
from argen.train.own import drafter
from argen.train.own.llamagen import SCHEDULE, LlamaGenTask
from tokenizers_img.checkpoint import load_strict


class Given(LlamaGenTask):
    """The batches of a golden case, one after the other."""

    def __init__(self, case):
        self.io, self.count = case.io, 0
        by_class = "class_ids" in self.io
        model = LlamaGen(**sizes(case.config) | ({} if by_class else {"classes": None}))
        load_strict(model, case.weights, source="golden").train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.networks, self.pipe = {"model": model}, SimpleNamespace(transformer=model)

    def batch(self, size, generator):
        step, self.count = self.count, self.count + 1
        values = {
            name: self.io[name][step]
            for name in ("image_ids", "drop", "class_ids", "caption_features", "valid")
            if name in self.io
        }
        mask = (
            self.io["caption_mask"][step].bool() if "caption_mask" in self.io else torch.ones(size, 1, dtype=torch.bool)
        )
        condition = values.get("class_ids", values.get("caption_features"))
        batch = {
            "tokens": values["image_ids"].long(),
            "dropped": values["drop"].bool(),
            "condition": condition,
            "mask": mask,
        }
        counted = values["valid"].bool() if "valid" in values else slice(None)
        return {name: value[counted] for name, value in batch.items()}

    def read(self, batch):
        return batch


@pytest.mark.parametrize("name", ["train_c2i", "train_t2i"])
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_llamagen(golden, tmp_path, name, micro_batch):
    case = golden(f"llamagen/{name}")
    config, losses, norms = case.config, [], []
    size = config["batch_size"]
    if micro_batch and "valid" in case.io:
        pytest.skip("its batches are of different sizes")
    assert (SCHEDULE.learning_rate, list(SCHEDULE.betas)) == (config["lr"], config["betas"])
    assert (SCHEDULE.weight_decay, SCHEDULE.grad_clip) == (config["weight_decay"], config["max_grad_norm"])
    task = Given(case)
    schedule = replace(SCHEDULE, batch_size=size, micro_batch=micro_batch, ema_warmup=False)
    training = Training(task, schedule, tmp_path, 0, "fp32")
    start = {key: value.clone() for key, value in task._model().state_dict().items()}
    for step in range(config["steps"]):
        training.step()
        losses.append(training.log["loss"])
        norms.append(training.log["gradient norm"])
        if step in (0, 2):
            expected = load_file(case.folder / f"weights_step{step + 1}.safetensors")
            for key, value in task._model().state_dict().items():
                torch.testing.assert_close(value, expected[key], atol=3e-6, rtol=0)
                torch.testing.assert_close(value - start[key], expected[key] - start[key], atol=3e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(losses), case.io["losses"].float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(norms), case.io["grad_norm"].float(), atol=0, rtol=1e-4)
    training.ema.copy_to(task._model().parameters())
    averaged = {key.removeprefix("ema_step3/"): value for key, value in case.io.items() if key.startswith("ema_step3/")}
    assert averaged
    for key, value in averaged.items():
        torch.testing.assert_close(task._model().state_dict()[key], value, atol=2e-6, rtol=0)


class GivenDrafter(drafter.DrafterTask):
    """The batches of a golden case, one after the other."""

    def __init__(self, case):
        self.io, self.count = case.io, 0
        config = case.config
        sizes = (
            config["vocab_size"],
            16,
            config["hidden_size"],
            config["num_attention_heads"],
            config["intermediate_size"],
        )
        model = load_strict(Drafter(*sizes), case.weights, source="golden").train()
        model.embed_tokens.requires_grad_(False)
        head = load_file(case.folder / "head.safetensors")["lm_head.weight"]
        self.target = SimpleNamespace(output=lambda hidden: hidden @ head.T)
        self.networks = {"model": model}

    def batch(self, size, generator):
        self.count += 1
        clean, noised, ids = (
            self.io[f"step{self.count}/{name}"] for name in ("clean_hidden", "noised_hidden", "image_ids")
        )
        return {"clean": clean, "noise": noised - clean, "tokens": ids.long()}

    def read(self, batch):
        return batch

    def hidden(self, batch):
        return batch["clean"]


def test_drafter(golden, tmp_path, monkeypatch):
    case, losses, norms = golden("lantern/train_step"), [], []
    config, schedule = case.config, drafter.SCHEDULE
    assert (schedule.learning_rate, list(schedule.betas), schedule.batch_size) == (config["lr"], config["betas"], 4)
    assert (schedule.weight_decay, schedule.grad_clip, schedule.decayed) == (
        config["weight_decay"],
        config["grad_clip_value"],
        "all",
    )
    assert config["p_w"] == drafter.ON_TOKENS
    assert pytest.approx(config["noise_std"] * 512 / 376) == drafter.NOISE / 376
    rates = case.io["lr"].tolist()
    monkeypatch.setattr(type(schedule), "rate", lambda self, step: rates[step])  # of an epoch of three batches
    task = GivenDrafter(case)
    training = Training(task, replace(schedule, batch_size=config["batch_size"]), tmp_path, 0, "fp32")
    clip = training.accelerator.clip_grad_value_

    def clipped(parameters, value):
        named = dict(task._model().named_parameters())
        norms.append([named[name].grad.norm().item() for name in config["trained"]])
        clip(parameters, value)

    training.accelerator.clip_grad_value_ = clipped
    for step in range(3):
        training.step()
        losses.append((training.log["distance"], training.log["surprise"]))
        if step > 0:
            expected = load_file(case.folder / f"weights_step{step + 1}.safetensors")
            for key, value in expected.items():
                torch.testing.assert_close(task._model().state_dict()[key], value, atol=2e-6, rtol=0)
    for name, values in zip(("vloss", "ploss"), zip(*losses, strict=True), strict=True):
        torch.testing.assert_close(torch.tensor(values), case.io[name].float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(norms), case.io["param_grad_norms"].float(), atol=1e-7, rtol=1e-4)
