// A driver with one GPU, by the functions of libcuda and NVML that clusterkvctl asks. Its answers
// are those of an H100 unless FAKE_DRIVER says otherwise: "broken" (cuInit fails), "mig".
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

bool Is(const char* kind) {
  const char* const told = std::getenv("FAKE_DRIVER");
  return told != nullptr && std::strcmp(told, kind) == 0;
}

constexpr int kFailed = 999;
constexpr int kDevice = 17;  // no index
int g_handle;

}  // namespace

extern "C" {

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuInit(unsigned flags) { return flags == 0 && !Is("broken") ? 0 : kFailed; }
int cuGetErrorName(int error, const char** name) {
  *name = error == kFailed ? "CUDA_ERROR_UNKNOWN" : nullptr;
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = kDevice;
  return ordinal == 0 ? 0 : kFailed;
}
int cuDeviceGetName(char* name, int bytes, int device) {
  if (device != kDevice) return kFailed;
  std::snprintf(name, static_cast<size_t>(bytes), "NVIDIA H100 80GB HBM3");
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device != kDevice) return kFailed;
  switch (attribute) {
    case 20:  // compute mode: default
    case 50:  // PCI domain
      *value = 0;
      return 0;
    case 33:  // PCI bus
      *value = 0x65;
      return 0;
    case 34:  // PCI device
      *value = 1;
      return 0;
    case 75:  // compute capability
      *value = 9;
      return 0;
    case 76:
      *value = 0;
      return 0;
    case 103:  // descriptors
      *value = 1;
      return 0;
    default:
      return kFailed;
  }
}

int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
int nvmlSystemGetDriverVersion(char* version, unsigned bytes) {
  std::snprintf(version, bytes, "580.159.03");
  return 0;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char* address, void** device) {
  *device = &g_handle;
  return std::strcmp(address, "0000:65:01.0") == 0 ? 0 : kFailed;
}
int nvmlDeviceGetMigMode(void* device, unsigned* current, unsigned* pending) {
  if (device != &g_handle) return kFailed;
  *current = *pending = Is("mig") ? 1 : 0;
  return 0;
}

}  // extern "C"
