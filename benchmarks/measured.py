"""Run argen's own command, stop after some tokens, and write what it took: seconds and memory, as JSON.

    python benchmarks/measured.py FILE TOKENS SECONDS generate "a red apple" -o apple.png

Used by `rehearsal.py`. The command is that of the command line; tokens beyond TOKENS (0: none are) are not drawn, and are 0 in the image. After SECONDS the process stops where it is (0: never). Memory is what the process has without pages of files (Linux), looked at 20 times a second.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()


class Watch:
    """Times of a command's parts, and the most memory that each took."""

    def __init__(self, most: int):
        self.most, self.facts, self.stage = most, {}, "load"  # type: int, dict[str, Any], str
        threading.Thread(target=self.look, daemon=True).start()

    def look(self) -> None:
        """Note the private memory for the current stage."""
        status = Path("/proc/self/status")
        while status.exists():
            held = int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1]) * 1024
            name = f"{self.stage}_bytes"
            self.facts[name] = max(self.facts.get(name, 0), held)
            time.sleep(0.05)

    def loads(self, load: Callable) -> Callable:
        """`argen.hub.loading.load`, timed from the start of the process."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            model = load(*args, **kwargs)
            self.facts["load"], self.stage = time.perf_counter() - STARTED, "run"
            self.facts["loaded_parameters"] = parameters(model)
            if hasattr(model, "stream"):
                model.stream, model.images = self.streams(model), self.decodes(model.images)
            return model

        return timed

    def streams(self, pipe: Any) -> Callable:
        """A pipeline's `stream` that stops."""
        stream = pipe.stream

        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            started, first = time.perf_counter(), None
            for step in stream(*args, **kwargs):
                decided, seconds = step.decided, time.perf_counter() - started
                if (
                    first is None and decided > 1
                ):  # the first comes of the condition, and only the second compiles what is compiled
                    first = decided, seconds
                total = pipe.length if step.tokens.ndim == 4 else step.tokens.shape[1]
                if self.most and decided >= self.most and decided < total:
                    step = replace(step, tokens=blank(step.tokens))
                    break
                yield step
            self.facts |= {"first": first[1], "first_tokens": first[0]}
            self.facts |= {"tokens": decided, "all_tokens": total, "write": seconds, "passes": step.forward_passes}
            yield step

        return timed

    def decodes(self, images: Callable) -> Callable:
        """A pipeline's `images`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = images(*args, **kwargs)
            self.facts["decode"] = time.perf_counter() - started
            return result

        return timed


def blank(tokens: Any) -> Any:
    """Tokens [B, N] or latents [B, C, h, w] with 0 where nothing was decided."""
    return tokens.nan_to_num(0.0) if tokens.is_floating_point() else tokens.clamp(min=0)


def parameters(model: Any) -> int:
    """How many numbers were loaded, those of what is offloaded excepted."""
    from argen.hub.loading import networks_of

    tensors = {
        id(tensor): tensor for network in networks_of(model) for tensor in (*network.parameters(), *network.buffers())
    }
    return sum(tensor.numel() for tensor in tensors.values())


def main() -> int:
    from argen.cli.main import main as command
    from argen.hub import loading

    file, most, limit, *words = sys.argv[1:]
    watch = Watch(int(most))

    def stop(*_: Any) -> None:
        """Write what is known, and leave."""
        watch.facts["stopped"] = time.perf_counter() - STARTED
        Path(file).write_text(json.dumps(watch.facts))
        os._exit(0)

    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(int(limit))
    loading.load = watch.loads(loading.load)
    code = command(words)
    watch.facts["all"] = time.perf_counter() - STARTED
    Path(file).write_text(json.dumps(watch.facts))
    return code


if __name__ == "__main__":
    sys.exit(main())
