"""CUDA graphs with IF nodes, built node by node through cuda-bindings' driver interface.

Torch captures each block of launches into a graph; here these become child graphs, with a kernel
before each IF node that sets its condition from a flag. Only the handles of torch's graphs are
needed.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

# the driver's own assembler knows cudaGraphSetConditional, so that this kernel needs no compiler
SETTER = """.version 6.3
.target sm_75
.address_size 64

.extern .func cudaGraphSetConditional (.param .b64 handle, .param .b32 value);

.visible .entry eepass_set_condition (.param .u64 p_handle, .param .u64 p_flag)
{
    .reg .b32 %value;
    .reg .b64 %handle, %flag;
    ld.param.u64 %handle, [p_handle];
    ld.param.u64 %flag, [p_flag];
    cvta.to.global.u64 %flag, %flag;
    ld.global.u8 %value, [%flag];
    {
        .param .b64 a;
        .param .b32 b;
        st.param.b64 [a], %handle;
        st.param.b32 [b], %value;
        call.uni cudaGraphSetConditional, (a, b);
    }
    ret;
}
"""
ENTRY = b"eepass_set_condition"
# CUDA 12.4, the first driver that NVIDIA documents IF nodes for
DRIVER = 12040


class CudaError(RuntimeError):
    """A call of the driver failed; the message names call and error."""


def conditional_nodes_missing(capability: tuple[int, int]) -> str:
    """Why there are no conditional nodes here, or ""; ``capability``: of the device."""
    try:
        driver = _driver()
    except ImportError as error:
        return f"cuda-bindings is missing ({error}): pip install cuda-bindings"
    if not hasattr(driver, "cuGraphConditionalHandleCreate"):
        return "cuda-bindings is too old for conditional nodes: pip install -U cuda-bindings"
    try:
        version = int(call(driver, "cuDriverGetVersion"))
    except RuntimeError as error:
        return f"the CUDA driver's version cannot be read: {error}"
    if version < DRIVER:
        return (
            f"the driver is for CUDA {version // 1000}.{version % 1000 // 10}; conditional nodes "
            "need 12.4"
        )
    if capability < (7, 5):
        return f"compute capability {capability[0]}.{capability[1]} is below 7.5"
    return ""


class ConditionalGraph:
    """A chain of child graphs and IF nodes, in the current context of the calling thread."""

    def __init__(self, driver: Any = None) -> None:
        self.driver = driver or _driver()
        self.root = self._module = self._executable = None
        try:
            self._context = self.call("cuCtxGetCurrent")
            self._module = self.call("cuModuleLoadData", SETTER.encode() + b"\0")
            self._setter = self.call("cuModuleGetFunction", self._module, ENTRY)
            self.root = self.call("cuGraphCreate", 0)
        except RuntimeError:
            self.close()
            raise
        self.chain = Chain(self, self.root)

    def call(self, name: str, *arguments: Any) -> Any:
        """``call`` with this graph's driver."""
        return call(self.driver, name, *arguments)

    def instantiate(self, stream: int) -> None:
        """Make it ready to launch, and upload it to the device."""
        self._executable = self.call("cuGraphInstantiate", self.root, 0)
        self.call("cuGraphUpload", self._executable, self.driver.CUstream(stream))

    def launch(self, stream: int) -> None:
        """Launch into ``stream``, a ``cudaStream_t``."""
        self.call("cuGraphLaunch", self._executable, self.driver.CUstream(stream))

    def close(self) -> None:
        """Destroy it; errors of the driver are ignored."""
        driver = self.driver
        if self._executable is not None:
            driver.cuGraphExecDestroy(self._executable)
        if self.root is not None:
            driver.cuGraphDestroy(self.root)
        if self._module is not None:
            driver.cuModuleUnload(self._module)
        self._executable = self.root = self._module = None

    def condition(self, graph: Any, after: list[Any], flag: int) -> tuple[Any, Any]:
        """A handle whose value is the byte at ``flag``, and the node that sets it."""
        handle = self.call("cuGraphConditionalHandleCreate", graph, self._context, 0, 0)
        params = self.driver.CUDA_KERNEL_NODE_PARAMS()
        params.func = self._setter
        params.gridDimX = params.gridDimY = params.gridDimZ = 1
        params.blockDimX = params.blockDimY = params.blockDimZ = 1
        params.sharedMemBytes = 0
        params.kernelParams = ((int(handle), flag), (ctypes.c_uint64, ctypes.c_uint64))
        return handle, self.call("cuGraphAddKernelNode", graph, after, len(after), params)

    def if_node(self, graph: Any, after: list[Any], handle: Any) -> tuple[Any, Any]:
        """An IF node on ``handle``, and its empty body."""
        driver = self.driver
        params = driver.CUgraphNodeParams()
        params.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        params.conditional.handle = handle
        params.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_IF
        params.conditional.size = 1
        params.conditional.ctx = self._context
        # the variant that takes edge data; from CUDA 13 on it has no suffix
        name = "cuGraphAddNode_v2" if hasattr(driver, "cuGraphAddNode_v2") else "cuGraphAddNode"
        # all zero: the node waits for the whole of the one before; 12.9 takes no None for them
        edges = [driver.CUgraphEdgeData() for _ in after]
        node = self.call(name, graph, after, edges, len(after), params)
        return node, params.conditional.phGraph_out[0]


class Chain:
    """The nodes of one graph (the step's or an IF node's body), one after the other."""

    def __init__(self, owner: ConditionalGraph, graph: Any) -> None:
        self._owner, self._graph = owner, graph
        self._last: list[Any] = []

    def child(self, graph: int) -> None:
        """Add a copy of ``graph``, a ``cudaGraph_t``; the memory it captured must stay alive."""
        child, after = self._owner.driver.CUgraph(graph), self._last
        arguments = (self._graph, after, len(after), child)
        self._last = [self._owner.call("cuGraphAddChildGraphNode", *arguments)]

    def branch(self, flag: int) -> Chain:
        """Add an IF node on the byte at device address ``flag``; returns the chain of its body."""
        handle, setter = self._owner.condition(self._graph, self._last, flag)
        node, body = self._owner.if_node(self._graph, [setter], handle)
        self._last = [node]
        return Chain(self._owner, body)


def call(driver: Any, name: str, *arguments: Any) -> Any:
    """The results of the driver's function ``name``; ``CudaError`` where it returns an error."""
    error, *values = getattr(driver, name)(*arguments)
    if int(error) != 0:
        raise CudaError(f"{name}: {getattr(error, 'name', error)}")
    return values[0] if len(values) == 1 else tuple(values)


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver
