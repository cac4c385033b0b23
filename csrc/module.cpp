// The Python module lyapcuda._C: importing it registers the ops; it tells how it was built.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/targets.h"
#include "cuda/build.h"
#include "scalars/growth.h"
#include "scalars/state.h"

namespace py = pybind11;

#define LYAPCUDA_TEXT_(x) #x
#define LYAPCUDA_TEXT(x) LYAPCUDA_TEXT_(x)
constexpr char kTargetVersion[] = LYAPCUDA_TEXT(TORCH_TARGET_VERSION);

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled ops of lyapcuda (torch.ops.lyapcuda) and how they were built.";

  m.def("build_info", [] {
    py::dict info;
#if defined(LYAPCUDA_WITH_CUDA)
    info["backend"] = "cpu, cuda";
    info["cuda"] = lyapcuda::cuda::toolkit_version();
    info["cuda_architectures"] = lyapcuda::cuda::built_for();
#else
    info["backend"] = "cpu";
#endif
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["built_against_torch"] = TORCH_VERSION;
    info["torch_target_version"] = kTargetVersion;
    info["simd"] = lyapcuda::cpu::target_name();
    return info;
  });

  m.attr("max_k") = lyapcuda::kMaxK;
  m.def(
      "state_fields",
      [](int64_t k) {
        if (k < 1 || k > lyapcuda::kMaxK) {
          throw py::value_error("k=" + std::to_string(k) + ": expected 1 to " +
                                std::to_string(lyapcuda::kMaxK));
        }
        py::dict fields;
#define LYAPCUDA_FIELD(kind, name, ...)                                           \
  fields[#name] = py::make_tuple(lyapcuda::state_offset(lyapcuda::kind::name, k), \
                                 py::make_tuple(__VA_ARGS__));
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
        return fields;
      },
      py::arg("k"));

  m.def(
      "curvature_of_growth",
      [](double exponent, double rate, double momentum, int64_t estimate) {
        return lyapcuda::curvature_of_growth(exponent, rate, momentum,
                                             static_cast<lyapcuda::Estimate>(estimate));
      },
      py::arg("exponent"), py::arg("rate"), py::arg("momentum"), py::arg("estimate"));
}
