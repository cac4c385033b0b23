// The Python module lyapcuda._C: importing it registers the ops; it tells how it was built.
//
// Python's limited API alone (Py_LIMITED_API), as torch's stable ABI alone for the ops: one build
// serves every Python from 3.11 on and every torch from 2.11 to 2.15.
#include <Python.h>
#include <torch/headeronly/version.h>

#include <cstdint>
#include <initializer_list>

#include "cpu/targets.h"
#include "cuda/build.h"
#include "scalars/growth.h"
#include "scalars/state.h"

#if !defined(Py_LIMITED_API)
#error "define Py_LIMITED_API: the extension is built for every Python"
#endif

#define LYAPCUDA_TEXT_(x) #x
#define LYAPCUDA_TEXT(x) LYAPCUDA_TEXT_(x)

namespace {

constexpr char kTargetVersion[] = LYAPCUDA_TEXT(TORCH_TARGET_VERSION);

// A reference that is given up at the end of its scope; null where Python has raised.
class Reference {
 public:
  explicit Reference(PyObject* object) : object_(object) {}
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  ~Reference() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }

  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

// Sets dict[name], taking the value's reference. False where Python has raised.
bool put(const Reference& dict, const char* name, PyObject* value) {
  const Reference kept(value);
  return kept && PyDict_SetItemString(dict.get(), name, kept.get()) == 0;
}

bool put(const Reference& dict, const char* name, const char* text) {
  return put(dict, name, PyUnicode_FromString(text));
}

PyObject* build_info(PyObject*, PyObject*) {
  Reference info(PyDict_New());
  bool right = bool(info);
#if defined(LYAPCUDA_WITH_CUDA)
  right = right && put(info, "backend", "cpu, cuda") &&
          put(info, "cuda", lyapcuda::cuda::toolkit_version().c_str()) &&
          put(info, "cuda_architectures", lyapcuda::cuda::built_for().c_str());
#else
  right = right && put(info, "backend", "cpu");
#endif
#if defined(__clang__)
  right = right && put(info, "compiler", "clang " __clang_version__);
#elif defined(__GNUC__)
  right = right && put(info, "compiler", "gcc " __VERSION__);
#endif
  right = right && put(info, "built_against_torch", TORCH_VERSION) &&
          put(info, "torch_target_version", kTargetVersion) &&
          put(info, "simd", lyapcuda::cpu::target_name());
  return right ? info.release() : nullptr;
}

// (offset, shape) of a field of the state.
PyObject* field(int64_t offset, std::initializer_list<int64_t> shape) {
  Reference sizes(PyTuple_New(static_cast<Py_ssize_t>(shape.size())));
  if (!sizes) return nullptr;
  Py_ssize_t i = 0;
  for (const int64_t size : shape) {
    PyObject* number = PyLong_FromLongLong(size);
    // Takes the reference; a tuple of null is given up with its other elements.
    if (number == nullptr || PyTuple_SetItem(sizes.get(), i++, number) != 0) return nullptr;
  }
  return Py_BuildValue("(LN)", static_cast<long long>(offset), sizes.release());
}

PyObject* state_fields(PyObject*, PyObject* argument) {
  const long long k = PyLong_AsLongLong(argument);
  if (k == -1 && PyErr_Occurred()) return nullptr;
  if (k < 1 || k > lyapcuda::kMaxK) {
    return PyErr_Format(PyExc_ValueError, "k=%lld: expected 1 to %d", k,
                        static_cast<int>(lyapcuda::kMaxK));
  }
  Reference fields(PyDict_New());
  bool right = bool(fields);
#define LYAPCUDA_FIELD(kind, name, ...) \
  right = right && put(fields, #name,   \
                       field(lyapcuda::state_offset(lyapcuda::kind::name, k), {__VA_ARGS__}));
#define LYAPCUDA_SCALAR(name) LYAPCUDA_FIELD(StateScalar, name)
#define LYAPCUDA_VECTOR(name) LYAPCUDA_FIELD(StateVector, name, k)
#define LYAPCUDA_MATRIX(name) LYAPCUDA_FIELD(StateMatrix, name, k, k)
  LYAPCUDA_STATE_SCALARS(LYAPCUDA_SCALAR)
  LYAPCUDA_STATE_VECTORS(LYAPCUDA_VECTOR)
  LYAPCUDA_STATE_MATRICES(LYAPCUDA_MATRIX)
#undef LYAPCUDA_FIELD
#undef LYAPCUDA_SCALAR
#undef LYAPCUDA_VECTOR
#undef LYAPCUDA_MATRIX
  return right ? fields.release() : nullptr;
}

PyObject* curvature_of_growth(PyObject*, PyObject* arguments) {
  double exponent, rate, momentum;
  int estimate;
  if (!PyArg_ParseTuple(arguments, "dddi", &exponent, &rate, &momentum, &estimate)) return nullptr;
  return PyFloat_FromDouble(lyapcuda::curvature_of_growth(
      exponent, rate, momentum, static_cast<lyapcuda::Estimate>(estimate)));
}

PyMethodDef kFunctions[] = {
    {"build_info", build_info, METH_NOARGS, "build_info() -> dict: how the extension was built."},
    {"state_fields", state_fields, METH_O,
     "state_fields(k) -> dict: name -> (offset, shape) in the state of k separations."},
    {"curvature_of_growth", curvature_of_growth, METH_VARARGS,
     "curvature_of_growth(exponent, rate, momentum, estimate) -> float."},
    {nullptr, nullptr, 0, nullptr}};

int add_constants(PyObject* module) {
  return PyModule_AddIntConstant(module, "max_k", lyapcuda::kMaxK);
}

PyModuleDef_Slot kSlots[] = {{Py_mod_exec, reinterpret_cast<void*>(add_constants)}, {0, nullptr}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT,
                       "lyapcuda._C",
                       "Compiled ops of lyapcuda (torch.ops.lyapcuda) and how they were built.",
                       0,
                       kFunctions,
                       kSlots,
                       nullptr,
                       nullptr,
                       nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&kModule); }
