"""Which launch mode is chosen where, what is refused, and how a graph with IF nodes is built: with
a driver that records its calls."""

from types import SimpleNamespace

import pytest
import torch
from models import eager_compile
from steps import OrderedExits

from eepass.errors import EngineError
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.step import conditional_graph, launching
from eepass.runtime.step.conditional_graph import ConditionalGraph, CudaError
from eepass.runtime.step.data import Conditional, blocks
from eepass.runtime.step.launching import choose, make_engine, require_device, require_room
from eepass.runtime.step.layout import StepOptions

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Call:
    """A driver's struct, or an attribute of one: takes whatever is set."""

    def __init__(self, *values):
        self.values = values

    def __int__(self):
        return self.values[0]


class FakeDriver:
    """Returns what the driver returns, and records nodes: (graph, kind, node before, detail)."""

    CUgraph = CUstream = CUgraphEdgeData = Call
    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_CONDITIONAL="conditional")
    CUgraphConditionalNodeType = SimpleNamespace(CU_GRAPH_COND_TYPE_IF="if")
    CUDA_KERNEL_NODE_PARAMS = SimpleNamespace

    def __init__(self, version=12040, failing=""):
        self.version, self.failing = version, failing
        self.nodes, self.handles, self.launched, self.gone = [], {}, [], []
        self._next = 100

    def CUgraphNodeParams(self):
        return SimpleNamespace(conditional=SimpleNamespace(phGraph_out=[0]))

    def _new(self, call):
        if call == self.failing:
            return SimpleNamespace(name="CUDA_ERROR_FAILED", __int__=None), None
        self._next += 1
        return 0, self._next

    def _node(self, graph, kind, before, detail):
        error, node = self._new(kind)
        self.nodes.append((graph, kind, before[0] if before else None, detail))
        return error, node

    def cuDriverGetVersion(self):
        return 0, self.version

    def cuGraphCreate(self, flags):
        return 0, "step"

    def cuCtxGetCurrent(self):
        return 0, "context"

    def cuModuleLoadData(self, code):
        assert code.endswith(b"\0")
        return 0, "module"

    def cuModuleGetFunction(self, module, name):
        return 0, "setter"

    def cuGraphConditionalHandleCreate(self, graph, context, default, flags):
        error, handle = self._new("handle")
        self.handles[handle] = graph
        return error, handle

    def cuGraphAddKernelNode(self, graph, before, count, given):
        (handle, flag), _ = given.kernelParams
        # a handle belongs to the graph its node is in
        assert given.func == "setter" and self.handles[handle] == graph and count == len(before)
        return self._node(graph, "set", before, flag)

    def cuGraphAddChildGraphNode(self, graph, before, count, child):
        return self._node(graph, "child", before, int(child))

    def cuGraphAddNode(self, graph, before, data, count, given):
        assert count == len(before) == len(data) and given.conditional.type == "if"
        given.conditional.phGraph_out[0] = f"body {len(self.nodes)}"
        return self._node(graph, "if", before, f"body {len(self.nodes)}")

    def cuGraphInstantiate(self, graph, flags):
        return 0, "executable"

    def cuGraphUpload(self, executable, stream):
        return (0,)

    def cuGraphLaunch(self, executable, stream):
        self.launched.append(int(stream))
        return (0,)

    def cuGraphExecDestroy(self, executable):
        self.gone.append(executable)
        return (0,)

    cuGraphDestroy = cuModuleUnload = cuGraphExecDestroy


@pytest.fixture(scope="module")
def decoder(llama_splits):
    return Decoder(llama_splits, eager_compile)


def test_a_step_becomes_a_chain_of_graphs_and_if_nodes(decoder):
    """Nodes form chains; a flag is read right before the IF node that depends on it, in the same
    graph; bodies are chains of their own."""
    step = launching.build_step(decoder, OrderedExits((1, 2), [], [1], [1]), StepOptions())
    driver = FakeDriver()
    graph, children = ConditionalGraph(driver), iter(range(1, 100))

    def add(items, chain):
        for entry in blocks(items):
            if isinstance(entry, Conditional):
                add(entry.body, chain.branch(step[entry.flag].data_ptr()))
            else:
                chain.child(next(children))

    add(step.items, graph.chain)
    kinds = [kind for where, kind, _, _ in driver.nodes if where == "step"]
    top = blocks(step.items)
    expected = [["set", "if"] if isinstance(entry, Conditional) else ["child"] for entry in top]
    assert kinds == [kind for entry in expected for kind in entry]
    seen = {}
    for number, (where, kind, before, _) in enumerate(driver.nodes):
        # a chain: the first node of a graph follows nothing, each other the one before it
        assert (before is None) == (where not in seen)
        seen[where] = number
        if kind == "set":
            after = driver.nodes[number + 1]
            assert after[:2] == (where, "if")
    flags = [detail for where, kind, _, detail in driver.nodes if kind == "set"]
    assert (
        flags.count(step["active.1"].data_ptr()) == flags.count(step["needs_head"].data_ptr()) == 1
    )
    # two exits, each asks and verifies; two segments behind, for one row or more; the head
    assert len(flags) == 2 * 2 + 2 * (1 + 1 + 3) + 1
    bodies = {detail for _, kind, _, detail in driver.nodes if kind == "if"}
    assert bodies == set(seen) - {"step"}, "no body is empty"
    graph.instantiate(7)
    graph.launch(7)
    assert driver.launched == [7]
    graph.close()
    assert driver.gone == ["executable", "step", "module"]


def test_a_call_that_fails_is_named():
    class Failed:
        name = "CUDA_ERROR_INVALID_VALUE"

        def __int__(self):
            return 1

    driver = FakeDriver()
    driver.cuGraphAddChildGraphNode = lambda *_: (Failed(), None)
    with pytest.raises(CudaError, match="cuGraphAddChildGraphNode: CUDA_ERROR_INVALID_VALUE"):
        ConditionalGraph(driver).chain.child(1)


def test_the_bindings_structs_take_what_they_are_given():
    """The real ones, as far as they go without a driver."""
    import ctypes

    driver = pytest.importorskip("cuda.bindings.driver")
    given = driver.CUDA_KERNEL_NODE_PARAMS()
    given.kernelParams = ((5, 0x7F0012345678), (ctypes.c_uint64, ctypes.c_uint64))
    table = (ctypes.c_void_p * 2).from_address(int(given.kernelParams))
    assert [ctypes.c_uint64.from_address(at).value for at in table] == [5, 0x7F0012345678]
    real = SimpleNamespace(
        CUgraphNodeParams=driver.CUgraphNodeParams,
        CUgraphNodeType=driver.CUgraphNodeType,
        CUgraphConditionalNodeType=driver.CUgraphConditionalNodeType,
        cuGraphAddNode=lambda graph, before, data, count, params: (0, "node"),
    )
    graph = ConditionalGraph(FakeDriver())
    graph.driver, graph._context = real, driver.CUcontext(9)
    node, body = graph.if_node(driver.CUgraph(3), [], driver.CUgraphConditionalHandle(4))
    assert node == "node" and isinstance(body, driver.CUgraph)


def test_the_setter_assembles():
    """The kernel that sets conditions is PTX; an assembler comes with triton."""
    import subprocess
    import tempfile
    from pathlib import Path

    triton = pytest.importorskip("triton")
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not assembler.exists():
        pytest.skip("this triton brings no ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "setter.ptx"
        source.write_text(conditional_graph.SETTER)
        for target in ("sm_75", "sm_90", "sm_100"):
            command = [assembler, "-arch", target, source, "-o", Path(folder) / "out"]
            ran = subprocess.run(command, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "version, capability, message",
    (
        (12030, (9, 0), "CUDA 12.3; conditional nodes need 12.4"),
        (12040, (9, 0), ""),
        (12040, (7, 0), "below 7.5"),
        (13000, (9, 0), ""),
    ),
)
def test_where_there_are_conditional_nodes(monkeypatch, version, capability, message):
    monkeypatch.setattr(conditional_graph, "_driver", lambda: FakeDriver(version))
    found = conditional_graph.conditional_nodes_missing(capability)
    assert message in found and bool(message) == bool(found)


def test_what_is_missing_for_them_is_named(monkeypatch):
    def missing():
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(conditional_graph, "_driver", missing)
    assert "pip install cuda-bindings" in conditional_graph.conditional_nodes_missing((9, 0))
    monkeypatch.setattr(conditional_graph, "_driver", SimpleNamespace)
    assert "too old" in conditional_graph.conditional_nodes_missing((9, 0))


@pytest.mark.parametrize(
    "launch, missing, mode",
    (
        ("auto", "", "device"), ("auto", "too old", "host"), ("host", "", "host"),
        ("predicated", "too old", "predicated"), ("device", "", "device"),
    ),
)  # fmt: skip
def test_the_mode_taken_on_a_gpu_and_why(monkeypatch, launch, missing, mode):
    monkeypatch.setattr(launching, "_missing", lambda device: missing)
    found = choose(launch, CUDA)
    assert found.mode == mode
    if launch == "auto" and missing:
        assert "too old" in found.reason and found.missing == ("too old",)


@pytest.mark.parametrize(
    "launch, device, message",
    (
        ("device", CPU, "needs a CUDA device"),
        ("predicated", CPU, "needs a CUDA device"),
        ("fast", CPU, "one of auto, device"),
        ("interpret", CUDA, "on a CPU only"),
        ("device", CUDA, "driver is old; use launch='host'"),
    ),
)
def test_modes_that_cannot_run_here(monkeypatch, launch, device, message):
    monkeypatch.setattr(launching, "_missing", lambda device: "driver is old")
    with pytest.raises(EngineError, match=message):
        choose(launch, device)


@pytest.mark.parametrize(
    "device, dtype, message",
    (
        (CPU, torch.float64, "float64 is not supported: use float32"),
        (torch.device("meta"), torch.float32, "must be cpu or cuda"),
        (CUDA, torch.float32, "use device='cpu'"),
    ),
)
def test_devices_that_cannot_decode(monkeypatch, device, dtype, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=message):
        require_device(device, dtype)


def test_a_gpu_without_bfloat16_and_one_too_small(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a T4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 10**9, 16 * 10**9))
    require_device(CUDA, torch.float16)
    with pytest.raises(EngineError, match="a T4 has no bfloat16: load the model in float16"):
        require_device(CUDA, torch.bfloat16)
    require_room(CUDA, 2 * 10**9)
    with pytest.raises(EngineError, match=r"need 14\.0 GB, 3\.0 GB are free on a T4: lower"):
        require_room(CUDA, 14 * 10**9)


@pytest.mark.parametrize(
    "error, message",
    (
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory while capturing.*lower max_"),
        (CudaError("cuGraphInstantiate: CUDA_ERROR"), "cuGraphInstantiate.*use launch='calls'"),
        (RuntimeError("CUDA error: captured\nand more"), "host cannot.*error: captured: use"),
    ),
)
def test_capturing_that_fails_says_what_to_do_and_leaves_a_usable_process(
    monkeypatch, decoder, error, message
):
    def fail(*_):
        raise error

    mode = choose("host", CPU)
    with monkeypatch.context() as patch:
        patch.setattr(launching, "HostDriven", fail)
        with pytest.raises(EngineError, match=message):
            make_engine(decoder, None, StepOptions(), mode)
    engine, report = make_engine(decoder, None, StepOptions(), mode)
    assert len(list(engine.generate([5, 6, 7], 4))) == 4
    assert report().mode == "host" and report().bytes == engine.step.nbytes


@pytest.mark.parametrize("failing, mode", (({"device"}, "host"), ({"device", "host"}, "calls")))
@pytest.mark.parametrize("error", (CudaError("cuGraphCreate: FAILED"), RuntimeError("capturing")))
def test_a_step_that_cannot_be_captured_is_launched_in_a_simpler_mode(
    monkeypatch, decoder, failing, mode, error
):
    made = launching._engine

    def engine(decoder, step, mode, *options):
        if mode in failing:
            raise error
        return made(decoder, step, mode, *options)

    monkeypatch.setattr(launching, "_engine", engine)
    best = launching.Launching("device", "conditional graph nodes are there", auto=True)
    engine, report = make_engine(decoder, None, StepOptions(), best)
    assert report().mode == mode and len(report().missing) == len(failing)
    assert str(error) in report().reason and "device cannot" in report().missing[0]
    assert len(list(engine.generate([5, 6, 7], 4))) == 4
    # whoever asked for a mode gets it or is told
    with pytest.raises(EngineError, match=r"mode device cannot launch.*use launch='host'"):
        make_engine(decoder, None, StepOptions(), launching.Launching("device", "asked for"))
