"""Small random models of several families, and artefacts with random weights for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Artifact, Calibration, PresetPart, fingerprint
from eepass.runtime.drafting.eagle_layer import style_of
from eepass.runtime.exits.exits import ExitDecision, RowState
from eepass.training.exits import WIDTH

VOCABULARY = 160
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {"rotary_pct": 0.25, "use_parallel_residual": True}),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "n_embd": 64,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 512,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
    ),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def tiny_model(family: str = "llama", **changes: Any) -> Any:
    """A random model in eval mode, float32; the same weights every time."""
    import transformers

    name, options = FAMILIES[family]
    model_class = getattr(transformers, name)
    sizes = dict(SIZES)
    if family == "gpt2":
        sizes = {k: v for k, v in sizes.items() if k not in ("hidden_size", "head_dim")}
        sizes = {
            k: v for k, v in sizes.items() if not k.startswith(("num_", "intermediate", "max_"))
        }
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**sizes, **options, **changes}))
    # the usual initialisation is too small for layers to disagree
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4.0)
    return model.eval().requires_grad_(False)


def random_artifact(model: Any, draft_layer: int = 1, k: int = 16) -> Artifact:
    """An artefact whose predictors want to exit about half the time, at every exit."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    config = model.config.get_text_config(decoder=True)
    depth, width = config.num_hidden_layers, config.hidden_size
    exits = range(draft_layer + 1, depth + 1)
    paper_exits = range(1, depth)
    tensors: dict[str, Tensor] = {
        "hot.ids": torch.randperm(config.vocab_size, generator=generator)[:96].sort().values.int()
    }
    for layer in (draft_layer, *exits[:-1]):
        tensors[f"translator.{layer}.scale"] = torch.ones(width)
        tensors[f"translator.{layer}.down"] = random(8, width, scale=width**-0.5)
        tensors[f"translator.{layer}.up"] = random(width, 8, scale=0.1)
    for preset, layers in (("default", exits), ("paper", paper_exits)):
        for layer in layers:
            name = f"predictor.{preset}.{layer}."
            tensors[name + "w1"] = random(WIDTH, 3 * k, scale=0.3)
            tensors[name + "b1"] = torch.zeros(WIDTH)
            tensors[name + "w2"] = random(WIDTH, scale=0.2)
            tensors[name + "b2"] = torch.zeros(1)
    tensors["eagle.features"] = torch.tensor([1, 2], dtype=torch.int32)
    style = style_of(config)
    tensors["eagle.rotary"] = style.rotary
    for name, shape in style.shapes().items():
        value = random(*shape, scale=shape[-1] ** -0.5) if len(shape) > 1 else torch.ones(shape)
        tensors[f"eagle.{name}"] = value

    def part(layers: range, drafting: int) -> PresetPart:
        calibration = Calibration(0.98, dict.fromkeys(layers, 0.4), tuple(layers), 1.0, depth, 1.0)
        return PresetPart(drafting, k, (calibration,))

    presets = {"default": part(exits, draft_layer), "paper": part(paper_exits, 0)}
    return Artifact(fingerprint(model), presets, tensors)


def eager_compile(graph: Any, structure: str, examples: Any, *, logits: bool = False) -> Any:
    """What a compiler does, without compiling: the graph as a function of a list."""

    def run(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        result = graph(*inputs)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    return run


class AsTraced:
    """In place of a compiler: a tiny model runs as it was traced."""

    kernels_missing = ""

    def __call__(self, graph: Any, structure: str, examples: Any, *, logits: bool = False) -> Any:
        return eager_compile(graph, structure, examples, logits=logits)


class ForcedExits:
    """Exits by order: in pass t (counted from 0 since ``turn`` was set to -1) the first row that is
    evaluated exits after ``orders[t]`` layers with token ``answers[t]``; in later passes, none."""

    def __init__(self, num_layers: int, orders: list[int], answers: list[int]) -> None:
        self.thresholds = dict.fromkeys(range(1, num_layers + 1), 0.5)
        self.plan = SimpleNamespace(draft_layer=-1)
        self.orders, self.answers, self.turn = orders, answers, -1

    def prepare(self, most: int) -> None:
        """Nothing is compiled."""

    def begin(self, rows: int, drafts: Any = None) -> RowState:
        self.turn += 1
        return RowState(torch.zeros(rows, 1, dtype=torch.long), torch.zeros(rows, 1))

    def final(self, hidden: Tensor) -> Tensor:
        return hidden

    def check(
        self,
        layer: int,
        hidden: Tensor,
        state: RowState,
        evaluated: Any,
        statistics: Any,
        choose: Any,
    ) -> tuple[ExitDecision, RowState]:
        wanted = self.turn < len(self.orders) and self.orders[self.turn] == layer
        tokens = {evaluated[0]: self.answers[self.turn]} if wanted else {}
        return ExitDecision(tokens, {row: hidden[0, row] for row in tokens}), state


def tiny_tokenizer() -> Any:
    """Letters and a few words for the vocabulary of the tiny models, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i} " for i in range(3, VOCABULARY - 33))]
    vocabulary = {word: i for i, word in enumerate([*words, *map(chr, range(95, 127))])}
    vocabulary["<unk>"] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}_{% endfor %}"
    return fast
