// Calls of operators that were made once from Python, and are made again from here: what a graph is on an accelerator.
//
// PyTorch's observers tell of every call of its dispatcher while a thread records. Calls inside others are made again by
// those. A tensor that a recorded call gave is the one that its new call gives; every other argument stays what it was.
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "operators.h"

namespace liaoyuan {

namespace {

using c10::IValue;

// A result, counted through all calls; -1: none, the argument is a constant.
using Place = int64_t;

class Recording {
  struct Argument {
    IValue constant;
    Place place = -1;
    std::vector<Place> places = {};  // of a list of tensors, if any is a result
  };
  struct Call {
    c10::OperatorHandle op;
    std::vector<Argument> arguments;
    size_t results;
  };
  std::vector<Call> calls;
  std::vector<IValue> values;
  std::vector<Place> wanted;
  std::unordered_map<const void*, Place> place_of;  // by tensor, while it is recorded

 public:
  std::string problem;  // why it cannot be made again

  void add(const c10::OperatorHandle& op, const std::vector<IValue>& inputs, const std::vector<IValue>& outputs) {
    const c10::FunctionSchema& schema = op.schema();
    if (outputs.size() != schema.returns().size()) return;  // it raised an error
    if (inputs.size() != schema.arguments().size()) return fail(op, "is told without its arguments");
    Call call{op, {}, outputs.size()};
    for (const IValue& input : inputs) call.arguments.push_back(argument(input));
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!outputs[i].isTensor()) return fail(op, "gives more than tensors");
      // What is written in place stays the argument that it is.
      if (!schema.returns()[i].alias_info() || !schema.returns()[i].alias_info()->isWrite())
        place_of[key(outputs[i])] = Place(values.size());
      values.push_back(outputs[i]);
    }
    calls.push_back(std::move(call));
  }

  void finish(const std::vector<Tensor>& results) {
    for (const Tensor& one : results) {
      auto found = place_of.find(one.unsafeGetTensorImpl());
      TORCH_CHECK(found != place_of.end(), "a recording gives what its calls made, not a tensor of before");
      wanted.push_back(found->second);
    }
    place_of.clear();
  }

  std::vector<Tensor> replay() {
    torch::jit::Stack stack;
    size_t at = 0;
    for (const Call& call : calls) {
      stack.clear();
      for (const Argument& one : call.arguments) stack.push_back(value(one));
      call.op.callBoxed(stack);
      for (size_t i = 0; i < call.results; ++i) values[at++] = std::move(stack[i]);
    }
    std::vector<Tensor> results;
    for (Place place : wanted) results.push_back(values[size_t(place)].toTensor());
    return results;
  }

 private:
  static const void* key(const IValue& tensor) { return tensor.toTensor().unsafeGetTensorImpl(); }
  void fail(const c10::OperatorHandle& op, const char* why) {
    if (problem.empty()) problem = c10::toString(op.operator_name()) + " " + why;
  }
  Place place(const IValue& value) const {
    auto found = value.isTensor() ? place_of.find(key(value)) : place_of.end();
    return found == place_of.end() ? -1 : found->second;
  }
  Argument argument(const IValue& input) const {
    if (!input.isList()) return {input, place(input)};
    std::vector<Place> places;
    bool any = false;
    for (const IValue& one : input.toListRef()) places.push_back(place(one)), any |= places.back() >= 0;
    return {input, -1, any ? places : std::vector<Place>{}};
  }
  IValue value(const Argument& one) const {
    if (one.place >= 0) return values[size_t(one.place)];
    if (one.places.empty()) return one.constant;
    c10::List<IValue> list(one.constant.toList().elementType());
    size_t i = 0;
    for (const IValue& before : one.constant.toListRef()) {
      list.push_back(one.places[i] >= 0 ? values[size_t(one.places[i])] : before);
      ++i;
    }
    return IValue(std::move(list));
  }
};

// What the thread records now.
struct Recorder {
  std::shared_ptr<Recording> recording = std::make_shared<Recording>();
  at::CallbackHandle handle = 0;
  int64_t depth = 0;
};
thread_local std::unique_ptr<Recorder> recorder;

struct Inputs : at::ObserverContext {
  std::vector<IValue> values;
};

std::unique_ptr<at::ObserverContext> begin_call(const at::RecordFunction& call) {
  if (!recorder || recorder->depth++) return nullptr;
  auto inputs = std::make_unique<Inputs>();
  for (const IValue& one : call.inputs()) inputs->values.push_back(one);
  return inputs;
}

void end_call(const at::RecordFunction& call, at::ObserverContext* context) {
  if (!recorder || --recorder->depth) return;
  auto name = call.operator_name();
  auto op = name ? c10::Dispatcher::singleton().findSchema(*name) : std::nullopt;
  if (op && context) recorder->recording->add(*op, static_cast<Inputs*>(context)->values, call.outputs());
}

std::mutex guard;
std::unordered_map<int64_t, std::shared_ptr<Recording>> recordings;

void record() {
  TORCH_CHECK(!recorder, "this thread records already");
  recorder = std::make_unique<Recorder>();
  recorder->handle = at::addThreadLocalCallback(at::RecordFunctionCallback(begin_call, end_call)
                                                    .needsInputs(true)
                                                    .needsOutputs(true)
                                                    .scopes({at::RecordScope::FUNCTION}));
}

// End what `record` began and return its number; nothing is kept, and 0 returned, if there are no results.
int64_t recorded(std::vector<Tensor> results) {
  TORCH_CHECK(recorder, "this thread does not record");
  at::removeCallback(recorder->handle);
  auto recording = std::move(std::exchange(recorder, nullptr)->recording);
  if (results.empty()) return 0;
  TORCH_CHECK(recording->problem.empty(), recording->problem);
  recording->finish(results);
  std::lock_guard lock(guard);
  static int64_t last = 0;
  recordings[++last] = std::move(recording);
  return last;
}

std::shared_ptr<Recording> of_number(int64_t number) {
  std::lock_guard lock(guard);
  return recordings.at(number);
}

std::vector<Tensor> replay(int64_t number) { return of_number(number)->replay(); }

void check_buffer(const Tensor& buffer, at::ScalarType type, int64_t count) {
  TORCH_CHECK(buffer.is_cpu() && buffer.is_contiguous() && buffer.scalar_type() == type && buffer.numel() >= count,
              "a buffer of ", count, " ", type, " must be contiguous, not ", buffer.sizes(), " ", buffer.scalar_type());
}

// Decode steps that follow each other: see ops/recording.py.
std::vector<Tensor> follow(int64_t number, const Tensor& steps, const Tensor& now, const Tensor& tokens,
                           const Tensor& drawn) {
  auto recording = of_number(number);
  int64_t count = steps.size(0), bytes = steps.size(1), rows = tokens.numel();
  check_buffer(steps, at::kByte, count * bytes);
  check_buffer(now, at::kByte, bytes);
  check_buffer(tokens, at::kLong, rows);
  check_buffer(drawn, at::kDouble, count * 3 * rows);
  std::vector<Tensor> logits;
  auto* to = drawn.mutable_data_ptr<double>();
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(now.mutable_data_ptr(), steps.const_data_ptr<uint8_t>() + i * bytes, size_t(bytes));
    std::vector<Tensor> found = recording->replay();
    TORCH_CHECK(found.size() == 4, "a decode step gives four tensors, not ", found.size());
    check_buffer(found[1], at::kLong, rows);
    for (int k : {2, 3}) check_buffer(found[k], at::kFloat, rows);
    for (int64_t r = 0; r < rows; ++r, ++to) {
      int64_t token = std::max<int64_t>(0, found[1].const_data_ptr<int64_t>()[r]);
      tokens.mutable_data_ptr<int64_t>()[r] = token;
      to[0] = double(token);
      to[rows] = found[2].const_data_ptr<float>()[r];
      to[2 * rows] = found[3].const_data_ptr<float>()[r];
    }
    to += 2 * rows;
    logits.push_back(std::move(found[0]));
  }
  return logits;
}

void forget(int64_t number) {
  std::lock_guard lock(guard);
  recordings.erase(number);
}

}  // namespace

void define_recording(torch::Library& library) {
  library.def("record() -> ()", &record);
  library.def("recorded(Tensor[] results) -> int", &recorded);
  library.def("replay(int number) -> Tensor[]", &replay);
  library.def("follow(int number, Tensor steps, Tensor(a!) now, Tensor(b!) tokens, Tensor(c!) drawn) -> Tensor[]",
              &follow);
  library.def("forget(int number) -> ()", &forget);
}

}  // namespace liaoyuan
