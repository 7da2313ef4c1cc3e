/* A CUDA runtime without a device, for tests: memory is the host's, kernels are named in a log and not run.

   ONNX Runtime's own CUDA provider loads over it, places nodes, chooses kernels and dispatches them. So placement, refusals,
   launches, copies, synchronisations, their streams and whether a graph may be captured are the provider's own; results and times
   are not. What is asked for without a wait (copies, zeros) is done at the next wait and not before, so that memory that is
   changed or read too early shows.
   The log is the file that STANDIN_LOG names, a line an event. STANDIN_CC is the card's compute capability times ten. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int status;
typedef struct { unsigned x, y, z; } dim3;

enum { OK = 0, OUT_OF_MEMORY = 2, CAPTURE_UNSUPPORTED = 900 };
enum { DEVICE_MEMORY = 2 }; /* of cudaPointerAttributes.type */

static int capturing = 0;

static void note(const char *format, ...) {
    static FILE *file;
    static int opened;
    if (!opened) {
        const char *path = getenv("STANDIN_LOG");
        file = path ? fopen(path, "a") : NULL;
        if (file) setvbuf(file, NULL, _IOLBF, 0);
        opened = 1;
    }
    if (!file) return;
    if (capturing) fputs("captured ", file);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(file, format, arguments);
    va_end(arguments);
    fputc('\n', file);
}

/* What the generated stand-ins of all other functions call. */
void standin_note(const char *name) { note("call %s", name); }
void standin_note_in(const char *name, void *stream) { note("call %s stream %zu", name, (size_t)stream); }

static int compute_capability(void) {
    const char *given = getenv("STANDIN_CC");
    return given ? atoi(given) : 80;
}

/* ---- kernels: the provider registers each host function with its device name, then launches by the host function */
enum { SLOTS = 1 << 18 };
static struct { const void *function; const char *name; } kernels[SLOTS];

static unsigned slot_of(const void *function) {
    unsigned slot = ((uintptr_t)function >> 3) % SLOTS;
    while (kernels[slot].function && kernels[slot].function != function) slot = (slot + 1) % SLOTS;
    return slot;
}

static void name_kernel(const void *function, const char *name) {
    unsigned slot = slot_of(function);
    kernels[slot].function = function;
    kernels[slot].name = name;
}

static status launch(const void *function, dim3 grid, dim3 block, void *stream) {
    const char *name = kernels[slot_of(function)].name;
    note("kernel %s grid %u,%u,%u block %u,%u,%u stream %zu", name ? name : "?", grid.x, grid.y, grid.z, block.x, block.y, block.z,
         (size_t)stream);
    return OK;
}

void **__cudaRegisterFatBinary(void *binary) { return malloc(sizeof(void *)); }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterFunction(void **handle, const char *function, char *device_function, const char *name, int limit, void *thread,
                            void *block, void *block_size, void *grid_size, int *warp_size) {
    name_kernel(function, strdup(name));
}
void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int external, size_t size, int constant,
                       int global) {}

static __thread struct { dim3 grid, block; size_t shared; void *stream; } pushed[64];
static __thread int num_pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed[num_pushed].grid = grid;
    pushed[num_pushed].block = block;
    pushed[num_pushed].shared = shared;
    pushed[num_pushed++].stream = stream;
    return 0;
}
status __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    num_pushed--;
    *grid = pushed[num_pushed].grid;
    *block = pushed[num_pushed].block;
    *shared = pushed[num_pushed].shared;
    *(void **)stream = pushed[num_pushed].stream;
    return OK;
}
status __cudaGetKernel(void **kernel, const void *function) {
    *kernel = (void *)function;
    return OK;
}
status __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
    return launch(kernel, grid, block, stream);
}
status cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
    return launch(function, grid, block, stream);
}
status cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
    return launch(function, grid, block, stream);
}
typedef struct { dim3 grid, block; size_t shared; void *stream; } launch_config; /* how cudaLaunchConfig_t begins */
status cudaLaunchKernelExC(const launch_config *config, const void *function, void **arguments) {
    return launch(function, config->grid, config->block, config->stream);
}
status cudaLibraryLoadData(void **library, const void *code, void *options, void *values, unsigned count, void *more, void *others,
                           unsigned num_others) {
    *library = malloc(1);
    return OK;
}
status cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
    char *copy = strdup(name);
    name_kernel(copy, copy);
    *kernel = copy;
    return OK;
}

/* ---- the device: an 80 GB card. Structs are given by their size and the places of what the provider reads, CUDA 13. */
enum { PROPERTIES_SIZE = 1008, FUNCTION_ATTRIBUTES_SIZE = 144, POINTER_ATTRIBUTES_SIZE = 88 };
static void set32(void *base, int offset, int value) { memcpy((char *)base + offset, &value, sizeof value); }
static void set64(void *base, int offset, size_t value) { memcpy((char *)base + offset, &value, sizeof value); }

enum { NUM_PROCESSORS = 108, L2_BYTES = 40 << 20, SHARED_PER_BLOCK = 49152, SHARED_OPT_IN_90 = 232448, SHARED_OPT_IN = 166912 };

static int shared_opt_in(void) { return compute_capability() >= 90 ? SHARED_OPT_IN_90 : SHARED_OPT_IN; }

status cudaGetDeviceProperties(void *properties, int device) {
    memset(properties, 0, PROPERTIES_SIZE);
    strcpy(properties, "stand-in");
    set64(properties, 288, 80ull << 30);     /* totalGlobalMem */
    set64(properties, 296, SHARED_PER_BLOCK);
    set32(properties, 304, 65536);           /* regsPerBlock */
    set32(properties, 308, 32);              /* warpSize */
    set32(properties, 320, 1024);            /* maxThreadsPerBlock */
    set32(properties, 324, 1024);            /* maxThreadsDim */
    set32(properties, 328, 1024);
    set32(properties, 332, 64);
    set32(properties, 336, 2147483647);      /* maxGridSize */
    set32(properties, 340, 65535);
    set32(properties, 344, 65535);
    set32(properties, 360, compute_capability() / 10);
    set32(properties, 364, compute_capability() % 10);
    set32(properties, 384, NUM_PROCESSORS);
    set32(properties, 560, 1);               /* concurrentKernels */
    set32(properties, 584, 3);               /* asyncEngineCount */
    set32(properties, 588, 1);               /* unifiedAddressing */
    set32(properties, 596, L2_BYTES);
    set32(properties, 604, 2048);            /* maxThreadsPerMultiProcessor */
    set64(properties, 624, shared_opt_in() + 1024); /* sharedMemPerMultiprocessor */
    set32(properties, 632, 65536);           /* regsPerMultiprocessor */
    set32(properties, 636, 1);               /* managedMemory */
    set32(properties, 668, 1);               /* cooperativeLaunch */
    set64(properties, 672, shared_opt_in());
    set32(properties, 688, 32);              /* maxBlocksPerMultiProcessor */
    set32(properties, 720, 1);               /* memoryPoolsSupported */
    return OK;
}
status cudaDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 1: *value = 1024; break;                       /* MaxThreadsPerBlock */
        case 8: *value = SHARED_PER_BLOCK; break;
        case 10: *value = 32; break;                        /* WarpSize */
        case 16: *value = NUM_PROCESSORS; break;
        case 38: *value = L2_BYTES; break;
        case 39: *value = 2048; break;                      /* MaxThreadsPerMultiProcessor */
        case 75: *value = compute_capability() / 10; break;
        case 76: *value = compute_capability() % 10; break;
        case 81: *value = shared_opt_in() + 1024; break;    /* MaxSharedMemoryPerMultiprocessor */
        case 97: *value = shared_opt_in(); break;           /* MaxSharedMemoryPerBlockOptin */
        default: *value = 1;
    }
    return OK;
}
status cudaFuncGetAttributes(void *attributes, const void *function) {
    memset(attributes, 0, FUNCTION_ATTRIBUTES_SIZE);
    set32(attributes, 24, 1024);                 /* maxThreadsPerBlock */
    set32(attributes, 28, 64);                   /* numRegs */
    set32(attributes, 32, compute_capability()); /* ptxVersion */
    set32(attributes, 36, compute_capability()); /* binaryVersion */
    set32(attributes, 44, shared_opt_in());      /* maxDynamicSharedSizeBytes */
    return OK;
}
status cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *function, int block, size_t shared,
                                                               unsigned flags) {
    *count = 1;
    return OK;
}
status cudaGetDeviceCount(int *count) { *count = 1; return OK; }
status cudaGetDevice(int *device) { *device = 0; return OK; }
status cudaDriverGetVersion(int *version) { *version = 13000; return OK; }
status cudaRuntimeGetVersion(int *version) { *version = 13000; return OK; }

/* ---- memory */
enum { GRAPH_BYTES = 1 << 20 }; /* of an instantiated graph */
static size_t num_graphs = 0;
status cudaMalloc(void **pointer, size_t size) {
    note("malloc %zu", size);
    if (capturing) return CAPTURE_UNSUPPORTED;
    if (posix_memalign(pointer, 256, size ? size : 1)) return OUT_OF_MEMORY;
    memset(*pointer, 0, size);
    return OK;
}
status cudaMallocHost(void **pointer, size_t size) { return cudaMalloc(pointer, size); }
status cudaHostAlloc(void **pointer, size_t size, unsigned flags) { return cudaMalloc(pointer, size); }
status cudaMallocFromPoolAsync(void **pointer, size_t size, void *pool, void *stream) { return cudaMalloc(pointer, size); }
status cudaMemPoolCreate(void **pool, const void *properties) { *pool = malloc(1); return OK; }
status cudaMemPoolGetAttribute(void *pool, int attribute, void *value) { memset(value, 0, 8); return OK; }
status cudaMemGetInfo(size_t *available, size_t *total) { *available = (70ull << 30) - num_graphs * GRAPH_BYTES; *total = 80ull << 30; return OK; }
status cudaPointerGetAttributes(void *attributes, const void *pointer) {
    memset(attributes, 0, POINTER_ATTRIBUTES_SIZE);
    set32(attributes, 0, DEVICE_MEMORY);
    set64(attributes, 8, (size_t)pointer);
    set64(attributes, 16, (size_t)pointer);
    return OK;
}

/* Copies and zeros that wait, in the order of all streams: `from` is NULL for zeros. */
enum { MOST_PENDING = 1 << 16 };
static struct { char *to; const char *from; size_t to_pitch, from_pitch, width, height; int value; } pending[MOST_PENDING];
static int num_pending;
static pthread_mutex_t pending_lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

static void do_pending(void) {
    pthread_mutex_lock(&pending_lock);
    for (int i = 0; i < num_pending; i++) {
        for (size_t row = 0; row < pending[i].height; row++) {
            char *to = pending[i].to + row * pending[i].to_pitch;
            if (pending[i].from) memmove(to, pending[i].from + row * pending[i].from_pitch, pending[i].width);
            else memset(to, pending[i].value, pending[i].width);
        }
    }
    num_pending = 0;
    pthread_mutex_unlock(&pending_lock);
}
static status later(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int value) {
    pthread_mutex_lock(&pending_lock);
    if (num_pending == MOST_PENDING) do_pending();
    pending[num_pending].to = to;
    pending[num_pending].from = from;
    pending[num_pending].to_pitch = to_pitch;
    pending[num_pending].from_pitch = from_pitch;
    pending[num_pending].width = width;
    pending[num_pending].height = height;
    pending[num_pending++].value = value;
    pthread_mutex_unlock(&pending_lock);
    return OK;
}

static const char *const directions[] = {"host-host", "host-device", "device-host", "device-device", "default"};
enum { DEFAULT_STREAM = 0 };
static void note_copy(int direction, size_t size, void *stream) { note("copy %s %zu stream %zu", directions[direction], size, (size_t)stream); }
status cudaMemcpyAsync(void *to, const void *from, size_t size, int direction, void *stream) {
    note_copy(direction, size, stream);
    return later(to, 0, from, 0, size, 1, 0);
}
status cudaMemcpy(void *to, const void *from, size_t size, int direction) {
    cudaMemcpyAsync(to, from, size, direction, DEFAULT_STREAM);
    do_pending();
    return OK;
}
status cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int direction,
                         void *stream) {
    note_copy(direction, width * height, stream);
    return later(to, to_pitch, from, from_pitch, width, height, 0);
}
status cudaMemcpyFromSymbol(void *to, const void *symbol, size_t size, size_t offset, int direction) {
    note("copy device-host %zu", size);
    memset(to, 0, size);
    return OK;
}
status cudaMemsetAsync(void *pointer, int value, size_t size, void *stream) {
    note("memset %zu stream %zu", size, (size_t)stream);
    return later(pointer, 0, NULL, 0, size, 1, value);
}
status cudaMemset(void *pointer, int value, size_t size) {
    cudaMemsetAsync(pointer, value, size, DEFAULT_STREAM);
    do_pending();
    return OK;
}
status cudaFree(void *pointer) { do_pending(); free(pointer); return OK; }
status cudaFreeHost(void *pointer) { return cudaFree(pointer); }
status cudaFreeAsync(void *pointer, void *stream) { return cudaFree(pointer); }

/* ---- streams, events, captured graphs */
static status handle(void **made) { *made = malloc(1); return OK; }
enum { FIRST_STREAM = 256 }; /* streams are numbers */
status cudaStreamCreateWithFlags(void **stream, unsigned flags) {
    static size_t made = FIRST_STREAM;
    *stream = (void *)made++;
    return OK;
}
status cudaStreamCreate(void **stream) { return cudaStreamCreateWithFlags(stream, 0); }
static status wait_for_all(void) {
    if (capturing) return CAPTURE_UNSUPPORTED;
    do_pending();
    return OK;
}
status cudaStreamSynchronize(void *stream) { note("sync stream %zu", (size_t)stream); return wait_for_all(); }
status cudaDeviceSynchronize(void) { note("sync"); return wait_for_all(); }
status cudaEventCreate(void **event) { return handle(event); }
status cudaEventCreateWithFlags(void **event, unsigned flags) { return handle(event); }
status cudaEventElapsedTime(float *milliseconds, void *from, void *to) { *milliseconds = 1.0f; return OK; }
status cudaEventSynchronize(void *event) { note("sync"); return wait_for_all(); }
status cudaLaunchHostFunc(void *stream, void (*function)(void *), void *argument) {
    do_pending();
    function(argument);
    return OK;
}
status cudaStreamBeginCapture(void *stream, int mode) { note("begin capture"); capturing = 1; return OK; }
status cudaStreamEndCapture(void *stream, void **graph) { capturing = 0; note("end capture"); return handle(graph); }
status cudaStreamIsCapturing(void *stream, int *state) { *state = capturing; return OK; }
status cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) {
    num_graphs++;
    return handle(executable);
}
status cudaGraphExecDestroy(void *executable) { num_graphs--; return OK; }
status cudaGraphLaunch(void *executable, void *stream) { note("replay"); return OK; }

/* ---- errors, of which there are none */
const char *cudaGetErrorName(int error) { return "cudaErrorStandIn"; }
const char *cudaGetErrorString(int error) { return "stand-in"; }
status cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, int *found) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (found) *found = *function ? 0 : 1;
    return OK;
}

/* ---- of the driver, what the provider takes the address of */
status cuTensorMapEncodeTiled(void *map) { return OK; }
