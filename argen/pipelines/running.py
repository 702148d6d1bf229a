"""Running generation requests: from a `Request` of any front end to its images, step by step."""

from collections.abc import Generator
from dataclasses import replace

from diffusers import DiffusionPipeline
from torch import Tensor

from argen.request import Job, Request

SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")  # what a request may leave to the model


class Running(DiffusionPipeline):
    """Mixin of `TokenPipeline`: running generation requests."""

    def run(self, request: Request, every: int = 1, tokens: Tensor | None = None) -> Generator[Job, None, None]:
        """Run a request; yields its job, the same object, after each step, and at last with its images.

        Close the iterator to cancel.

        Args:
            tokens: `Job.resume_state` of the same request, to resume from.
        """
        self.check(request)
        request = self.resolved(request)
        settings, control = {name: getattr(request, name) for name in SAMPLING}, request.control
        generators, shape = request.generators(), self.shape_of(control, request.num_tokens)
        sampler = self.make_sampler(request.sampler, **request.sampler_settings())
        prompt = self.read_prompt(request.prompt, request.literal).text
        job = Job(request, self.canvas.empty(len(generators), shape), lossless=sampler.lossless)
        if tokens is None and request.tokens is not None:
            tokens = self.parse_tokens(request, shape).expand(len(generators), -1)
        steps = self.stream(
            [prompt] * len(generators),
            generators,
            **settings,
            sampler=sampler,
            tokens=tokens,
            controls=[control] * len(generators) if control else None,
            shape=shape,
            every=every,
        )
        for step in steps:
            job.tokens = self.canvas.to_grid(step.tokens, shape)
            job.forward_passes, job.decided = step.forward_passes, step.decided
            job.resume_state = self.canvas.resume_state(step)
            job.origins = None if step.origins is None else step.origins.unflatten(1, shape)
            yield job
        selected = list(range(len(generators)))
        if request.num_candidates is not None:
            selected, job.scores = self.select_best([prompt], job.tokens, len(generators), request.num_images)
            job.log.append(f"kept {len(selected)} of {len(generators)} candidates")
        job.requests = [request.for_image(index) for index in selected]
        job.tokens = job.tokens[selected]
        job.origins = None if job.origins is None else job.origins[selected]
        job.images = self.images(job.tokens)
        yield job

    def check(self, request: Request) -> None:
        """Check that this model can run a request, before anything is drawn.

        Raises:
            ValueError: a setting does not fit this model; says which.
        """
        if request.num_beams is not None and not hasattr(self, "search"):
            raise ValueError(
                f"num_beams is {request.num_beams}: only images of ordered tokens can be searched for (FlexAR's), leave it out"
            )
        if (request.num_beams, request.num_candidates) != (None, None):
            self.check_ranking()
        request = self.resolved(request)
        shape = self.shape_of(request.control, request.num_tokens)
        self.make_sampler(request.sampler, **request.sampler_settings())
        if request.tokens is not None:
            self.parse_tokens(request, shape)
        if getattr(self, "text_encoder", self) is None:
            self.class_of(request.prompt)
        else:
            self.caption(self.read_prompt(request.prompt, request.literal).text)

    def resolved(self, request: Request) -> Request:
        """Fill in the settings that a request leaves to the model, and prepare its control."""
        defaults = {key: getattr(self.defaults, key) for key in SAMPLING if getattr(request, key) is None}
        return replace(request, **defaults, control=self.prepare(request.control) if request.control else None)

    def parse_tokens(self, request: Request, shape: tuple[int, int]) -> Tensor:
        """Convert the tokens of a request to [1, N], as `stream` takes them.

        Raises:
            ValueError: this model writes latents; a grid of another shape, or an id out of range.
        """
        if not self.canvas.discrete:
            raise ValueError(
                "this model writes numbers, not tokens: leave tokens out, or give latents to its call in Python"
            )
        return self.canvas.parse(request.tokens, shape, self.codes)
