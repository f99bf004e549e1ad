// cuBLAS, as much of it as a GPT's step calls. Declared without its headers, which not every toolkit has; the
// arguments that are not looked into are left out, which C's calling convention allows.
#include <cstdlib>
#include <cstring>

#include "device.h"

namespace {

int made(void** handle) { *handle = calloc(1, 64); return 0; }
int product() {
  auto& d = fake::Device::get();
  std::lock_guard guard(d.mutex);
  d.counts.launches++, d.counts.products++;
  return 0;
}
struct Heuristic { uint64_t algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; };

}  // namespace

#define DOES_NOTHING(name) EXPORTED int name() { return 0; }
#define PRODUCT(name) EXPORTED int name() { return product(); }

EXPORTED int cublasCreate_v2(void** handle) { return made(handle); }
EXPORTED int cublasDestroy_v2(void* handle) { free(handle); return 0; }
EXPORTED int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
EXPORTED int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
DOES_NOTHING(cublasSetMathMode)
DOES_NOTHING(cublasSetPointerMode_v2)
DOES_NOTHING(cublasSetStream_v2)
DOES_NOTHING(cublasSetWorkspace_v2)

PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasLtMatmul)

EXPORTED int cublasLtMatmulDescCreate(void** handle) { return made(handle); }
EXPORTED int cublasLtMatmulDescDestroy(void* handle) { free(handle); return 0; }
EXPORTED int cublasLtMatmulPreferenceCreate(void** handle) { return made(handle); }
EXPORTED int cublasLtMatmulPreferenceDestroy(void* handle) { free(handle); return 0; }
EXPORTED int cublasLtMatrixLayoutCreate(void** handle) { return made(handle); }
EXPORTED int cublasLtMatrixLayoutDestroy(void* handle) { free(handle); return 0; }
DOES_NOTHING(cublasLtMatmulDescSetAttribute)
DOES_NOTHING(cublasLtMatmulPreferenceSetAttribute)
DOES_NOTHING(cublasLtMatrixLayoutSetAttribute)
EXPORTED int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Heuristic* found, int* count) {
  memset(found, 0, sizeof *found);
  *count = 1;
  return 0;
}
