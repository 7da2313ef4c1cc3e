/* cuBLAS and cuBLASLt without a device: their handles, and a heuristic that always finds an algorithm. The products themselves
   are generated functions that note their names. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int status;
void standin_note_in(const char *name, void *stream);
static status handle(void **made) { *made = malloc(1); return 0; }

const char *cublasGetStatusName(int error) { return "stand-in"; }
const char *cublasGetStatusString(int error) { return "stand-in"; }
status cublasCreate_v2(void **made) { return handle(made); }
status cublasGetMathMode(void *library, int *mode) { *mode = 0; return 0; }
status cublasSetStream_v2(void *library, void *stream) {
    standin_note_in("cublasSetStream_v2", stream);
    return 0;
}
status cublasLtCreate(void **made) { return handle(made); }
status cublasLtMatmulDescCreate(void **made, int compute, int scale) { return handle(made); }
status cublasLtMatmulPreferenceCreate(void **made) { return handle(made); }
status cublasLtMatrixLayoutCreate(void **made, int type, uint64_t rows, uint64_t columns, int64_t leading) { return handle(made); }
status cublasLtMatrixTransformDescCreate(void **made, int scale) { return handle(made); }
status cublasLtMatmulAlgoGetHeuristic(void *library, void *operation, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                      void *results, int *found) {
    memset(results, 0, 64);
    *found = 1;
    return 0;
}
status cublasLtMatmul(void *library, void *operation, void *alpha, void *a, void *a_layout, void *b, void *b_layout, void *beta,
                      void *c, void *c_layout, void *d, void *d_layout, void *algorithm, void *workspace, size_t size, void *stream) {
    standin_note_in("cublasLtMatmul", stream);
    return 0;
}
