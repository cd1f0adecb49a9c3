"""The kernel that sets a graph's condition: what its PTX says, run instruction by instruction."""

import itertools
import re
import subprocess

import pytest
import torch

from eepass.codegen.cuda.conditional import (
    ENTRY,
    MODES,
    PARAMETERS,
    setter_arguments,
    setter_source,
)

BODY = re.compile(r"\{(.*)\}\s*$", re.DOTALL)
MEANING = {
    "any": any,
    "all": all,
    "none": lambda flags: not any(flags),
    "not all": lambda flags: not all(flags),
}


def run_ptx(handle, flags, mode):
    """What the kernel hands to ``cudaGraphSetConditional``, by its PTX."""
    memory = {4096 + index: int(flag) for index, flag in enumerate(flags)}
    parameters = {"handle": handle, "flags": 4096, "count": len(flags), "mode": mode}
    body = BODY.search(setter_source())[1]
    lines = [line.strip().rstrip(";") for line in body.splitlines()]
    lines = [line for line in lines if line and not line.startswith((".reg", ".param", "{", "}"))]
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    value, passed, at = {}, {}, 0

    def of(operand):
        return value[operand] if operand.startswith("%") else int(operand)

    def evaluate(operation, operands):
        match operation.split("."):
            case "ld", "param", _:
                return parameters[operands[0].strip("[]")]
            case "ld", "volatile", "u8":
                return memory[of(operands[0].strip("[]"))]
        given = [of(operand) for operand in operands]
        match operation.split(".")[:2]:
            case "mov", _:
                return given[0]
            case "setp", "ge":
                return given[0] >= given[1]
            case "setp", "ne":
                return given[0] != given[1]
            case "selp", _:
                return given[0] if given[2] else given[1]
            case "or", _:
                return given[0] | given[1]
            case "and", _:
                return given[0] & given[1]
            case "xor", _:
                return given[0] ^ given[1]
            case "shr", _:
                return given[0] >> given[1]
            case "add", _:
                return given[0] + given[1]
        raise AssertionError(f"{operation} is not known")

    for _ in range(1000):
        line = lines[at]
        at += 1
        if line.endswith(":"):
            continue
        if line.startswith("@"):
            predicate, line = line[1:].split(" ", 1)
            if not value[predicate]:
                continue
        operation, _, rest = line.partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        if operation == "bra":
            at = labels[operands[0]]
        elif operation.startswith("st.param"):
            passed[operands[0].strip("[]")] = of(operands[1])
        elif operation == "call.uni":
            assert rest == "cudaGraphSetConditional, (given_handle, given_value)"
            made = passed["given_handle"], passed["given_value"]
        elif operation == "ret":
            return made
        else:
            value[operands[0]] = evaluate(operation, operands[1:])
    raise AssertionError("it does not end")


@pytest.mark.parametrize("when", MODES)
def test_the_condition_is_what_the_mode_says_of_the_flags(when):
    for rows in range(4):
        for flags in itertools.product((False, True), repeat=rows):
            handle, condition = run_ptx(2**40 + 7, flags, MODES[when])
            assert handle == 2**40 + 7 and condition == int(MEANING[when](flags)), flags


@pytest.mark.parametrize("capability", (80, 86, 89, 90))
def test_the_assembler_takes_it_and_no_other_unknown_function(tmp_path, capability):
    triton = pytest.importorskip("triton")
    source = setter_source()
    for name, known in (("cudaGraphSetConditional", True), ("noSuchFunction", False)):
        file = tmp_path / "setter.ptx"
        file.write_text(source.replace("cudaGraphSetConditional", name))
        assembler = str(triton.knobs.nvidia.ptxas.path)
        command = [assembler, f"-arch=sm_{capability}", str(file), "-o", f"{file}.cubin"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode == 0) == known, result.stderr


def test_what_it_is_given_fits_its_parameters():
    source = setter_source()
    entry = re.search(rf"\.entry {ENTRY}\((.*?)\)", source, re.DOTALL)[1]
    assert tuple(re.findall(r"\.param \.(\w+)", entry)) == PARAMETERS
    flags = torch.zeros(3, dtype=torch.bool)
    assert setter_arguments(5, flags, "not all") == (5, flags.data_ptr(), 3, 3)
    with pytest.raises(ValueError, match=r"flags: torch\.float32, expected bool"):
        setter_arguments(5, flags.float(), "any")
