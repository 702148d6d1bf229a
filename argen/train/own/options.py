"""What a training on own images is asked with: one declaration for the command line, the page and Python."""

from typing import Annotated, Literal

from samplers.settings import Field, settings

Positive = Annotated[int, Field(ge=1)]


@settings
class OwnOptions:
    """Settings of a training on own images; what is None is left to the recipe, see docs/training.md.

    The images are read by `argen.train.sources.open_source`, whose arguments some of these are.
    """

    images: str = Field(
        description="folder, .zip, .tar shards or table with the images", json_schema_extra={"metavar": "PATH"}
    )
    captions: str | None = Field(
        None, description="table (csv, jsonl or parquet) that names them", json_schema_extra={"metavar": "FILE"}
    )
    image_column: str | None = Field(
        None, description="its column of image files", json_schema_extra={"metavar": "NAME"}
    )
    caption_column: str | None = Field(
        None, description="its column of captions", json_schema_extra={"metavar": "NAME"}
    )
    label_column: str | None = Field(None, description="its column of classes", json_schema_extra={"metavar": "NAME"})
    control_column: str | None = Field(
        None, description="its column of control images", json_schema_extra={"metavar": "NAME"}
    )
    split: str | None = Field(None, description="take this split alone", json_schema_extra={"metavar": "NAME"})
    missing_captions: Literal["error", "drop"] = Field(
        "error", description="images without a caption where others have one"
    )
    strict: bool = Field(False, description="stop at the first image that cannot be read, instead of leaving it out")
    init: str | None = Field(None, description="model to start from", json_schema_extra={"metavar": "MODEL"})
    size: str | None = Field(
        None,
        description="of a new network, as published: B, L, XL, XXL, 3B of LlamaGen, small, base of ViT-VQGAN, VQ-16, VQ-8 of LlamaGen's VQ, d12-d12, d18-d18, d18-d28 of FlexTok; or mini",
    )
    tokenizer: str | None = Field(
        None, description="image tokenizer of a new network", json_schema_extra={"metavar": "MODEL"}
    )
    text_encoder: str | None = Field(
        None,
        description="of a new network of captions: google/flan-t5-xl or argen/emoji-clip",
        json_schema_extra={"metavar": "MODEL"},
    )
    image_size: Annotated[int, Field(ge=16, le=4096)] | None = Field(None, description="side of the crops in pixels")
    crops: str | None = Field(None, description="center, flip or ten:RANGE; of a tokenizer center or flip")
    control: str = Field(
        "canny", description="what a ControlAR follows, a type of argen control, where no control images come along"
    )
    lora: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None, description="rank of a LoRA that is trained instead of the network"
    )
    batch_size: Positive | None = Field(None, description="images of a step, of all processes together")
    micro_batch: Positive | None = Field(
        None, description="images of a pass, whose gradients are added up to those of a step"
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="after the warm-up")
    warmup: Annotated[int, Field(ge=0)] | None = Field(None, description="steps in which the learning rate rises")
    dropped: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="share of images whose class or caption, or of flextok whose tokens, are left out, for guidance",
    )
    described: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="share of images that seed-lm learns to describe, instead of to draw"
    )
    objective: Literal["next", "mixed"] = Field(
        "next",
        description="mixed: half of the samples are images to complete, whose known tokens are seen by those before them, for editing",
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="of the averaged weights, which are what is saved"
    )
    evaluate_every: Positive = Field(500, description="steps between scores, sample images and checkpoints")
    tracker: Literal["tensorboard", "trackio", "wandb"] | None = Field(
        None, description="where losses, rates, scores and samples are shown, too"
    )
    keep_checkpoints: Positive = Field(1, description="how many checkpoints are kept, the last ones")
