"""Decode with an exported model in ONNX Runtime, without PyTorch or transformers.

The caches are bound once and stay in place: a step returns new rows of keys and values, and they
are written to their slots here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eepass.errors import InputError
from eepass.onnx.files import AGAIN, ENTRY, NEVER, PROMPT, WEIGHTS, OnnxMetadata, needed

# of ONNX Runtime's names for them
DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}


class OnnxStep(NamedTuple):
    """A token of the answer and its exit layer."""

    token: int
    exit_layer: int


class OnnxDecoder:
    """The two graphs beside ``file`` (``decode.onnx``), in ONNX Runtime on the CPU.

    One sequence at a time, greedy. ``threads``: 0 takes all cores. Raises ``InputError`` for files
    that are missing, damaged, or not written by ``export_onnx``.
    """

    def __init__(self, file: Path, threads: int = 0) -> None:
        self._runtime = needed("onnxruntime")
        self.file, self.threads = file, threads
        for name in (PROMPT, WEIGHTS):
            if not (file.parent / name).is_file():
                raise InputError(
                    f"{file}: no {name} beside it: not written by eepass export-onnx, or in part"
                )
        decode, self.metadata = self._session(file)
        size = (file.parent / WEIGHTS).stat().st_size
        if size != self.metadata.weights:
            raise InputError(
                f"{file.parent / WEIGHTS}: {size} bytes, not {self.metadata.weights}; {AGAIN}"
            )
        prompt, metadata = self._session(file.parent / PROMPT)
        if metadata != self.metadata:
            raise InputError(f"{file.parent / PROMPT}: of another export than {file.name}; {AGAIN}")
        inputs = [x for x in prompt.get_inputs() if x.name.startswith(("keys.", "values."))]
        self.caches = {x.name: np.zeros(x.shape, np.float32) for x in inputs}
        self.thresholds = np.full(self.metadata.layers + 1, NEVER, np.float32)
        for layer, threshold in self.metadata.exits.items():
            self.thresholds[int(layer)] = threshold
        self._prompt = _Bound(self._runtime, prompt, self.caches)
        self._decode = _Bound(self._runtime, decode, self.caches)

    def stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 128,
        thresholds: np.ndarray | None = None,
        stop: frozenset[int] | None = None,
    ) -> Iterator[OnnxStep]:
        """The tokens after ``ids``, up to and including an end token.

        ``thresholds``: float32 [L + 1] instead of the calibrated ones, 1 and more where no token
        may exit. ``stop``: end tokens instead of the model's. Raises ``InputError`` for a prompt
        that is empty or does not fit.
        """
        most, found = self.metadata.max_length, self.metadata
        if not ids:
            raise InputError("the prompt is empty: give at least one token")
        if len(ids) + max_new_tokens - 1 > most:
            raise InputError(
                f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones do not fit "
                f"{most}: ask for fewer, or export with a larger --max-length"
            )
        ends = frozenset(found.stop) if stop is None else stop
        step = OnnxStep(self.prefill(ids), found.layers)
        recent = np.zeros(found.window, np.int64)
        recent[-1] = found.layers
        for count in range(1, max_new_tokens + 1):
            yield step
            if step.token in ends or count == max_new_tokens:
                return
            step, recent = self.step(step.token, len(ids) + count - 1, recent, thresholds)

    def dense(self) -> np.ndarray:
        """Thresholds with which no token exits early and no predictor runs."""
        return np.full_like(self.thresholds, NEVER)

    def prefill(self, ids: Sequence[int]) -> int:
        """Fill the caches with a prompt from slot 0 on; returns the token that follows it."""
        size, token = self.metadata.prompt_rows, -1
        for start in range(0, len(ids), size):
            chunk = list(ids[start : start + size])
            padded = np.array([chunk + chunk[-1:] * (size - len(chunk))])
            inputs = {"ids": padded, "start": [start], "last": [len(chunk) - 1]}
            token = int(self._prompt.run(inputs)["token"][0])
            self._prompt.keep(start, len(chunk))
        return token

    def step(
        self, token: int, position: int, recent: np.ndarray, thresholds: np.ndarray | None = None
    ) -> tuple[OnnxStep, np.ndarray]:
        """Run ``token`` at ``position``; returns the next step and ``recent`` with its exit."""
        inputs = {
            "ids": [[token]],
            "position": [position],
            "recent": recent,
            "threshold": self.thresholds if thresholds is None else thresholds,
        }
        found = self._decode.run(inputs)
        self._decode.keep(position, 1)
        step = OnnxStep(int(found["token"][0]), int(found["exit_layer"][0]))
        return step, found["new_recent"].copy()

    def _session(self, file: Path) -> tuple[Any, OnnxMetadata]:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        # log fatal errors only: all others are raised
        options.log_severity_level = 4
        try:
            session = self._runtime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors share no type of their own
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{file}: ONNX Runtime cannot load it, or {WEIGHTS} beside it; {AGAIN} ({reason})"
            ) from error
        entries: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
        return session, OnnxMetadata.read(entries.get(ENTRY), file)


class _Bound:
    """A session with bound inputs and outputs: nothing is copied but new rows."""

    def __init__(self, runtime: Any, session: Any, caches: Mapping[str, np.ndarray]) -> None:
        self.session = session
        self.binding = session.io_binding()
        self.inputs, self.outputs = dict(caches), dict[str, np.ndarray]()
        # the binding does not keep the arrays alive
        self.values: list[Any] = []

        def bind(bound: Any, arrays: dict[str, np.ndarray], bind_value: Any) -> None:
            array = arrays.setdefault(bound.name, np.zeros(bound.shape, DTYPES[bound.type]))
            self.values.append(runtime.OrtValue.ortvalue_from_numpy(array))
            bind_value(bound.name, self.values[-1])

        for each in (*session.get_inputs(), *session.get_overridable_initializers()):
            bind(each, self.inputs, self.binding.bind_ortvalue_input)
        for each in session.get_outputs():
            bind(each, self.outputs, self.binding.bind_ortvalue_output)
        self._new = [(self.outputs[f"new_{name}"], cache) for name, cache in caches.items()]

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs by name, overwritten by the next run."""
        for name, value in inputs.items():
            self.inputs[name][...] = value
        self.session.run_with_iobinding(self.binding)
        return self.outputs

    def keep(self, slot: int, count: int) -> None:
        """Write the first ``count`` new rows to the caches, from ``slot`` on."""
        for rows, cache in self._new:
            cache[:, :, slot : slot + count] = rows[:, :, :count]
