// Runs what inductor made of a segment without Python: a straight line of calls over registers.
//
// Such a line allocates a tensor, takes a view, calls a loop that inductor compiled, or calls an
// operator. In Python each costs microseconds, and a layer has thirty of them; `native_program.py`
// reads the lines and writes them down here once.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/inductor_ops.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "results.h"

namespace eepass {
namespace {

using Numbers = std::vector<int64_t>;
using Registers = std::vector<c10::IValue>;

// Arguments of a compiled loop are pointers and integers, which the calling convention passes alike.
constexpr size_t MOST_ARGUMENTS = 64;
template <size_t... I>
void call_with(int64_t function, const int64_t* arguments, std::index_sequence<I...>) {
  using Function = void (*)(decltype(static_cast<int64_t>(I))...);
  reinterpret_cast<Function>(function)(arguments[I]...);
}
using Caller = void (*)(int64_t, const int64_t*);
template <size_t... N>
constexpr std::array<Caller, sizeof...(N)> callers_of(std::index_sequence<N...>) {
  return {[](int64_t function, const int64_t* arguments) {
    call_with(function, arguments, std::make_index_sequence<N>());
  }...};
}
constexpr auto CALLERS = callers_of(std::make_index_sequence<MOST_ARGUMENTS + 1>());

// How an argument is written: its kind, then what belongs to it.
enum Argument : int64_t {
  REGISTER = 0,  // its number
  NONE = 1,
  INTEGER = 2,  // the number
  BOOLEAN = 3,  // 0 or 1
  REAL = 4,  // its place among the real numbers
  TENSORS = 5,  // how many, then their registers
  MAYBE_TENSORS = 6,  // the same, -1 for None
  INTEGERS = 7,  // how many, then the numbers
};

enum class Kind { empty, view, item, loop, call, free };
struct Step {
  Kind kind;
  int64_t to = -1, from = -1, number = 0;
  Numbers sizes, strides, code;
  std::vector<double> reals;
  c10::ScalarType dtype = c10::ScalarType::Float;
  std::optional<c10::OperatorHandle> op;
};

c10::IValue argument(const Step& step, size_t& at, Registers& registers) {
  const Numbers& code = step.code;
  const int64_t kind = code[at++];
  switch (kind) {
    case REGISTER: return registers[code[at++]];
    case NONE: return {};
    case INTEGER: return code[at++];
    case BOOLEAN: return code[at++] != 0;
    case REAL: return step.reals[code[at++]];
    case INTEGERS: {
      const int64_t count = code[at++];
      c10::List<int64_t> list;
      list.reserve(count);
      for (int64_t i = 0; i < count; i++) list.push_back(code[at++]);
      return list;
    }
    case TENSORS: {
      const int64_t count = code[at++];
      c10::List<at::Tensor> list;
      list.reserve(count);
      for (int64_t i = 0; i < count; i++) list.push_back(registers[code[at++]].toTensor());
      return list;
    }
    default: {
      const int64_t count = code[at++];
      c10::List<std::optional<at::Tensor>> list;
      list.reserve(count);
      for (int64_t i = 0; i < count; i++) {
        const int64_t from = code[at++];
        list.push_back(from < 0 ? std::nullopt
                                : std::make_optional(registers[from].toTensor()));
      }
      return list;
    }
  }
}

struct Program : torch::CustomClassHolder {
  Program(int64_t inputs, int64_t registers) : inputs(inputs), registers(registers) {}

  void empty(int64_t to, Numbers sizes, Numbers strides, at::ScalarType dtype) {
    Step step{Kind::empty, to};
    step.sizes = std::move(sizes), step.strides = std::move(strides), step.dtype = dtype;
    add(std::move(step));
  }
  void view(int64_t to, int64_t from, Numbers sizes, Numbers strides, int64_t offset) {
    Step step{Kind::view, to, from, offset};
    step.sizes = std::move(sizes), step.strides = std::move(strides);
    add(std::move(step));
  }
  void item(int64_t to, int64_t from, int64_t index) { add({Kind::item, to, from, index}); }
  void free(int64_t from) { add({Kind::free, -1, from}); }
  // `code`: REGISTER and INTEGER arguments
  void loop(int64_t address, Numbers code) {
    TORCH_CHECK(code.size() <= 2 * MOST_ARGUMENTS, "a loop of ", code.size() / 2, " arguments");
    Step step{Kind::loop, -1, -1, address};
    step.code = std::move(code);
    add(std::move(step));
  }
  void call(int64_t to, const std::string& name, const std::string& overload, Numbers code,
            std::vector<double> reals) {
    Step step{Kind::call, to};
    step.op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    step.code = std::move(code), step.reals = std::move(reals);
    add(std::move(step));
  }
  void give_back(Numbers from) { outputs = std::move(from); }

  std::vector<at::Tensor> run(const std::vector<at::Tensor>& given) const {
    check_inputs(given.size());
    Registers values(registers);
    for (int64_t i = 0; i < inputs; i++) values[i] = given[i];
    return run_with(std::move(values));
  }
  void check_inputs(size_t given) const {
    TORCH_CHECK(static_cast<int64_t>(given) == inputs, "a program of ", inputs,
                " inputs was given ", given);
  }
  Registers new_registers() const { return Registers(registers); }
  // `values` begins with the inputs
  std::vector<at::Tensor> run_with(Registers values) const {
    for (const Step& step : steps) execute(step, values);
    std::vector<at::Tensor> results;
    results.reserve(outputs.size());
    for (int64_t from : outputs) results.push_back(values[from].toTensor());
    return results;
  }

 private:
  void add(Step step) { steps.push_back(std::move(step)); }

  static void execute(const Step& step, Registers& values) {
    switch (step.kind) {
      case Kind::empty:
        values[step.to] = result(step.sizes, step.strides, step.dtype);
        return;
      case Kind::view:
        values[step.to] = torch::inductor::_reinterpret_tensor(
            values[step.from].toTensor(), step.sizes, step.strides, step.number);
        return;
      case Kind::item: values[step.to] = element(values[step.from], step.number); return;
      case Kind::free: values[step.from] = c10::IValue(); return;
      case Kind::loop: {
        int64_t arguments[MOST_ARGUMENTS];
        const size_t count = step.code.size() / 2;
        for (size_t i = 0; i < count; i++) {
          const int64_t value = step.code[2 * i + 1];
          arguments[i] = step.code[2 * i] == REGISTER
                             ? reinterpret_cast<int64_t>(values[value].toTensor().data_ptr())
                             : value;
        }
        CALLERS[count](step.number, arguments);
        return;
      }
      case Kind::call: {
        std::vector<c10::IValue> stack;
        const size_t count = step.op->schema().arguments().size();
        stack.reserve(count);
        for (size_t at = 0; at < step.code.size();) stack.push_back(argument(step, at, values));
        step.op->callBoxed(&stack);
        if (step.to >= 0) values[step.to] = std::move(stack.at(0));
      }
    }
  }

  static c10::IValue element(const c10::IValue& list, int64_t index) {
    return list.isTensorList() ? c10::IValue(list.toTensorList().get(index)) : list;
  }

  int64_t inputs, registers;
  std::vector<Step> steps;
  Numbers outputs;
};

// Programs that run one after another, each on the hidden state that the one before returns: the
// layers of a pass. All other inputs are there already, but for those that change with each pass.
struct Chain : torch::CustomClassHolder {
  struct Link {
    c10::intrusive_ptr<Program> program;
    // nothing where an input comes with the call
    std::vector<std::optional<at::Tensor>> inputs;
    int64_t hidden;
    Numbers places, which;
  };

  // Input number places[i] of the program is number which[i] of what changes.
  void add(c10::intrusive_ptr<Program> program, std::vector<std::optional<at::Tensor>> inputs,
           int64_t hidden, Numbers places, Numbers which) {
    program->check_inputs(inputs.size());
    TORCH_CHECK(places.size() == which.size(), "each place needs an input");
    const int64_t count = inputs.size();
    for (const int64_t place : places) TORCH_CHECK(0 <= place && place < count, "place ", place);
    TORCH_CHECK(0 <= hidden && hidden < count, "hidden state at ", hidden, " of ", count, " inputs");
    links.push_back({std::move(program), std::move(inputs), hidden, std::move(places),
                     std::move(which)});
  }

  // From the hidden state before link `first` to those before each of `stops`, in ascending order.
  std::vector<at::Tensor> run(int64_t first, const Numbers& stops, at::Tensor hidden,
                              const std::vector<at::Tensor>& changing) const {
    TORCH_CHECK(!stops.empty(), "a chain stops somewhere");
    const int64_t end = stops.back();
    TORCH_CHECK(0 <= first && first <= end && end <= static_cast<int64_t>(links.size()),
                "links ", first, " to ", end, " of ", links.size());
    std::vector<at::Tensor> found;
    size_t next = 0;
    for (int64_t number = first; number < end; number++) {
      for (; stops[next] <= number; next++) found.push_back(hidden);
      const Link& link = links[number];
      Registers values = link.program->new_registers();
      for (size_t i = 0; i < link.inputs.size(); i++)
        if (link.inputs[i]) values[i] = *link.inputs[i];
      for (size_t i = 0; i < link.places.size(); i++)
        values[link.places[i]] = changing.at(link.which[i]);
      values[link.hidden] = std::move(hidden);
      hidden = std::move(link.program->run_with(std::move(values)).at(0));
    }
    for (; next < stops.size(); next++) found.push_back(hidden);
    return found;
  }

 private:
  std::vector<Link> links;
};

}  // namespace
}  // namespace eepass

TORCH_LIBRARY_FRAGMENT(eepass, m) {
  m.class_<eepass::Program>("Program")
      .def(torch::init<int64_t, int64_t>())
      .def("empty", &eepass::Program::empty)
      .def("view", &eepass::Program::view)
      .def("item", &eepass::Program::item)
      .def("free", &eepass::Program::free)
      .def("loop", &eepass::Program::loop)
      .def("call", &eepass::Program::call)
      .def("give_back", &eepass::Program::give_back)
      .def("run", &eepass::Program::run);
  m.class_<eepass::Chain>("Chain")
      .def(torch::init<>())
      .def("add", &eepass::Chain::add)
      .def("run", &eepass::Chain::run);
}
