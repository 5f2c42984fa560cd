#include "client/bench/cublas.h"

#include <dlfcn.h>

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

constexpr char kLibrary[] = "libcublas.so.13";
constexpr size_t kWorkspaceBytes = size_t{64} << 20;

// cuBLAS's stable C interface, as far as it is used here.
using Handle = void*;
constexpr int kSuccess = 0;
constexpr int kAsIs = 0, kTransposed = 1;  // cublasOperation_t
constexpr int kBf16 = 14;                  // cudaDataType
constexpr int kCompute32F = 68;            // cublasComputeType_t
constexpr int kDefaultAlgorithm = -1;      // cublasGemmAlgo_t

absl::Status ToStatus(int error, const char* what) {
  if (error == kSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": cuBLAS error ", error));
}

}  // namespace

struct Cublas::Library {
  ~Library() {
    if (handle != nullptr) (void)destroy(handle);
    // Stays loaded: the runtime may still hold its modules.
  }

  template <typename Function>
  absl::Status Find(const char* name, Function& function) const {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function != nullptr) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat(kLibrary, " has no ", name));
  }

  void* library = nullptr;
  Handle handle = nullptr;
  int (*create)(Handle*) = nullptr;
  int (*destroy)(Handle) = nullptr;
  int (*set_stream)(Handle, cudaStream_t) = nullptr;
  int (*set_workspace)(Handle, void*, size_t) = nullptr;
  int (*gemm)(Handle, int, int, int, int, int, const void*, const void*, int, int, const void*, int,
              int, const void*, void*, int, int, int, int) = nullptr;
};

Cublas::Cublas(std::unique_ptr<Library> library) : library_(std::move(library)) {}
Cublas::~Cublas() = default;

absl::StatusOr<std::unique_ptr<Cublas>> Cublas::Load(gpu::Device& device, cudaStream_t stream) {
  auto library = std::make_unique<Library>();
  library->library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library->library == nullptr) {
    const char* const why = dlerror();
    return absl::UnavailableError(
        absl::StrCat("cuBLAS is not there: ", why == nullptr ? kLibrary : why));
  }
  CKV_RETURN_IF_ERROR(library->Find("cublasCreate_v2", library->create));
  CKV_RETURN_IF_ERROR(library->Find("cublasDestroy_v2", library->destroy));
  CKV_RETURN_IF_ERROR(library->Find("cublasSetStream_v2", library->set_stream));
  CKV_RETURN_IF_ERROR(library->Find("cublasSetWorkspace_v2", library->set_workspace));
  CKV_RETURN_IF_ERROR(library->Find("cublasGemmEx", library->gemm));
  CKV_RETURN_IF_ERROR(ToStatus(library->create(&library->handle), "making a handle"));
  CKV_RETURN_IF_ERROR(ToStatus(library->set_stream(library->handle, stream), "setting a stream"));
  std::unique_ptr<Cublas> cublas(new Cublas(std::move(library)));
  // Without one of ours it would allocate while a graph is captured.
  CKV_ASSIGN_OR_RETURN(cublas->workspace_, device.Allocate(kWorkspaceBytes));
  CKV_RETURN_IF_ERROR(
      ToStatus(cublas->library_->set_workspace(cublas->library_->handle, cublas->workspace_->data(),
                                               kWorkspaceBytes),
               "setting the workspace"));
  return cublas;
}

absl::Status Cublas::Multiply(const std::byte* weights, const std::byte* x, std::byte* y,
                              uint32_t rows, uint32_t outputs, uint32_t inner) const {
  const float one = 1.0f, zero = 0.0f;
  const int m = static_cast<int>(outputs), n = static_cast<int>(rows), k = static_cast<int>(inner);
  // cuBLAS counts columns first: its y is outputs x rows.
  return ToStatus(
      library_->gemm(library_->handle, kTransposed, kAsIs, m, n, k, &one, weights, kBf16, k, x,
                     kBf16, k, &zero, y, kBf16, m, kCompute32F, kDefaultAlgorithm),
      "product");
}

}  // namespace clusterkv::client::bench
