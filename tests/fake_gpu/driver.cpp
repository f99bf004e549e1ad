// CUDA's driver (libcuda), as much of it as PyTorch calls: contexts, and the virtual memory of expandable segments.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "device.h"

using fake::Device;
using Guard = std::lock_guard<std::recursive_mutex>;

static const auto CONTEXT = reinterpret_cast<CUcontext>(0x1000);  // never looked into

EXPORTED CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORTED CUresult cuDriverGetVersion(int* version) { *version = 13000; return CUDA_SUCCESS; }
EXPORTED CUresult cuDeviceGet(CUdevice* device, int) { *device = 0; return CUDA_SUCCESS; }
EXPORTED CUresult cuDeviceGetCount(int* count) { *count = 1; return CUDA_SUCCESS; }
EXPORTED CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  return static_cast<CUresult>(cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), 0));
}
EXPORTED CUresult cuCtxGetCurrent(CUcontext* context) { *context = CONTEXT; return CUDA_SUCCESS; }
EXPORTED CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
EXPORTED CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0, *active = 1;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { *context = CONTEXT; return CUDA_SUCCESS; }
EXPORTED CUresult cuGetErrorString(CUresult, const char** text) { *text = "an error of the fake device"; return CUDA_SUCCESS; }

// Addresses are reserved without memory; memory is made, mapped and counted a page of 2 MiB at a time.

EXPORTED CUresult cuMemGetAllocationGranularity(size_t* size, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *size = fake::DEVICE_PAGE;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuMemAddressReserve(CUdeviceptr* start, size_t size, size_t, CUdeviceptr, unsigned long long) {
  auto& d = Device::get();
  Guard g(d.mutex);
  *start = reinterpret_cast<CUdeviceptr>(d.map(size, fake::Kind::device));
  return *start ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
EXPORTED CUresult cuMemAddressFree(CUdeviceptr start, size_t) {
  auto& d = Device::get();
  Guard g(d.mutex);
  d.unmap(reinterpret_cast<void*>(start));
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp*, unsigned long long) {
  auto& d = Device::get();
  Guard g(d.mutex);
  if (!d.take(size)) return CUDA_ERROR_OUT_OF_MEMORY;
  *handle = reinterpret_cast<CUmemGenericAllocationHandle>(new size_t(size));
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  auto& d = Device::get();
  Guard g(d.mutex);
  auto* size = reinterpret_cast<size_t*>(handle);
  d.give_back(*size);
  delete size;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuMemMap(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long) { return CUDA_SUCCESS; }
EXPORTED CUresult cuMemUnmap(CUdeviceptr, size_t) { return CUDA_SUCCESS; }
EXPORTED CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }

EXPORTED CUresult cuGetProcAddress_v2(const char* name, void** entry, int, cuuint64_t, CUdriverProcAddressQueryResult* result) {
  cudaGetDriverEntryPointByVersion(name, entry, 0, 0, nullptr);
  if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
  return CUDA_SUCCESS;
}
