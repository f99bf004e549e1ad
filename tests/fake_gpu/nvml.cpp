// NVIDIA's management library, as much of it as PyTorch asks while it starts. All other calls are not supported.
#define EXPORTED extern "C" __attribute__((visibility("default")))
constexpr int NOT_SUPPORTED = 3;

EXPORTED int nvmlInit() { return 0; }
EXPORTED int nvmlInit_v2() { return 0; }
EXPORTED int nvmlShutdown() { return 0; }
EXPORTED int nvmlDeviceGetCount_v2(int* count) { *count = 1; return 0; }
EXPORTED int nvmlDeviceGetHandleByIndex_v2(int, void** device) { *device = reinterpret_cast<void*>(1); return 0; }
EXPORTED int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** device) { *device = reinterpret_cast<void*>(1); return 0; }
EXPORTED int nvmlDeviceGetComputeRunningProcesses(void*, int* count, void*) { *count = 0; return 0; }
EXPORTED int nvmlDeviceGetComputeRunningProcesses_v3(void*, int* count, void*) { *count = 0; return 0; }
EXPORTED int nvmlDeviceGetNvLinkRemoteDeviceType(void*, int, int*) { return NOT_SUPPORTED; }
EXPORTED int nvmlDeviceGetNvLinkRemotePciInfo_v2(void*, int, void*) { return NOT_SUPPORTED; }
EXPORTED int nvmlDeviceGetGpuFabricInfoV(void*, void*) { return 0; }  // zeros: it has no fabric
EXPORTED int nvmlSystemGetCudaDriverVersion_v2(int* version) { *version = 13000; return 0; }
EXPORTED const char* nvmlErrorString(int) { return "not supported by the fake device"; }
