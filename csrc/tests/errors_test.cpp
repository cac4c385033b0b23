// What a user is told of CUDA's errors (cuda/errors.h).
#include "../cuda/errors.h"

#include "check.h"

namespace lyapcuda::test {
namespace {

bool says(const std::string& text, const char* words) {
  return text.find(words) != std::string::npos;
}

std::string told(int error, cuda::Gpu gpu) {
  return cuda::advice(error, gpu, "sm_80, sm_90", "13.0");
}

void a_gpu_without_code_is_named_with_the_variable() {
  for (const int error : {cuda::kNoKernelImageForDevice, cuda::kInvalidDeviceFunction}) {
    const std::string text = told(error, {12, 0});
    CHECK(says(text, "sm_120") && says(text, "built for sm_80, sm_90"));
    CHECK(says(text, "TORCH_CUDA_ARCH_LIST=12.0"));
  }
}

void a_gpu_too_old_is_not_told_to_build_for_it() {
  const std::string text = told(cuda::kNoKernelImageForDevice, {7, 5});
  CHECK(says(text, "sm_75") && says(text, "sm_80"));
  CHECK(!says(text, "TORCH_CUDA_ARCH_LIST"));
}

void a_driver_too_old_is_told_to_be_updated() {
  for (const int error : {cuda::kInsufficientDriver, cuda::kCallRequiresNewerDriver}) {
    const std::string text = told(error, {9, 0});
    CHECK(says(text, "13.0") && says(text, "update the driver"));
  }
  const std::string text = told(cuda::kUnsupportedPtxVersion, {12, 1});
  CHECK(says(text, "update the driver") && says(text, "TORCH_CUDA_ARCH_LIST=12.1"));
}

void of_other_errors_cuda_tells_itself() {
  CHECK(told(0, {9, 0}).empty());
  CHECK(told(700, {9, 0}).empty());
}

}  // namespace

void errors_tests() {
  a_gpu_without_code_is_named_with_the_variable();
  a_gpu_too_old_is_not_told_to_build_for_it();
  a_driver_too_old_is_told_to_be_updated();
  of_other_errors_cuda_tells_itself();
}

}  // namespace lyapcuda::test
