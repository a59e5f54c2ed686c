// The one difference between the three builds of this folder: whose kernels they call, under which name, and where those run.
//   CPU                namespace megatron_kernels, CPU tensors, csrc/cpu
//   MK_BINDING_CUDA    namespace megatron_kernels, CUDA tensors, csrc/cuda built by nvcc
//   MK_BINDING_SIMT    namespace megatron_kernels_simt, CPU tensors, csrc/cuda run on the CPU under checks
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <type_traits>

#include "../parallel_for.h"
#include "../stream.h"

#if defined(MK_BINDING_CUDA)
#include <torch/csrc/stable/accelerator.h>
#define MK_NAMESPACE megatron_kernels
#define MK_KEY CUDA
#define MK_KERNELS cuda
// The stream as the handle that CUDA knows: declared here because torch's header has it only for builds with CUDA's headers.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#else
#include <torch/csrc/stable/ops.h>
#define MK_KEY CPU
#if defined(MK_BINDING_SIMT)
#define MK_NAMESPACE megatron_kernels_simt
#define MK_KERNELS cuda
#else
#define MK_NAMESPACE megatron_kernels
#define MK_KERNELS cpu
#endif
#endif

namespace mk {
namespace cpu {}
namespace cuda {}
}  // namespace mk

namespace mk::binding {

namespace kernels = MK_KERNELS;

#if defined(MK_BINDING_CUDA) || defined(MK_BINDING_SIMT)
constexpr bool kHasFloat64 = false;
using Place = Stream;
#else
constexpr bool kHasFloat64 = true;
using Place = ParallelFor;

inline void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) { body(first, last, context); });
}
#endif

// While it lives, the device of `tensor` is the current one; its kernels run where run() says.
class Device {
 public:
#if defined(MK_BINDING_CUDA)
  explicit Device(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()), place_{nullptr, tensor.get_device_index()} {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place_.device, &place_.handle));
  }
#elif defined(MK_BINDING_SIMT)
  explicit Device(const torch::stable::Tensor&) : place_{} {}
#else
  explicit Device(const torch::stable::Tensor&) : place_(parallel_for) {}
#endif

  // Calls a function of the contract; what went wrong, or null.
  template <class Result, class Arguments>
  Error run(Result (*kernel)(const Arguments&, Place), const Arguments& arguments) const {
    if constexpr (std::is_void_v<Result>) {
      kernel(arguments, place_);
      return nullptr;
    } else {
      return kernel(arguments, place_);
    }
  }
  // Elements of workspace that a call needs.
  template <class... More>
  int64_t elements(int64_t (*count)(int64_t, int64_t, More...), int64_t rows, int64_t cols) const {
    return count(rows, cols, More(place_)...);
  }

 private:
#if defined(MK_BINDING_CUDA)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Place place_;
};

}  // namespace mk::binding
