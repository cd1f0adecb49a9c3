"""The names of torch and transformers used here that their documentation does not promise.

    from eepass.private_names import compile_fx

imports ``torch._inductor.compile_fx`` when that line runs. All are in torch 2.11 to 2.15 and in
transformers 5.17 to 5.24, but for those in ``SINCE``; a release without one fails here, by name.
Attributes with an underscore (``OpOverload._schema``, ``Tensor._version``) stay where they are
read.
"""

from __future__ import annotations

import importlib
from typing import Any

from eepass.errors import InputError

# by the name used here: the module, and the attribute of it; a module alone stands for itself
PLACES = {
    "AOTIModelContainerRunnerCpu": "torch:_C._aoti.AOTIModelContainerRunnerCpu",
    "AsyncCompile": "torch._inductor.async_compile:AsyncCompile",
    "CppPythonBindingsCodeCache": "torch._inductor.codecache:CppPythonBindingsCodeCache",
    "FakeTensorMode": "torch._subclasses:FakeTensorMode",
    "InstructionTranslator": "torch._dynamo.symbolic_convert:InstructionTranslator",
    "OpOverload": "torch._ops:OpOverload",
    "TorchDynamoException": "torch._dynamo.exc:TorchDynamoException",
    "TracingContext": "torch._guards:TracingContext",
    "clear_cublas_workspaces": "torch:_C._cuda_clearCublasWorkspaces",
    "compile_fx": "torch._inductor.compile_fx:compile_fx",
    "compile_fx_aot": "torch._inductor.compile_fx:compile_fx_aot",
    "compile_fx_inner": "torch._inductor.compile_fx:compile_fx_inner",
    "cuda_driver_version": "torch:_C._cuda_getDriverVersion",
    "dynamo_guards": "torch:_C._dynamo.guards",
    "foreach_add_": "torch:_foreach_add_",
    "functorch_config": "torch._functorch.config",
    "inductor_cache_dir": "torch._inductor.runtime.cache_dir_utils:default_cache_dir",
    "inductor_config": "torch._inductor.config",
    "is_traceable_wrapper_subclass": "torch.utils._python_dispatch:is_traceable_wrapper_subclass",
    "list_mode_options": "torch._inductor:list_mode_options",
    "log_api_usage_once": "torch:_C._log_api_usage_once",
    "lookup_backend": "torch._dynamo.backends.registry:lookup_backend",
    "tracing": "torch._guards:tracing",
    "DFlashCache": "transformers.cache_utils:DFlashCache",
    "DummyLayer": "transformers.cache_utils:DummyLayer",
    "DynamicLayer": "transformers.cache_utils:DynamicLayer",
    "LinearAttentionAndStaticFullAttentionLayer": (
        "transformers.cache_utils:LinearAttentionAndStaticFullAttentionLayer"
    ),
    "LinearAttentionCacheLayerMixin": "transformers.cache_utils:LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer": "transformers.cache_utils:LinearAttentionLayer",
    "MtpCache": "transformers.cache_utils:MtpCache",
    "MtpModel": "transformers.modeling_layers:MtpModel",
    "ROPE_INIT_FUNCTIONS": "transformers.modeling_rope_utils:ROPE_INIT_FUNCTIONS",
    "StaticLayer": "transformers.cache_utils:StaticLayer",
    "StaticSlidingWindowLayer": "transformers.cache_utils:StaticSlidingWindowLayer",
    "TENSOR_PROCESSORS": "transformers.modeling_gguf_pytorch_utils:TENSOR_PROCESSORS",
    "TensorProcessor": "transformers.modeling_gguf_pytorch_utils:TensorProcessor",
    "get_checkpoint_shard_files": "transformers.utils.hub:get_checkpoint_shard_files",
    "get_gguf_hf_weights_map": "transformers.modeling_gguf_pytorch_utils:get_gguf_hf_weights_map",
}
# the version that brought a name, which is None before
SINCE = {"DummyLayer": (5, 23)}
# builds of torch for the CPU alone are without
CUDA = ("clear_cublas_workspaces", "cuda_driver_version")


def __getattr__(name: str) -> Any:
    """What ``PLACES`` says of ``name``; ``InputError`` where the installed version has it not."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, _, attributes = PLACES[name].partition(":")
    try:
        found: Any = importlib.import_module(home)
        for attribute in filter(None, attributes.split(".")):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        package = importlib.import_module(home.partition(".")[0])
        if name in SINCE and _number(package.__version__) < SINCE[name]:
            return None
        raise InputError(
            f"{package.__name__} {package.__version__} has no {PLACES[name].replace(':', '.')}, "
            "which eepass uses: install a version that docs/versions.md lists"
        ) from error
    return found


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
