"""The kernel that sets the condition of a CUDA graph's conditional node from exit flags.

``cudaGraphSetConditional`` is a function of the device runtime. Why it has a kernel of its own:

- Triton has no call for it. Inline assembly lands inside a function, where PTX declares no external
  one; ``extern_elementwise`` gives each call a result, which this function has not, and every
  thread of the program would make the call, which CUDA leaves undefined;
- NVRTC would compile it from C, and is one more library at start. What it would make is a page of
  PTX, so the page is here (``set_conditional.ptx``). The driver resolves the function itself, as it
  does ``vprintf``: ``ptxas`` takes it without a library, and refuses any other unknown name.

So a step launches an exit's kernel, then this one (one thread, one launch inside the graph), then
the conditional node.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eepass.codegen.cuda.driver import Function, load

ENTRY = "eepass_set_conditional"
# handle, flags, their number, mode
PARAMETERS = ("u64", "u64", "u32", "u32")
# the body runs if, of the flags, ...
When = Literal["any", "all", "none", "not all"]
MODES: dict[When, int] = {"any": 0, "all": 1, "none": 2, "not all": 3}


@dataclass(frozen=True, slots=True)
class ConditionalSetter:
    """The loaded kernel; ``launch`` puts it into a stream, which may be capturing."""

    module: Any
    function: Function

    def launch(
        self, handle: int, flags: Tensor, when: When = "any", stream: int | None = None
    ) -> None:
        """Set the condition of ``handle`` (``CUgraphConditionalHandle``) to whether ``when`` holds
        of ``flags``: bool [R] in device or pinned host memory, read when the graph runs."""
        given = setter_arguments(handle, flags, when)
        stream = torch.cuda.current_stream().cuda_stream if stream is None else stream
        self.function.launch((1,), 1, 0, given, stream)


def setter_source() -> str:
    """The kernel as PTX for compute capability 8.0 and later; needs driver 12.3 or later."""
    return (Path(__file__).parent / "set_conditional.ptx").read_text(encoding="utf-8")


def setter_arguments(handle: int, flags: Tensor, when: When) -> tuple[int, int, int, int]:
    """What the kernel's ``PARAMETERS`` are given, for those who add the node themselves."""
    if flags.dtype not in (torch.bool, torch.uint8) or not flags.is_contiguous():
        raise ValueError(f"flags: {flags.dtype}, expected bool in one piece")
    return handle, flags.data_ptr(), flags.numel(), MODES[when]


def conditional_setter() -> ConditionalSetter:
    """The kernel in the current CUDA context; raises ``CudaMissing`` or ``CudaFailed``."""
    return ConditionalSetter(*load(setter_source().encode() + b"\0", ENTRY, PARAMETERS))
